"""The bytes that a pass is said to hold, against those of the tensors that are alive while the real one runs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import nn

from remax_lightning.models.log_probs import response_statistics
from remax_lightning.rollout import GenerationRequest, PairedEngine, SamplingConfig
from remax_lightning.tools.plan.activation_memory import StepPasses, StepShape
from remax_lightning.tools.plan.memory_tracker import LiveBytes
from remax_lightning.types import PromptBatch, Responses

PROMPTS, PROMPT, RESPONSE = 8, 12, 20
SAMPLING = SamplingConfig(max_response_length=RESPONSE, min_response_length=RESPONSE)
FAMILIES = ["llama", "qwen2", "opt", "gpt2"]


def passes(model: Any, autocast: Any = nullcontext) -> StepPasses:
    return StepPasses(model, StepShape(PROMPTS, SAMPLING, PROMPT, 8, 8, 8), autocast, whole_logits=False)


def mixed() -> Any:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def rows() -> tuple[PromptBatch, Responses]:
    """Prompts and responses without padding, as the plan takes them."""
    ids, responses = torch.randint(5, 25, (PROMPTS, PROMPT)), torch.randint(5, 25, (PROMPTS, RESPONSE))
    mask, texts = torch.ones_like(responses, dtype=torch.bool), [""] * PROMPTS
    prompt = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), texts, [{}] * PROMPTS)
    return prompt, Responses(responses, mask, ~mask[:, 0], texts)


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
