"""Importance weights: against an oracle written as loops, and against the exact gradient, by enumeration."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import pytest
import torch
from oracles import enumeration as exact
from torch import Tensor

from remax_lightning.functional import (
    clipped_surrogate_loss,
    kl_loss,
    mismatch_weights,
    reinforce_loss,
    remax_advantages,
    response_mask,
    token_statistics,
)

RESPONSES, PREFIXES = exact.responses(), exact.prefixes()


def log_probs_of(table: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and mask `[15, 3]` of all responses."""
    rows = [[*response, *[exact.EOS] * (exact.MAX_LENGTH - len(response))] for response in RESPONSES]
    ids = torch.tensor(rows)
    logits = torch.stack(
        [torch.stack([table[PREFIXES.index(row[:t]) if row[:t] in PREFIXES else 0] for t in range(exact.MAX_LENGTH)])
         for row in RESPONSES]
    )  # fmt: skip
    return token_statistics(logits, ids).log_probs, response_mask(ids, [exact.EOS])


class Problem:
    """A policy, an engine that draws from a perturbed one, and a reward."""

    def __init__(self, seed: int, noise: float = 0.4) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table, difference = torch.randn(2, len(PREFIXES), exact.VOCABULARY, generator=generator).double()
        self.engine = self.table + noise * difference
        self.reward = 2 * torch.randn(len(RESPONSES), generator=generator).double() + 1

    @cached_property
    def exact_gradient(self) -> Tensor:
        reward = dict(zip(RESPONSES, self.reward.tolist(), strict=True))
        return exact.exact_gradient(self.table, reward, self.table, beta=0.0)

    def expected_gradient(self, loss: str = "reinforce", baseline: str = "greedy", **options: Any) -> Tensor:
        """The mean gradient over the engine's responses; its greedy response is the baseline."""
        table = self.table.clone().requires_grad_()
        log_probs, mask = log_probs_of(table)
        engine, _ = log_probs_of(self.engine)
        drawn = torch.where(mask, engine, 0.0).sum(-1).exp()  # [15], probability of a response
        greedy = self.reward[RESPONSES.index(exact.greedy_response(self.engine))]
        baselines = {"baseline_reward": greedy.expand(len(RESPONSES))} if baseline == "greedy" else {}
        advantages = remax_advantages(self.reward, mask, baseline=baseline, **baselines)
        weights = mismatch_weights(log_probs, engine, mask, **({"kind": "none"} | options)).weights
        advantages = advantages * weights * drawn[:, None]
        if loss == "reinforce":
            value = reinforce_loss(log_probs, advantages, mask, 1.0)
        else:
            value = clipped_surrogate_loss(log_probs, log_probs.detach(), advantages, mask, 1.0).loss
        return torch.autograd.grad(-value, table)[0]

    def bias(self, **options: Any) -> float:
        """The distance of the mean gradient from the exact one, relative to the exact one."""
        exact_gradient = self.exact_gradient
        return float((self.expected_gradient(**options) - exact_gradient).norm() / exact_gradient.norm())


@pytest.mark.parametrize("baseline", ["greedy", "none"])
@pytest.mark.parametrize("loss", ["reinforce", "clipped"])
@pytest.mark.parametrize("seed", range(3))
def test_untruncated_ratios_of_responses_give_the_exact_gradient(seed: int, loss: str, baseline: str) -> None:
    """The baseline is the reward of the engine's own greedy response, and takes no ratio."""
    problem = Problem(seed)
    actual = problem.expected_gradient(loss, baseline, kind="tis", level="response", cap=None)
    torch.testing.assert_close(actual, problem.exact_gradient, rtol=1e-6, atol=1e-9)
    uncorrected = problem.expected_gradient(loss, baseline)
    assert (uncorrected - problem.exact_gradient).abs().max() > 1e-2


MEASURED = {
    "none": 0.438,
    "tokens": 0.201,
    "tokens, cap 2": 0.214,
    "tokens, band": 0.229,
    "responses": 0.0,
    "responses, cap 2": 0.075,
    "responses, band": 0.077,
}


@pytest.mark.slow
def test_what_is_cut_biases_the_gradient_less_than_no_correction() -> None:
    """The table of docs/algorithm.md: means over 20 policies."""
    problems = [Problem(seed) for seed in range(20)]
    options: dict[str, dict[str, Any]] = {
        "none": {"kind": "none"},
        "tokens": {"kind": "tis", "cap": None},
        "tokens, cap 2": {"kind": "tis"},
        "tokens, band": {"kind": "mis"},
        "responses": {"kind": "tis", "level": "response", "cap": None},
        "responses, cap 2": {"kind": "tis", "level": "response"},
        "responses, band": {"kind": "mis", "level": "response"},
    }
    bias = {
        name: sum(problem.bias(**option) for problem in problems) / len(problems) for name, option in options.items()
    }
    assert bias == pytest.approx(MEASURED, abs=5e-4)
    assert bias["responses, cap 2"] < bias["tokens, cap 2"] < bias["none"]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_weighted_kl_loss_is_that_of_the_policy(estimator: Any) -> None:
    problem = Problem(0)
    reference = problem.table.roll(1, 0)
    gradients = []
    for drawn_by in (problem.table, problem.engine):
        table = problem.table.clone().requires_grad_()
        (log_probs, mask), (theirs, _), (other, _) = map(log_probs_of, (table, drawn_by, reference))
        weights = mismatch_weights(log_probs, theirs, mask, "tis", "response", None).weights
        probability = torch.where(mask, theirs, 0.0).sum(-1).exp()
        loss = sum(
            probability[i] * kl_loss(log_probs[i : i + 1] - other[i : i + 1], mask[i : i + 1], 1.0, estimator,
                                     weights=weights[i : i + 1])
            for i in range(len(RESPONSES))
        )  # fmt: skip
        gradients.append(torch.autograd.grad(loss, table)[0])
    assert gradients[0].abs().max() > 1e-2
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-9)


def oracle(
    ours: list[float], theirs: list[float], kind: str, level: str, cap: float | None, band: tuple[float, float]
) -> tuple[list[float], list[float], list[bool]]:
    """Weights, ratios and cuts of one response without padding."""
    ratios = [math.exp(a - b) for a, b in zip(ours, theirs, strict=True)]
    if level == "response":
        ratios = [math.prod(ratios)] * len(ratios)
    weights = []
    for ratio in ratios:
        if kind == "none":
            weights.append(1.0)
        elif kind == "tis":
            weights.append(ratio if cap is None else min(ratio, cap))
        else:
            weights.append(ratio if band[0] <= ratio <= band[1] else 0.0)
    cuts = [kind != "none" and weight != ratio for weight, ratio in zip(weights, ratios, strict=True)]
    return weights, ratios, cuts


@pytest.mark.parametrize("level", ["token", "response"])
@pytest.mark.parametrize(
    ("kind", "cap", "band"),
    [("none", 2.0, (0.5, 5.0)), ("tis", None, (0.5, 5.0)), ("tis", 1.2, (0.5, 5.0)), ("mis", 2.0, (0.8, 1.3))],
)
def test_weights_are_those_of_the_oracle(kind: Any, level: Any, cap: float | None, band: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = -torch.rand(5, 8, generator=generator).double()
    theirs = ours + 0.3 * torch.randn(5, 8, generator=generator).double()
    lengths = [8, 3, 0, 1, 6]
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    garbage = torch.where(mask, theirs, float("nan"))
    weights, ratio, cut = mismatch_weights(ours.requires_grad_(), garbage, mask, kind, level, cap, band)
    assert not weights.requires_grad
    assert not ratio.requires_grad
    for row, length in enumerate(lengths):
        parts = (ours[row, :length].tolist(), theirs[row, :length].tolist())
        expected = oracle(*parts, kind, level, cap, band)
        assert weights[row, :length].tolist() == pytest.approx(expected[0])
        assert ratio[row, :length].tolist() == pytest.approx(expected[1])
        assert cut[row, :length].tolist() == expected[2]
    assert (weights[~mask] == 1).all()
    assert not cut[~mask].any()
    assert cut.any() == (kind != "none" and (kind == "mis" or cap is not None))


def test_a_ratio_beyond_all_bounds_stays_finite() -> None:
    mask = torch.ones(1, 400, dtype=torch.bool)
    far = torch.full((1, 400), -5.0)
    weights = mismatch_weights(torch.zeros(1, 400), far, mask, "tis", "response", None).weights
    assert weights.isfinite().all()
    assert mismatch_weights(torch.zeros(1, 400), far, mask, "mis", "response").weights.sum() == 0


@pytest.mark.parametrize("options", [{"kind": "truncated"}, {"kind": "tis", "level": "word"}])
def test_an_unknown_choice_is_refused(options: Any) -> None:
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match="must be one of"):
        mismatch_weights(ones, ones, ones.bool(), **options)
