"""Baselines against enumeration: all draws of a few responses to a few prompts, in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from remax_lightning.functional import (
    baseline_values,
    batch_mean,
    calibrated_greedy,
    greedy_and_samples,
    optimal_per_token,
    shrinkage,
)

ANSWERS = 3


class Bandit:
    """`B` prompts with three answers each: a softmax policy, and a reward per answer."""

    def __init__(self, num_prompts: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(num_prompts, ANSWERS, generator=generator, dtype=torch.float64)
        self.rewards = 5 + 3 * torch.randn(num_prompts, ANSWERS, generator=generator, dtype=torch.float64)

    @property
    def greedy_reward(self) -> Tensor:
        return self.rewards.gather(1, self.logits.argmax(1, keepdim=True)).squeeze(1)

    def exact_gradient(self) -> Tensor:
        """Of the mean expected reward of the prompts."""
        logits = self.logits.clone().requires_grad_()
        objective = (logits.softmax(1) * self.rewards).sum(1).mean()
        return torch.autograd.grad(objective, logits)[0]

    def expected_gradient(self, num_samples: int, baseline: Callable[[Tensor], Tensor]) -> Tensor:
        """Of the estimator with a baseline, `baseline(reward [S]) -> [S]`, over all draws."""
        probs = self.logits.softmax(1)
        num_prompts = len(probs)
        prompt = torch.arange(num_prompts).repeat_interleave(num_samples)
        total = torch.zeros_like(probs)
        for draw in product(range(ANSWERS), repeat=num_prompts * num_samples):
            answers = torch.tensor(draw)
            reward = self.rewards[prompt, answers]
            score = torch.nn.functional.one_hot(answers, ANSWERS) - probs[prompt]  # d log pi / d logits
            estimate = (reward - baseline(reward))[:, None] * score / len(draw)
            total.index_add_(0, prompt, estimate * probs[prompt, answers].prod())
        return total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_prompts", "num_samples"), [(3, 1), (2, 1), (1, 1), (3, 2), (1, 2)], ids=lambda number: str(number)
)
def test_the_gradient_stays_unbiased(num_prompts: int, num_samples: int) -> None:
    bandit = Bandit(num_prompts, seed=num_prompts)
    greedy, exact = bandit.greedy_reward, bandit.exact_gradient()
    weights = torch.rand(num_prompts * num_samples, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    baselines: dict[str, Callable[[Tensor], Tensor]] = {
        "batch_mean": batch_mean,
        "weighted": lambda reward: batch_mean(reward, weights),
        "greedy_and_samples": lambda reward: greedy_and_samples(reward, num_samples, greedy),
        "calibrated_greedy": lambda reward: calibrated_greedy(reward, num_samples, greedy),
        "calibrated_without_ridge": lambda reward: calibrated_greedy(reward, num_samples, greedy, ridge=0.0),
    }
    if num_samples > 1:
        baselines["shrinkage"] = lambda reward: shrinkage(reward, num_samples)
    for name, baseline in baselines.items():
        gradient = bandit.expected_gradient(num_samples, baseline)
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-12, msg=name)


def test_the_enumeration_sees_a_bias() -> None:
    bandit = Bandit(3, seed=0)
    biased = bandit.expected_gradient(1, lambda reward: reward.mean().expand_as(reward))  # reads its own reward
    torch.testing.assert_close(biased, bandit.exact_gradient() * 2 / 3)


# Values, by the formulas written out


def loops(reward: np.ndarray, num_samples: int, greedy: np.ndarray, ridge: float) -> dict[str, list[float]]:
    """Each baseline response by response, with NumPy's own least squares."""
    group = reward.reshape(-1, num_samples)
    found: dict[str, list[float]] = {"calibrated_greedy": [], "shrinkage": [], "greedy_and_samples": []}
    for i in range(len(group)):
        others = [k for k in range(len(group)) if k != i]
        mean, g = group[others].mean(1), greedy[others]
        # A ridge of k prompts: rows (sqrt(k) spread, 0) without an intercept, so on centered data.
        x = np.append(g - g.mean(), np.sqrt(ridge) * greedy.std())
        slope = np.linalg.lstsq(x[:, None], np.append(mean - mean.mean(), 0.0), rcond=None)[0][0]
        within = group[others].var(1, ddof=1).mean() if num_samples > 1 else 0.0
        between = max(mean.var(ddof=1) - within / num_samples, 0.0)
        share = within / (num_samples - 1) / (within / (num_samples - 1) + between) if num_samples > 1 else 0.0
        for j in range(num_samples):
            siblings = np.delete(group[i], j)
            found["calibrated_greedy"].append(mean.mean() + slope * (greedy[i] - g.mean()))
            found["greedy_and_samples"].append((greedy[i] + siblings.sum()) / num_samples)
            if num_samples > 1:
                found["shrinkage"].append((1 - share) * siblings.mean() + share * mean.mean())
    return found


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize(("num_prompts", "num_samples", "ridge"), [(5, 3, 1.0), (4, 2, 0.0), (7, 1, 2.5)])
def test_values_are_those_of_the_formulas(num_prompts: int, num_samples: int, ridge: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(num_prompts)
    greedy = torch.randn(num_prompts, generator=generator, dtype=torch.float64) + offset
    noise = torch.randn(num_prompts * num_samples, generator=generator, dtype=torch.float64)
    reward = 0.7 * greedy.repeat_interleave(num_samples) + 0.3 * noise
    expected = loops(reward.numpy(), num_samples, greedy.numpy(), ridge)
    actual = {
        "calibrated_greedy": calibrated_greedy(reward, num_samples, greedy, ridge),
        "greedy_and_samples": greedy_and_samples(reward, num_samples, greedy),
    }
    if num_samples > 1:
        actual["shrinkage"] = shrinkage(reward, num_samples)
    for name, values in actual.items():
        torch.testing.assert_close(values - offset, torch.tensor(expected[name]) - offset, rtol=1e-7, atol=1e-8)


def test_means_of_others() -> None:
    reward, weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 3.0, 2.0])
    assert batch_mean(reward).tolist() == pytest.approx([4.0, 3.5, 1.5])
    assert batch_mean(reward, weights).tolist() == pytest.approx([18 / 5, 13 / 3, 7 / 4])
    assert batch_mean(torch.tensor([3.0])).tolist() == [0.0]  # nothing to compare with
    # The others weigh nothing: their plain mean, for that response.
    assert batch_mean(reward, torch.tensor([0.0, 0.0, 2.0])).tolist() == pytest.approx([6.0, 6.0, 1.5])
    assert batch_mean(reward, torch.zeros(3)).tolist() == pytest.approx([4.0, 3.5, 1.5])


def test_means_of_others_token_by_token() -> None:
    reward = torch.tensor([1.0, 2.0, 6.0])
    norms = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 2.0]])  # sums: 1, 1 / 1, 3 / 0, 2
    expected = [[2.0, (2 * 3 + 6 * 2) / 5], [1.0, (1 + 6 * 2) / 3], [1.5, (1 + 2 * 3) / 4]]
    for actual, values in zip(optimal_per_token(reward, norms).tolist(), expected, strict=True):
        assert actual == pytest.approx(values)
    assert optimal_per_token(torch.tensor([3.0]), torch.ones(1, 2)).tolist() == [[0.0, 0.0]]
    assert optimal_per_token(reward, torch.zeros(3, 1)).flatten().tolist() == batch_mean(reward).tolist()


def test_a_greedy_reward_that_says_nothing_is_left_out() -> None:
    reward = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    assert calibrated_greedy(reward, 1, torch.ones(5)).tolist() == pytest.approx(batch_mean(reward).tolist())
    large = torch.full((5,), 1e6 + 0.1, dtype=torch.float64)  # whose mean is rounded
    assert calibrated_greedy(reward, 1, large).tolist() == pytest.approx(batch_mean(reward).tolist())
    assert calibrated_greedy(torch.tensor([2.0]), 1, torch.tensor([5.0])).tolist() == [0.0]


def test_a_greedy_reward_that_says_all_is_taken() -> None:
    reward = torch.arange(64.0)
    torch.testing.assert_close(calibrated_greedy(reward, 1, reward, ridge=0.0), reward)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("base", [0.0, 1.0, 0.1, -3.7, 1e6 + 0.1])
def test_ones_own_reward_does_not_decide_where_all_others_are_alike(base: float) -> None:
    # Late in training nearly all rewards of 0 or 1 are 1: spreads of the other prompts are 0 but for rounding.
    for num_prompts, num_samples in product((3, 4, 7, 12), (2, 3, 4)):
        shape = num_prompts, num_samples
        greedy = torch.full((num_prompts,), base, dtype=torch.float64)
        baselines: dict[str, Callable[[Tensor], Tensor]] = {
            "batch_mean": batch_mean,
            "greedy_and_samples": lambda reward, n=num_samples, g=greedy: greedy_and_samples(reward, n, g),  # type: ignore[misc]
            "calibrated_greedy": lambda reward, n=num_samples, g=greedy: calibrated_greedy(reward, n, g),  # type: ignore[misc]
            "shrinkage": lambda reward, n=num_samples: shrinkage(reward, n),  # type: ignore[misc]
        }
        for siblings in product((base, base + 0.3), repeat=num_samples - 1):
            for name, baseline in baselines.items():
                own = []
                for reward in (base, base + 0.3):
                    group = torch.full(shape, base, dtype=torch.float64)
                    group[0] = torch.tensor([reward, *siblings], dtype=torch.float64)
                    own.append(float(baseline(group.flatten())[0]))
                assert own[0] == pytest.approx(own[1], rel=1e-9, abs=1e-9), (name, shape, siblings)


def test_alike_prompts_are_shrunk_and_different_ones_are_not() -> None:
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    alike = shrinkage(noise, 2)
    assert alike.std() < 0.35 * baseline_values(noise, 2, "leave_one_out").std()
    different = noise + 100 * torch.arange(200.0).repeat_interleave(2)
    torch.testing.assert_close(
        shrinkage(different, 2), baseline_values(different, 2, "leave_one_out"), rtol=0, atol=0.1
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    reward, greedy = torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=dtype), torch.tensor([1.0, 2.0], dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for values in (
        batch_mean(reward),
        greedy_and_samples(reward, 2, greedy),
        calibrated_greedy(reward, 2, greedy),
        shrinkage(reward, 2),
    ):
        assert values.dtype == expected
        assert values.shape == (4,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch_mean(torch.ones(2, 2)), r"reward must have shape \[S\] = \[any\], got \[2, 2\]"),
        (lambda: batch_mean(torch.ones(2), torch.ones(3)), r"weights must have shape \[S\] = \[2\], got \[3\]"),
        (lambda: greedy_and_samples(torch.ones(4), 3, torch.ones(2)), "num_samples must be a divisor of the 4 rewards"),
        (lambda: greedy_and_samples(torch.ones(4), 2, torch.ones(4)), r"greedy_reward must have shape \[B\] = \[2\]"),
        (lambda: calibrated_greedy(torch.ones(4), 1, torch.ones(4), -1.0), "ridge must be 0 or more, got -1"),
        (lambda: optimal_per_token(torch.ones(4), torch.ones(3, 2)), r"squared_norms must have shape \[S, R\] = \[4"),
        (lambda: shrinkage(torch.ones(4), 1), "num_samples must be at least 2, got 1"),
    ],
)
def test_arguments_that_do_not_fit(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
