"""The bytes that a pass is said to hold, against those of the tensors that are alive while the real one runs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import nn
from torch._subclasses import FakeTensorMode

from remax_lightning.errors import UserError
from remax_lightning.models.log_probs import policy_statistics, response_statistics, with_reference
from remax_lightning.models.sampling import NO_TOKENS, SuppressedTokens
from remax_lightning.rollout import GenerationRequest, PairedEngine, SamplingConfig
from remax_lightning.tools.plan.activation_memory import LiveBytes, StepPasses, StepShape, shapes_only
from remax_lightning.types import PromptBatch, Responses, Rollout

PROMPTS, PROMPT, RESPONSE = 8, 12, 20
SAMPLING = SamplingConfig(max_response_length=RESPONSE, min_response_length=RESPONSE)
FAMILIES = ["llama", "qwen2", "opt", "gpt2"]


def passes(model: Any, autocast: Any = nullcontext, suppressed: SuppressedTokens = NO_TOKENS) -> StepPasses:
    shape = StepShape(PROMPTS, SAMPLING, PROMPT, 8, 8, 8, suppressed=suppressed)
    return StepPasses(model, shape, autocast, whole_logits=False)


def mixed() -> Any:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def rows() -> tuple[PromptBatch, Responses]:
    """Prompts and responses without padding, as the plan takes them."""
    ids, responses = torch.randint(5, 25, (PROMPTS, PROMPT)), torch.randint(5, 25, (PROMPTS, RESPONSE))
    mask, texts = torch.ones_like(responses, dtype=torch.bool), [""] * PROMPTS
    prompt = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), texts, [{}] * PROMPTS)
    return prompt, Responses(responses, mask, ~mask[:, 0], texts)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [nullcontext, mixed], ids=["float32", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout(family: str, autocast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (prompt, _) = tiny_model(family).eval(), rows()
    copy = 2 * sum(each.weight.numel() for each in model.modules() if autocast is mixed and type(each) is nn.Linear)
    expected = passes(model, autocast).rollout(greedy=True)
    with LiveBytes([model]) as live, autocast():
        generator = torch.Generator().manual_seed(0)
        request = GenerationRequest(prompt.prompt_ids, prompt.prompt_mask, SAMPLING, [2], 0, generator)
        PairedEngine(cuda_graphs=False).generate(model, request)
    assert expected.cache + expected.working + copy == pytest.approx(live.peak, rel=0.1)


SUPPRESSED = SuppressedTokens((91, 92, 93, 94, 95), (2,), RESPONSE)


@pytest.mark.slow
def test_tokens_that_are_not_drawn_cost_masks_of_the_vocabulary() -> None:
    """Their logits are written anew at every token of a rollout, and masked in a pass: both as in the real ones."""
    model, (prompt, responses) = tiny_model("llama", vocab_size=5000).eval(), rows()
    expected = passes(model, suppressed=SUPPRESSED).rollout(greedy=True)
    with LiveBytes([model]) as live:
        generator = torch.Generator().manual_seed(0)
        request = GenerationRequest(
            prompt.prompt_ids, prompt.prompt_mask, SAMPLING, [2], 0, generator, unused_ids=SUPPRESSED.unused_ids
        )
        PairedEngine(cuda_graphs=False).generate(model, request)
    assert expected.cache + expected.working == pytest.approx(live.peak, rel=0.1)
    with LiveBytes([model]) as live, torch.no_grad():
        rollout = Rollout(prompt, responses, None, torch.zeros(PROMPTS), None, {}, None, None)
        policy_statistics(model.train(), rollout, SAMPLING, suppressed=SUPPRESSED)
    without, counted = passes(model).policy_scoring(), passes(model, suppressed=SUPPRESSED).policy_scoring()
    assert counted == pytest.approx(live.peak, rel=0.02)
    assert counted > without


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_pass(family: str, checkpointing: bool) -> None:
    model, (prompt, responses) = tiny_model(family).train(), rows()
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = passes(model).training()
    model.zero_grad(set_to_none=True)
    with LiveBytes([model]) as live:
        statistics = response_statistics(model, prompt, responses)
        forward = live.peak
        statistics.log_probs.sum().backward()
    assert expected.forward == pytest.approx(forward, rel=0.1)
    backward = max(moment.live + 4 * moment.stored for moment in expected.backward)
    assert max(expected.forward, backward) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_without_gradients(family: str) -> None:
    model, (prompt, responses) = tiny_model(family).eval(), rows()
    expected = passes(model).reference_scoring(model)
    with torch.no_grad(), LiveBytes([model]) as live:
        response_statistics(model, prompt, responses)
    assert expected == pytest.approx(live.peak, rel=0.1)


@pytest.mark.slow(0.3)
def test_the_policy_is_truncated_and_the_reference_is_not() -> None:
    """Also where both are one model, as under LoRA; top-p sorts, so a truncated pass takes more."""
    sampling = SamplingConfig(max_response_length=RESPONSE, top_p=0.9, processed_log_probs=True)
    model, (prompt, responses) = tiny_model("llama", vocab_size=4096).eval(), rows()
    rollout = Rollout(prompt, responses, None, torch.zeros(PROMPTS), None, {}, None, None)
    plan = StepPasses(model, StepShape(PROMPTS, sampling, PROMPT, 8, 8, 8), nullcontext, whole_logits=False)
    with torch.no_grad(), LiveBytes([model]) as live:
        policy_statistics(model, rollout, sampling)
        truncated = live.peak
    with torch.no_grad(), LiveBytes([model]) as live:
        with_reference(rollout, model, sampling)
        whole = live.peak
    assert truncated > 1.5 * whole
    assert plan.policy_scoring() == pytest.approx(truncated, rel=0.1)
    assert plan.reference_scoring(model) == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_makes_all_logits_itself(family: str) -> None:
    model, (prompt, responses) = tiny_model(family, vocab_size=4096).train(), rows()
    shape = StepShape(PROMPTS, SAMPLING, PROMPT, 8, 8, 8)
    expected = StepPasses(model, shape, nullcontext, whole_logits=True).training()
    model.zero_grad(set_to_none=True)
    model.register_forward_hook(lambda *_: None)  # hooks of the head must run, so it is not read apart
    with LiveBytes([model]) as live:
        statistics = response_statistics(model, prompt, responses)
    assert expected.forward == pytest.approx(live.peak, rel=0.1)
    assert expected.activations < expected.forward - statistics.log_probs.numel() * 4096 * 4


def test_a_rollout_of_one_token_has_no_decoding_step() -> None:
    model, (prompt, _) = tiny_model().eval(), rows()
    sampling = SamplingConfig(max_response_length=1)
    expected = StepPasses(model, StepShape(PROMPTS, sampling, PROMPT, 8, 8, 8), nullcontext, whole_logits=False)
    request = GenerationRequest(prompt.prompt_ids, prompt.prompt_mask, sampling, [2], 0, torch.Generator())
    with LiveBytes([model]) as live:
        PairedEngine(cuda_graphs=False).generate(model, request)
    count = expected.rollout(greedy=True)
    assert count.cache + count.working == pytest.approx(live.peak, rel=0.1)


def test_a_model_without_keys_and_values_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4))
    with pytest.raises(UserError, match=r"PairedEngine only, which cannot decode with a MambaForCausalLM"):
        passes(model).rollout(greedy=True)


def test_where_a_tensor_is_does_not_travel_through_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the calls of a plan ask for it."""
    reached: list[str] = []
    plain = FakeTensorMode.dispatch

    def dispatch(self: Any, func: Any, *arguments: Any, **options: Any) -> Any:
        reached.append(str(func))
        return plain(self, func, *arguments, **options)

    monkeypatch.setattr(FakeTensorMode, "dispatch", dispatch)
    with shapes_only(), LiveBytes():
        tensor = torch.empty(2)
        assert torch.ops.prim.device.default(tensor) == torch.device("cpu")
        _ = tensor + 1
    assert "aten.add.Tensor" in reached
    assert "prim.device.default" not in reached
