"""`response_statistics` against one response at a time, without padding, in double precision."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from remax_lightning.batch import PromptBatch, Responses
from remax_lightning.modules.statistics import response_statistics

FAMILIES = ("llama", "qwen2", "gpt2", "opt")
PROMPTS = [[1, 5, 6], [1, 9, 8, 7, 30, 31], [40]]
RESPONSES = [[10, 11, 12, 2], [2], [13, 14], [15, 16, 17, 18, 19], [2], [20, 3, 21, 2]]  # two to a prompt
PAD = 3


def batch(extra_left: int = 0, extra_right: int = 0, pad: int = PAD) -> tuple[PromptBatch, Responses]:
    left = max(map(len, PROMPTS)) + extra_left
    right = max(map(len, RESPONSES)) + extra_right
    prompt_ids = torch.tensor([[pad] * (left - len(ids)) + ids for ids in PROMPTS])
    prompt_mask = torch.tensor([[False] * (left - len(ids)) + [True] * len(ids) for ids in PROMPTS])
    ids = torch.tensor([ids + [pad] * (right - len(ids)) for ids in RESPONSES])
    mask = torch.tensor([[True] * len(ids) + [False] * (right - len(ids)) for ids in RESPONSES])
    prompt = PromptBatch(prompt_ids, prompt_mask, [""] * len(PROMPTS), [{}] * len(PROMPTS))
    return prompt, Responses(ids, mask, torch.zeros(len(RESPONSES), dtype=torch.bool), [""] * len(RESPONSES))


def one_by_one(model: Any, temperature: float) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probs and entropies, token by token."""
    double = copy.deepcopy(model).double()
    log_probs, entropies = [], []
    for i, response in enumerate(RESPONSES):
        prompt = PROMPTS[i // 2]
        with torch.no_grad():
            logits = double(input_ids=torch.tensor([prompt + response])).logits[0].double()
        log_probs.append([])
        entropies.append([])
        for t, token in enumerate(response):
            scaled = [value / temperature for value in logits[len(prompt) + t - 1].tolist()]
            highest = max(scaled)
            log_total = highest + math.log(math.fsum(math.exp(value - highest) for value in scaled))
            log_probs[-1].append(scaled[token] - log_total)
            entropies[-1].append(-math.fsum(math.exp(v - log_total) * (v - log_total) for v in scaled))
    return log_probs, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_single_unpadded_rows(family: str, temperature: float) -> None:
    model = tiny_model(family)
    found = response_statistics(model, *batch(), temperature)
    for values, expected in zip(found, one_by_one(model, temperature), strict=True):
        assert values.shape == (6, 5)
        for row, wanted in zip(values.tolist(), expected, strict=True):
            assert row[: len(wanted)] == pytest.approx(wanted, abs=2e-5)
            assert row[len(wanted) :] == [0.0] * (5 - len(wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    plain = response_statistics(model, *batch())
    padded = response_statistics(model, *batch(extra_left=7, extra_right=4, pad=2))  # 2 is the end of sequence
    for before, after in zip(plain, padded, strict=True):
        assert after.shape == (6, 9)
        torch.testing.assert_close(after, F.pad(before, (0, 4)), atol=1e-6, rtol=0)


def test_logits_are_made_at_response_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    positions: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: positions.append(output.shape[1]))
    response_statistics(model, *batch(extra_left=20, extra_right=20))
    assert positions == [6]  # the longest response has five tokens; one more predicts the first


def test_gradient_comes_from_the_log_probs_of_counted_tokens_only() -> None:
    model = tiny_model("gpt2")
    prompt, responses = batch()
    statistics = response_statistics(model, prompt, responses)
    assert not statistics.entropy.requires_grad
    outside = ~responses.response_mask
    gradient = torch.autograd.grad(statistics.log_probs[outside].sum(), model.lm_head.weight, allow_unused=True)[0]
    assert gradient is None or float(gradient.abs().max()) == 0
