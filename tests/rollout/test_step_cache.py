"""Recorded steps: the same numbers as the model's own, from the weights as they are now, or else no recording."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model
from rollout.families import FAMILIES, Family, family_model
from torch import nn

from remax_lightning.rollout import GenerationRequest, PairedEngine, RolloutEngine, SamplingConfig
from remax_lightning.rollout import step_cache as recorded
from remax_lightning.rollout.step_cache import Recorder

EOS, PAD = 2, 3
IDS = torch.randint(5, 60, (4, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _record_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "RUNS_BEFORE", 3)


def roll_out(engine: RolloutEngine, model: Any, seed: int = 0, length: int = 40, ids: torch.Tensor = IDS) -> Any:
    request = GenerationRequest(
        prompt_ids=ids.to(model.device),
        prompt_mask=torch.ones_like(ids, dtype=torch.bool, device=model.device),
        sampling=SamplingConfig(max_response_length=length),
        eos_ids=[EOS],
        pad_id=PAD,
        generator=torch.Generator(model.device).manual_seed(seed),
        return_log_probs=True,
    )
    return engine.generate(model, request)


def equal(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


WITH_A_STATE = ("state space", "hybrid")
RECORDED = [family for family in FAMILIES if not any(kind in family.name for kind in WITH_A_STATE)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("family", RECORDED, ids=lambda family: family.name)
def test_replayed_rollouts_are_the_models_own_bit_for_bit(family: Family, dtype: torch.dtype | None) -> None:
    model = family_model(family, dtype or torch.float32, lora=dtype == torch.float32)
    engine, plain = PairedEngine(), PairedEngine(record=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        for seed in (0, 1, 0):
            assert equal(roll_out(engine, model, seed), roll_out(plain, model, seed))
    assert engine.recorder.obstacle == ""
    assert len(engine.recorder._replays) >= 2


def test_a_shape_is_recorded_when_it_comes_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "RUNS_BEFORE", 9)
    model, engine = tiny_model("llama"), PairedEngine()
    calls = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    roll_out(engine, model, length=10)
    assert len(calls) == 10  # the prompts, and a step for every token but the last
    roll_out(engine, model, length=10)
    assert len(calls) == 10 + 3  # the prompts; the step once to write it down, and once to compare
    roll_out(engine, model, length=10)
    assert len(calls) == 10 + 3 + 1


def test_replays_see_updates_of_the_weights() -> None:
    model, engine = tiny_model("llama"), PairedEngine()
    before = [roll_out(engine, model) for _ in range(3)][-1]
    assert engine.recorder._replays
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    after = roll_out(engine, model)
    assert engine.recorder._replays
    assert equal(after, roll_out(PairedEngine(record=False), model))
    assert not torch.equal(before.greedy_ids, after.greedy_ids)


def move(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.1


def test_weights_elsewhere_are_recorded_anew(caplog: pytest.LogCaptureFixture) -> None:
    model, engine = tiny_model("llama"), PairedEngine()
    for _ in range(3):
        move(model)
        with caplog.at_level("INFO"):
            moved = [roll_out(engine, model, length=6) for _ in range(2)]
        assert equal(moved[-1], roll_out(PairedEngine(record=False), model, length=6))
        assert engine.recorder._replays
    assert "not recorded" not in caplog.text


def test_weights_that_keep_moving_are_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    model, engine = tiny_model("llama"), PairedEngine()
    with caplog.at_level("INFO"):
        for moves in range(4):
            assert equal(roll_out(engine, model), roll_out(PairedEngine(record=False), model))
            assert bool(engine.recorder._replays) == (moves < 2)
            assert engine.recorder.lasts == (moves < 2)
            move(model)
    assert caplog.text.count("not recorded, since its weights lie elsewhere in every rollout") == 1


def test_a_model_with_hooks_is_run_itself(caplog: pytest.LogCaptureFixture) -> None:
    model, engine, seen = tiny_model("llama"), PairedEngine(), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    with caplog.at_level("INFO"):
        for _ in range(3):
            roll_out(engine, model, length=5)
    assert len(seen) == 15
    assert "decoding steps of LlamaForCausalLM are not recorded, since it has hooks" in caplog.text


def test_a_model_that_looks_at_its_values_is_run_itself(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = tiny_model("llama"), PairedEngine()
    plain = roll_out(PairedEngine(record=False), model)
    act = model.model.layers[0].mlp.act_fn
    monkeypatch.setattr(type(act), "forward", lambda self, x: nn.functional.silu(x) if x.sum() > -1e9 else x)
    with caplog.at_level("INFO"):
        found = [roll_out(engine, model) for _ in range(3)]
    assert all(equal(each, plain) for each in found)
    assert (
        "decoding steps of the policy are not recorded, since recording failed (RuntimeError: It appears" in caplog.text
    )


def test_an_adapter_that_is_switched_off_is_not_replayed() -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    engine = PairedEngine()
    on = [roll_out(engine, wrapped) for _ in range(3)][-1]
    assert engine.recorder._replays
    with wrapped.disable_adapter():
        off = roll_out(engine, wrapped)
        assert equal(off, roll_out(PairedEngine(record=False), wrapped))
    assert not equal(on, off)


def test_the_shape_unused_for_longest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST_SHAPES", 2)
    monkeypatch.setattr(recorded, "RUNS_BEFORE", 1)
    recorder, inputs = Recorder(), (torch.ones(2),)
    model = nn.Linear(1, 1)
    for _ in range(2):
        recorder.begin(model)
        for key in ("a", "b", "a", "c"):
            recorder.run(key, lambda x: x + 1, inputs)
    assert list(recorder._replays) == ["a", "c"]


# CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_slots", [True, False])
def test_cuda_graphs_write_what_the_model_writes(dtype: torch.dtype, keep_slots: bool) -> None:
    model = tiny_model("llama").to("cuda", dtype)
    engine, plain = PairedEngine(keep_slots=keep_slots), PairedEngine(record=False)
    for seed in (0, 1, 0):
        assert equal(roll_out(engine, model, seed), roll_out(plain, model, seed))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    assert engine.recorder.obstacle == ""
    assert bool(engine.recorder._replays) == keep_slots
