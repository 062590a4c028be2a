"""Rollouts on a pretended CUDA device: graphs, the memory they read, and nothing that waits for the device."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from fake_cuda import FakeCuda, is_there
from rollout.families import FAMILIES, Family, family_model
from rollout.test_step_cache import IDS, PAD, RECORDED, equal, move, roll_out

from remax_lightning.rollout import AutoEngine, GenerationRequest, PairedEngine, SamplingConfig

FALCONS = [family for family in RECORDED if "Falcon" in family.name]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=["float32", "bfloat16", "mixed"])


def moved(family: Family, dtype: torch.dtype | None) -> torch.nn.Module:
    return family_model(family, dtype or torch.float32, lora=dtype == torch.float32).to("cuda")


def train(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


@DTYPES
@pytest.mark.parametrize("family", [f for f in RECORDED if f not in FALCONS], ids=lambda family: family.name)
def test_graphs_write_what_the_model_writes(family: Family, dtype: torch.dtype | None, fake_cuda: FakeCuda) -> None:
    model, engine, plain = moved(family, dtype), PairedEngine(), PairedEngine(record=False)
    for seed in (0, 1):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is None):
            written, expected = (roll_out(each, model, seed, length=28) for each in (engine, plain))
        assert equal(written, expected)
        assert is_there(written.sampled_ids)
        train(model)
    assert engine.recorder.obstacle == ""
    assert sum(graph.replays for graph in fake_cuda.graphs) > 20


def test_graphs_are_captured_once_and_run_in_the_same_memory(fake_cuda: FakeCuda) -> None:
    model, engine = tiny_model("llama").to("cuda"), PairedEngine()
    roll_out(engine, model)
    captured = [*fake_cuda.graphs]
    assert len(captured) == 3  # 8 to 46 slots by sixteens
    assert [graph.pool_given for graph in captured] == [None, captured[0].pool(), captured[0].pool()]
    assert captured[0].pool() is not None
    replays = sum(graph.replays for graph in captured)
    roll_out(engine, model, seed=1)
    assert fake_cuda.graphs == captured
    assert sum(graph.replays for graph in captured) - replays == 39  # a step for every token but the last


def test_graphs_end_with_the_slots_that_they_read(fake_cuda: FakeCuda) -> None:
    model, engine = tiny_model("llama").to("cuda"), PairedEngine(keep_slots=False)
    for seed in (0, 1):
        assert equal(roll_out(engine, model, seed), roll_out(PairedEngine(record=False), model, seed))
        train(model)
        assert not engine.recorder._replays
    assert [graph.pool_given is None for graph in fake_cuda.graphs] == 2 * [True, False, False]


@pytest.mark.parametrize("mixed", [False, True])
def test_graphs_of_weights_that_keep_moving_are_of_one_rollout(mixed: bool, fake_cuda: FakeCuda) -> None:
    model, engine, kept = tiny_model("llama").to("cuda"), PairedEngine(), []
    for seed in range(5):
        before = sum(graph.replays for graph in fake_cuda.graphs)
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            assert equal(roll_out(engine, model, seed), roll_out(PairedEngine(record=False), model, seed))
        assert sum(graph.replays for graph in fake_cuda.graphs) - before == 39  # one for every token but the last
        kept.append(engine._buffers is not None)
        assert bool(engine.recorder._replays) == bool(engine._buffers)
        if seed < 3:
            move(model)
    assert kept == [True, True, False, False, True]  # from the second move in a row on, until they stay where they are
    assert len(fake_cuda.graphs) == 3 * 5
    assert engine.recorder.obstacle == ""


def test_weights_that_are_gathered_leave_no_graphs(fake_cuda: FakeCuda) -> None:
    """ZeRO-3's are known by their ids before they have moved: the step after the first rollout needs the memory."""
    model, engine = tiny_model("llama").to("cuda"), PairedEngine()
    for parameter in model.parameters():
        parameter.ds_id = 0
    for _ in range(2):
        assert equal(roll_out(engine, model), roll_out(PairedEngine(record=False), model))
        assert engine._buffers is None
        assert not engine.recorder._replays
    assert len(fake_cuda.graphs) == 2 * 3


def test_longer_responses_ask_for_new_slots_and_new_graphs(fake_cuda: FakeCuda) -> None:
    model, engine, plain = tiny_model("llama").to("cuda"), PairedEngine(), PairedEngine(record=False)
    for length in (20, 60, 20):
        assert equal(roll_out(engine, model, length=length), roll_out(plain, model, length=length))
        train(model)
    assert engine.recorder.obstacle == ""


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("log_probs", [True, False])
def test_the_host_waits_at_looks_only(log_probs: bool, record: bool, fake_cuda: FakeCuda) -> None:
    model, engine = tiny_model("llama").to("cuda"), PairedEngine(record=record)
    prompts, mask = IDS.to("cuda"), torch.ones_like(IDS, dtype=torch.bool, device="cuda")
    roll_out(engine, model)
    fake_cuda.reads.clear()
    sampling = SamplingConfig(max_response_length=40, min_response_length=2, top_p=0.9, top_k=5)
    chance = torch.Generator("cuda").manual_seed(0)
    request = GenerationRequest(prompts, mask, sampling, [95], PAD, chance, return_log_probs=log_probs)
    assert engine.generate(model, request).sampled_ids.shape == (4, 40)
    # The ids that end a response are copied there once. The prefill asks whether any prompt is padded; after 16 and 32
    # tokens ended rows are counted.
    assert fake_cuda.reads == {"from the host": 1, "_local_scalar_dense": 1 + 2}


@pytest.mark.parametrize("mixed", [False, True])
def test_training_follows_a_validation_in_inference_mode(mixed: bool, fake_cuda: FakeCuda) -> None:
    model, engine, plain = tiny_model("llama").to("cuda"), PairedEngine(), PairedEngine(record=False)
    for inference in (True, False, True):
        with torch.inference_mode(inference), torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            assert equal(roll_out(engine, model), roll_out(plain, model))
        train(model)


def test_more_prompts_ask_for_new_slots_and_fewer_for_none(fake_cuda: FakeCuda) -> None:
    model, engine, plain = tiny_model("llama").to("cuda"), PairedEngine(), PairedEngine(record=False)
    slots = []
    for count in (2, 4, 2):
        assert equal(roll_out(engine, model, ids=IDS[:count]), roll_out(plain, model, ids=IDS[:count]))
        slots.append(engine._buffers)
        train(model)
    assert slots[0] is not slots[1]
    assert slots[1] is slots[2]


@DTYPES
@pytest.mark.parametrize("family", FALCONS, ids=lambda family: family.name)
def test_a_model_that_copies_from_the_host_runs_without_graphs(
    family: Family, dtype: torch.dtype | None, fake_cuda: FakeCuda
) -> None:
    """Falcon's attention indexes with a list, which is copied at each step; no capture of that must begin."""
    model, engine = moved(family, dtype), PairedEngine()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is None):
        assert equal(roll_out(engine, model), roll_out(PairedEngine(record=False), model))
    assert "called a synchronizing CUDA operation" in engine.recorder.obstacle
    assert fake_cuda.graphs == []
    assert fake_cuda.sync_debug_mode == 0
    assert torch.is_autocast_cache_enabled()


def test_families_without_a_static_cache_are_rolled_out(fake_cuda: FakeCuda) -> None:
    for family in FAMILIES:
        if family not in RECORDED:
            model = moved(family, torch.bfloat16)
            assert is_there(roll_out(AutoEngine(), model, length=4).sampled_ids)
