"""Rollouts as CUDA graphs on a fake CUDA device: their memory, their lifetime, and no waiting for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from fake_cuda import FakeCuda, Graph, is_there
from rollout.families import FAMILIES, Family, family_model
from torch import nn

from remax_lightning.errors import UserError
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.models.forward import choose_attention_kernels
from remax_lightning.rollout import (
    AutoEngine,
    GenerationRequest,
    HuggingFaceEngine,
    PairedEngine,
    RolloutEngine,
    SamplingConfig,
    cuda_graph,
)
from remax_lightning.rollout.cuda_graph import CastLinear, StepCache

pytestmark = pytest.mark.slow  # on the fake device every replay runs the whole step

EOS, PAD = 2, 3
IDS = torch.randint(5, 60, (4, 7), generator=torch.Generator().manual_seed(0))


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
    model, engine, plain = moved(family, dtype), PairedEngine(), PairedEngine(cuda_graphs=False)
    for seed in (0, 1):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is None):
            written, expected = (roll_out(either, model, seed, length=28) for either in (engine, plain))
        assert equal(written, expected)
        assert is_there(written.sampled_ids)
        train(model)
    assert engine._step_cache.why_unsupported == ""
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


def test_one_graph_of_a_rollout_waits_for_the_device(fake_cuda: FakeCuda) -> None:
    """`torch.cuda.graph` would at each of them, and free the allocator's cache."""
    model = tiny_model("llama").to("cuda")
    fake_cuda.calls.clear()
    roll_out(PairedEngine(), model)
    assert len(fake_cuda.graphs) == 3
    assert (fake_cuda.calls["synchronize"], fake_cuda.calls["empty_cache"]) == (1, 1)


def as_trained(policy_path: Path, how: str) -> Any:
    """A policy as a run loads it, with the hooks that its way of training leaves on it."""
    lora = LoRAConfig(r=2) if "adapter" in how else None
    model = ModelConfig(str(policy_path), gradient_checkpointing="checkpointing" in how, lora=lora).load("model.policy")
    if how == "asked for gradients of inputs":
        model.enable_input_require_grads()
    if how == "asked for hidden states":
        model.eval()(IDS, output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.modules()) == (how != "adapter")
    return model.to("cuda").eval()


@pytest.mark.parametrize(
    "how",
    [
        "checkpointing",
        "adapter",
        "adapter and checkpointing",
        "asked for gradients of inputs",
        "asked for hidden states",
    ],
)
def test_hooks_that_do_nothing_in_a_rollout_leave_graphs_on(how: str, policy_path: Path, fake_cuda: FakeCuda) -> None:
    model, engine = as_trained(policy_path, how), PairedEngine()
    plain = roll_out(PairedEngine(cuda_graphs=False), model)
    assert all(equal(roll_out(engine, model), plain) for _ in range(2))
    assert len(fake_cuda.graphs) == 3
    assert sum(graph.replays for graph in fake_cuda.graphs) == 2 * 39


@pytest.mark.parametrize("failures", [1, 3])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a library not ready")])
def test_a_capture_that_fails_once_is_tried_in_the_next_rollout(
    error: Exception,
    failures: int,
    fake_cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, engine, left, begin = tiny_model("llama").to("cuda"), PairedEngine(), [error] * failures, Graph.capture_begin
    plain = roll_out(PairedEngine(cuda_graphs=False), model)

    def fail(graph: Graph, *arguments: Any, **options: Any) -> None:
        if left:
            raise left.pop()
        begin(graph, *arguments, **options)

    monkeypatch.setattr(Graph, "capture_begin", fail)
    with caplog.at_level("INFO"):
        assert equal(roll_out(engine, model), plain)
    assert len(fake_cuda.graphs) == 3 - failures
    assert caplog.text.count(str(error)) == 1  # however many shapes
    assert equal(roll_out(engine, model), plain)
    assert len(fake_cuda.graphs) == 3
    assert all(graph.replays for graph in fake_cuda.graphs)


def test_graphs_end_with_the_slots_that_they_read(fake_cuda: FakeCuda) -> None:
    model, engine = tiny_model("llama").to("cuda"), PairedEngine(keep_cache=False)
    for seed in (0, 1):
        assert equal(roll_out(engine, model, seed), roll_out(PairedEngine(cuda_graphs=False), model, seed))
        train(model)
        assert not engine._step_cache._graphs
    assert [graph.pool_given is None for graph in fake_cuda.graphs] == 2 * [True, False, False]


def test_all_captures_of_an_engine_are_on_one_stream(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS keeps a workspace, 32 MiB on recent GPUs, for every stream that it has seen."""
    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made.append("stream") or "another")
    model, engine = tiny_model("llama").to("cuda"), PairedEngine(keep_cache=False)
    for seed in (0, 1):
        roll_out(engine, model, seed)
    assert len(fake_cuda.graphs) == 6
    assert made == ["stream"]


@pytest.mark.parametrize("mixed", [False, True])
def test_graphs_of_weights_that_keep_moving_are_of_one_rollout(mixed: bool, fake_cuda: FakeCuda) -> None:
    model, engine, kept = tiny_model("llama").to("cuda"), PairedEngine(), []
    for seed in range(5):
        before = sum(graph.replays for graph in fake_cuda.graphs)
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            assert equal(roll_out(engine, model, seed), roll_out(PairedEngine(cuda_graphs=False), model, seed))
        assert sum(graph.replays for graph in fake_cuda.graphs) - before == 39  # one for every token but the last
        kept.append(engine._buffers is not None)
        assert bool(engine._step_cache._graphs) == bool(engine._buffers)
        if seed < 3:
            move(model)
    assert kept == [True, True, False, False, True]  # from the second move in a row on, until they stay where they are
    assert len(fake_cuda.graphs) == 3 * 5
    assert engine._step_cache.why_unsupported == ""


@pytest.mark.parametrize("mixed", [False, True])
def test_weights_that_are_gathered_leave_no_graphs(
    mixed: bool, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3's are known by their ids before they have moved: the step after the first rollout needs the memory."""
    model, engine, cast = tiny_model("llama").to("cuda"), PairedEngine(), []
    for parameter in model.parameters():
        parameter.ds_id = 0

    def counted(self: CastLinear, layer: Any, dtype: torch.dtype, make: Any = CastLinear.__init__) -> None:
        cast.append(layer)
        make(self, layer, dtype)

    monkeypatch.setattr(CastLinear, "__init__", counted)
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        plain = roll_out(PairedEngine(cuda_graphs=False), model)
        cast.clear()
        for _ in range(2):
            assert equal(roll_out(engine, model), plain)
            assert engine._buffers is None
            assert not engine._step_cache._graphs
    assert len(fake_cuda.graphs) == 2 * 3
    assert sum(graph.replays for graph in fake_cuda.graphs) == 2 * 39
    assert len(cast) == 2 * mixed * len([each for each in model.modules() if type(each) is nn.Linear])  # no token's own


def test_longer_responses_ask_for_new_slots_and_new_graphs(fake_cuda: FakeCuda) -> None:
    model, engine, plain = tiny_model("llama").to("cuda"), PairedEngine(), PairedEngine(cuda_graphs=False)
    for length in (20, 60, 20):
        assert equal(roll_out(engine, model, length=length), roll_out(plain, model, length=length))
        train(model)
    assert engine._step_cache.why_unsupported == ""


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("log_probs", [True, False])
def test_the_host_waits_at_looks_only(log_probs: bool, cuda_graphs: bool, fake_cuda: FakeCuda) -> None:
    model, engine = tiny_model("llama").to("cuda"), PairedEngine(cuda_graphs=cuda_graphs)
    prompts, mask = IDS.to("cuda"), torch.ones_like(IDS, dtype=torch.bool, device="cuda")
    roll_out(engine, model)
    fake_cuda.reads.clear()
    sampling = SamplingConfig(max_response_length=40, min_response_length=2, top_p=0.9, top_k=5)
    chance = torch.Generator("cuda").manual_seed(0)
    request = GenerationRequest(prompts, mask, sampling, [95], PAD, chance, return_log_probs=log_probs)
    assert engine.generate(model, request).sampled_ids.shape == (4, 40)
    # The ids that end a response are copied there once. The prefill asks whether any prompt is padded; after 16 and 32
    # tokens ended rows are counted, and at the end the logits are checked.
    assert fake_cuda.reads == {"from the host": 1, "_local_scalar_dense": 1 + 2 + 1}


@pytest.mark.parametrize("length", [4, 40])
@pytest.mark.parametrize("engine", [PairedEngine, HuggingFaceEngine])
def test_logits_that_are_not_finite_end_a_rollout(engine: Any, length: int, fake_cuda: FakeCuda) -> None:
    model = tiny_model("llama").to("cuda")
    assert roll_out(engine(), model, length=length)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(UserError, match=r"model\.policy: the logits of \d+ of \d+ responses are not finite"):
        roll_out(engine(), model, length=length)


@pytest.mark.parametrize("at", [0, 2, 17, 38])
def test_one_infinite_logit_among_many_tokens_ends_a_rollout(at: int, fake_cuda: FakeCuda) -> None:
    """It is nowhere in the cache, so nothing that follows shows it."""
    model, calls = tiny_model("llama").to("cuda"), iter(range(-1, 1000))  # the prefill comes first

    def spoil(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([7], device="cuda"), torch.inf) if next(calls) == at else logits

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(UserError, match=r"model\.policy: the logits of \d+ of \d+ responses are not finite"):
        roll_out(PairedEngine(cuda_graphs=False), model, length=40)


@pytest.mark.parametrize("mixed", [False, True])
def test_training_follows_a_validation_in_inference_mode(mixed: bool, fake_cuda: FakeCuda) -> None:
    model, engine, plain = tiny_model("llama").to("cuda"), PairedEngine(), PairedEngine(cuda_graphs=False)
    for inference in (True, False, True):
        with torch.inference_mode(inference), torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            assert equal(roll_out(engine, model), roll_out(plain, model))
        train(model)


def test_more_prompts_ask_for_new_slots_and_fewer_for_none(fake_cuda: FakeCuda) -> None:
    model, engine, plain = tiny_model("llama").to("cuda"), PairedEngine(), PairedEngine(cuda_graphs=False)
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
        assert equal(roll_out(engine, model), roll_out(PairedEngine(cuda_graphs=False), model))
    assert "called a synchronizing CUDA operation" in engine._step_cache.why_unsupported
    assert fake_cuda.graphs == []
    assert fake_cuda.sync_debug_mode == 0
    assert torch.is_autocast_cache_enabled()


def test_families_without_a_static_cache_are_rolled_out(fake_cuda: FakeCuda) -> None:
    for family in FAMILIES:
        if family not in RECORDED:
            model = moved(family, torch.bfloat16)
            assert is_there(roll_out(AutoEngine(), model, length=4).sampled_ids)


def move(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.1


# What is not captured, or captured anew


def test_weights_elsewhere_are_captured_anew(fake_cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    model, engine = tiny_model("llama").to("cuda"), PairedEngine()
    for _ in range(3):
        move(model)
        with caplog.at_level("INFO"):
            moved = [roll_out(engine, model, length=6) for _ in range(2)]
        assert equal(moved[-1], roll_out(PairedEngine(cuda_graphs=False), model, length=6))
        assert engine._step_cache._graphs
    assert "not captured" not in caplog.text


def test_a_model_with_hooks_is_run_itself(fake_cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    model, engine, seen = tiny_model("llama").to("cuda"), PairedEngine(), []
    hook = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    with caplog.at_level("INFO"):
        for _ in range(3):
            roll_out(engine, model, length=5)
    assert len(seen) == 15
    assert "decoding steps of LlamaForCausalLM are not captured as CUDA graphs, since it has hooks" in caplog.text
    assert caplog.text.count("not captured") == 1
    hook.remove()
    roll_out(engine, model, length=5)
    assert len(fake_cuda.graphs) == 1


def test_a_model_that_looks_at_its_values_is_run_itself(
    fake_cuda: FakeCuda, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = tiny_model("llama").to("cuda"), PairedEngine()
    plain = roll_out(PairedEngine(cuda_graphs=False), model)
    act = model.model.layers[0].mlp.act_fn
    monkeypatch.setattr(type(act), "forward", lambda self, x: nn.functional.silu(x) if x.sum() > -1e9 else x)
    with caplog.at_level("INFO"):
        outputs = [roll_out(engine, model) for _ in range(3)]
    assert all(equal(output, plain) for output in outputs)
    assert "decoding steps of the policy are not captured as CUDA graphs, since capture failed" in caplog.text


def test_an_adapter_that_is_switched_off_is_not_replayed(fake_cuda: FakeCuda) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = get_peft_model(tiny_model("llama"), config).to("cuda")
    engine = PairedEngine()
    on = [roll_out(engine, wrapped) for _ in range(2)][-1]
    assert engine._step_cache._graphs
    with wrapped.disable_adapter():
        off = roll_out(engine, wrapped)
        assert equal(off, roll_out(PairedEngine(cuda_graphs=False), wrapped))
    assert not equal(on, off)


def test_the_least_recently_used_graph_is_dropped(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "MAX_GRAPHS", 2)
    cache, inputs = StepCache(), (torch.ones(2, device="cuda"),)
    cache.begin(nn.Linear(1, 1).to("cuda"))
    for key in ("a", "b", "a", "c"):
        cache.run(key, lambda x: x + 1, inputs)
    assert list(cache._graphs) == ["a", "c"]


def test_on_a_cpu_every_step_runs_itself() -> None:
    model, engine = tiny_model("llama"), PairedEngine()
    assert equal(roll_out(engine, model), roll_out(PairedEngine(cuda_graphs=False), model))
    assert not engine._step_cache._graphs
    assert engine._buffers is None


# On a real device

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@NEEDS_CUDA
def test_a_checkpointed_policy_is_captured(policy_path: Path) -> None:
    model, engine = as_trained(policy_path, "checkpointing"), PairedEngine()
    for _ in range(2):
        assert equal(roll_out(engine, model), roll_out(PairedEngine(cuda_graphs=False), model))
    assert engine.num_graphs == 3


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("length", [320, 512])
def test_gradients_of_padded_rows_are_finite_with_the_kernels_of_a_run(length: int) -> None:
    """cuDNN's are not where the length modulo 128 is 64 (pytorch#196678)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=96)).to("cuda", torch.bfloat16)
    ids = torch.randint(5, 60, (4, length), device="cuda")
    mask = torch.arange(length, device="cuda") >= torch.tensor([[0], [7], [100], [250]], device="cuda")
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        choose_attention_kernels(torch.device("cuda"), cudnn=False)
        model(ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100)).loss.backward()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)
    assert all(bool(weight.grad.isfinite().all()) for weight in model.parameters())


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_cache", [True, False])
def test_cuda_graphs_write_what_the_model_writes(dtype: torch.dtype, keep_cache: bool) -> None:
    model = tiny_model("llama").to("cuda", dtype)
    engine, plain = PairedEngine(keep_cache=keep_cache), PairedEngine(cuda_graphs=False)
    for seed in (0, 1, 0):
        assert equal(roll_out(engine, model, seed), roll_out(plain, model, seed))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    assert engine._step_cache.why_unsupported == ""
    assert bool(engine._step_cache._graphs) == keep_cache
