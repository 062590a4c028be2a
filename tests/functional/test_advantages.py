from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import advantages as oracle
from oracles.cases import make
from torch import Tensor

from remax_lightning.functional import (
    baseline_values,
    kl_estimate,
    normalized_differences,
    remax_advantages,
    soft_overlong_penalty,
)

NAN = float("nan")


def assert_equal(actual: Tensor, expected: list[list[float]]) -> None:
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if actual.dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), **tolerance)


def over_grid(test: Callable[..., None]) -> Callable[..., None]:
    test = pytest.mark.parametrize("num_samples", [1, 2, 4])(test)
    test = pytest.mark.parametrize("length", [1, 2, 13, 32])(test)
    return pytest.mark.parametrize("dtype", [torch.float64, torch.float32])(test)


@pytest.mark.parametrize(("beta", "bound", "gamma"), [(0.05, 5.0, 0.99), (0.1, 1.0, 0.99), (0.1, 1.0, 1.0)])
@over_grid
def test_reference_and_model_card(
    num_samples: int, length: int, dtype: torch.dtype, beta: float, bound: float, gamma: float
) -> None:
    case = make(num_samples, length, dtype=dtype)
    actual = remax_advantages(
        case.reward,
        case.mask,
        num_samples=num_samples,
        baseline_reward=case.baseline_reward,
        kl=kl_estimate(case.log_ratio, "k1"),
        kl_coef=beta,
        kl_credit="one_step",
        gamma=gamma,
        reward_clip=bound,
    )
    baseline = oracle.greedy(case.baseline_reward.tolist(), num_samples)
    expected = oracle.reference_implementation(
        case.reward.tolist(), baseline, case.log_ratio.tolist(), case.mask.tolist(), beta, gamma, bound
    )
    assert actual.dtype == dtype
    assert_equal(actual, expected)


@pytest.mark.parametrize(("estimator", "clamp"), [("k1", None), ("k3", 10.0)])
@over_grid
def test_verl(num_samples: int, length: int, dtype: torch.dtype, estimator: Any, clamp: float | None) -> None:
    case = make(num_samples, length, dtype=dtype)
    kl = kl_estimate(case.log_ratio, estimator, clamp)
    actual = remax_advantages(
        case.reward,
        case.mask,
        num_samples=num_samples,
        baseline_reward=case.baseline_reward,
        kl=kl,
        kl_coef=0.001,
    )
    baseline = oracle.greedy(case.baseline_reward.tolist(), num_samples)
    assert_equal(actual, oracle.verl(case.reward.tolist(), baseline, kl.tolist(), case.mask.tolist()))


@pytest.mark.parametrize("kind", ["group_mean", "leave_one_out", "none"])
@over_grid
def test_openrlhf(num_samples: int, length: int, dtype: torch.dtype, kind: Any) -> None:
    if num_samples == 1 and kind != "none":
        num_samples = 3
    case = make(num_samples, length, dtype=dtype)
    kl = kl_estimate(case.log_ratio, "k1", clamp=10.0)
    actual = remax_advantages(
        case.reward,
        case.mask,
        num_samples=num_samples,
        baseline=kind,
        kl=kl,
        kl_coef=0.01,
        reward_clip=10.0,
        whiten=True,
    )
    reward = case.reward.tolist()
    baseline = {
        "group_mean": oracle.group_mean,
        "leave_one_out": oracle.leave_one_out,
        "none": lambda values, _: [0.0] * len(values),
    }[kind](reward, num_samples)
    assert_equal(actual, oracle.openrlhf(reward, baseline, kl.tolist(), case.mask.tolist()))


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.5])
@over_grid
def test_discounted_kl_to_go(num_samples: int, length: int, dtype: torch.dtype, gamma: float) -> None:
    case = make(num_samples, length, dtype=dtype)
    actual = remax_advantages(
        case.reward,
        case.mask,
        num_samples=num_samples,
        baseline_reward=case.baseline_reward,
        kl=case.log_ratio,
        kl_coef=0.3,
        gamma=gamma,
    )
    baseline = oracle.greedy(case.baseline_reward.tolist(), num_samples)
    expected = oracle.discounted(
        case.reward.tolist(), baseline, case.log_ratio.tolist(), case.mask.tolist(), 0.3, gamma
    )
    assert_equal(actual, expected)


@pytest.mark.parametrize("gamma", [0.5, 0.99])
def test_discount_is_sound_on_long_responses(gamma: float) -> None:
    # 0.5^1024 is 0 in float32 and its inverse infinite: a cumulative sum divided by gamma^t would be NaN here.
    mask = torch.ones(1, 1024, dtype=torch.bool)
    kl = torch.rand(1, 1024, generator=torch.Generator().manual_seed(0))
    actual = remax_advantages(torch.zeros(1), mask, baseline="none", kl=kl, kl_coef=1.0, gamma=gamma)
    expected, total = [0.0] * 1024, 0.0
    for t in reversed(range(1024)):
        total = kl[0, t].item() + gamma * total
        expected[t] = -total
    torch.testing.assert_close(actual[0], torch.tensor(expected), rtol=1e-5, atol=0.0)


def test_a_gap_in_the_mask_is_not_discounted() -> None:
    mask = torch.tensor([[True, False, False, True, True]])
    gap = remax_advantages(
        torch.tensor([2.0]),
        mask,
        baseline="none",
        kl=torch.tensor([[1.0, NAN, NAN, 2.0, 3.0]]),
        kl_coef=1.0,
        gamma=0.5,
    )
    dense = remax_advantages(
        torch.tensor([2.0]),
        torch.ones(1, 3, dtype=torch.bool),
        baseline="none",
        kl=torch.tensor([[1.0, 2.0, 3.0]]),
        kl_coef=1.0,
        gamma=0.5,
    )
    assert gap[mask].tolist() == dense[0].tolist() == [0.25 - 2.75, 0.5 - 3.5, 1.0 - 3.0]
    assert gap[~mask].tolist() == [0.0, 0.0]


def test_reward_is_clipped_before_or_after_the_baseline() -> None:
    reward, baseline_reward = torch.tensor([9.0, -1.0]), torch.tensor([4.0, 3.0])
    mask = torch.ones(2, 1, dtype=torch.bool)

    def advantages(at: Any) -> list[float]:
        values = remax_advantages(reward, mask, baseline_reward=baseline_reward, reward_clip=2.0, reward_clip_at=at)
        return values.flatten().tolist()

    assert advantages("before_baseline") == [0.0, -3.0]
    assert advantages("after_baseline") == [2.0, -2.0]


@pytest.mark.parametrize("kind", ["leave_one_out", "group_mean"])
@pytest.mark.parametrize("kl_credit", ["to_go", "one_step"])
def test_kl_in_the_baseline(kind: Any, kl_credit: Any) -> None:
    case = make(3)
    reward, kl, mask = case.reward.tolist(), case.log_ratio.tolist(), case.mask.tolist()
    shaped = [
        r - 0.2 * sum(k for k, counted in zip(kls, row, strict=True) if counted)
        for r, kls, row in zip(reward, kl, mask, strict=True)
    ]
    baseline = {"leave_one_out": oracle.leave_one_out, "group_mean": oracle.group_mean}[kind](shaped, 3)
    actual = remax_advantages(
        case.reward,
        case.mask,
        num_samples=3,
        baseline=kind,
        kl=case.log_ratio,
        kl_coef=0.2,
        kl_credit=kl_credit,
        kl_in_baseline=True,
    )
    if kl_credit == "to_go":
        assert_equal(actual, oracle.verl(reward, baseline, kl, mask, 0.2))
    else:
        assert_equal(actual, oracle.reference_implementation(reward, baseline, kl, mask, 0.2, 1.0, 1e9))


def test_no_kl_credit_ignores_the_kl() -> None:
    case = make()
    options: dict[str, Any] = {"baseline_reward": case.baseline_reward}
    without = remax_advantages(case.reward, case.mask, **options)
    assert torch.equal(
        remax_advantages(case.reward, case.mask, kl=case.log_ratio, kl_coef=0.5, kl_credit="none", **options),
        without,
    )
    infinite = torch.full_like(case.log_ratio, float("inf"))
    assert torch.equal(remax_advantages(case.reward, case.mask, kl=infinite, kl_coef=0.0, **options), without)


def test_baselines_by_hand() -> None:
    reward = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    greedy = torch.tensor([5.0, 7.0])
    assert baseline_values(reward, 3, "greedy", greedy).tolist() == [5.0, 5.0, 5.0, 7.0, 7.0, 7.0]
    assert baseline_values(reward, 3, "leave_one_out").tolist() == [4.0, 3.5, 1.5, 1.5, 1.5, 0.0]
    assert baseline_values(reward, 3, "group_mean").tolist() == [3.0, 3.0, 3.0, 1.0, 1.0, 1.0]
    assert baseline_values(reward, 3, "none").tolist() == [0.0] * 6


@pytest.mark.parametrize("whiten", [False, True])
def test_what_is_masked_has_no_effect(whiten: bool) -> None:
    case = make()
    options: dict[str, Any] = {
        "baseline_reward": case.baseline_reward,
        "kl_coef": 0.1,
        "gamma": 0.9,
        "whiten": whiten,
    }
    clean = remax_advantages(case.reward, case.mask, kl=case.log_ratio, **options)
    # The second response is empty: its reward must not matter either.
    reward = case.reward.clone()
    reward[1] = NAN
    dirty = remax_advantages(reward, case.mask, kl=torch.where(case.mask, case.log_ratio, NAN), **options)
    assert torch.equal(clean, dirty)
    assert clean[~case.mask].abs().sum().item() == 0.0


def test_advantages_are_detached() -> None:
    case = make()
    advantages = remax_advantages(
        case.reward.requires_grad_(),
        case.mask,
        baseline_reward=case.baseline_reward.requires_grad_(),
        kl=case.log_ratio.requires_grad_(),
        kl_coef=0.1,
    )
    assert not advantages.requires_grad


@pytest.mark.parametrize("whiten", [False, True])
def test_bfloat16_is_computed_in_float32(whiten: bool) -> None:
    case = make(length=32, dtype=torch.bfloat16)

    def advantages(*tensors: Tensor) -> Tensor:
        reward, baseline_reward, kl = tensors
        return remax_advantages(
            reward, case.mask, baseline_reward=baseline_reward, kl=kl, kl_coef=0.1, gamma=0.99, whiten=whiten
        )

    half = advantages(case.reward, case.baseline_reward, case.log_ratio)
    assert half.dtype == torch.float32
    assert torch.equal(half, advantages(*(x.float() for x in case[:3])))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"reward": torch.zeros(2, 1)}, r"reward must have shape \[S\] = \[any\], got \[2, 1\]"),
    ({"response_mask": torch.ones(3, 5, dtype=torch.bool)}, r"response_mask must .* \[4, any\], got \[3, 5\]"),
    ({"response_mask": torch.ones(4, 5)}, r"response_mask must be of dtype torch.bool, got torch.float32"),
    ({"num_samples": 3}, r"num_samples must be a divisor of the 4 rewards, got 3"),
    ({"num_samples": 0}, r"num_samples must be at least 1, got 0"),
    ({"baseline": "mean"}, r"baseline must be one of greedy, leave_one_out, group_mean, none, got 'mean'"),
    ({"baseline": "greedy"}, r"baseline_reward must have shape \[B\] for baseline='greedy', got None"),
    (
        {"baseline": "greedy", "num_samples": 2, "baseline_reward": torch.zeros(4)},
        r"baseline_reward must have shape \[B\] = \[2\], got \[4\]",
    ),
    ({"baseline": "leave_one_out"}, r"num_samples must be at least 2 for baseline='leave_one_out', got 1"),
    ({"baseline": "group_mean"}, r"num_samples must be at least 2 for baseline='group_mean', got 1"),
    ({"kl": torch.zeros(4, 4)}, r"kl must have shape \[S, R\] = \[4, 5\], got \[4, 4\]"),
    ({"kl_coef": 0.1}, r"kl must have shape \[S, R\] for kl_coef=0.1 with kl_credit='to_go', got None"),
    ({"kl_coef": -0.1}, r"kl_coef must be at least 0, got -0.1"),
    ({"kl_credit": "all"}, r"kl_credit must be one of to_go, one_step, none, got 'all'"),
    ({"kl_in_baseline": True}, r"kl_in_baseline must be False unless baseline is leave_one_out or"),
    (
        {"kl_in_baseline": True, "baseline": "greedy", "baseline_reward": torch.zeros(4)},
        r"kl_in_baseline must be False unless baseline is leave_one_out or group_mean",
    ),
    (
        {"kl_in_baseline": True, "baseline": "group_mean", "num_samples": 2, "kl_credit": "none"},
        r"kl_in_baseline must be False with kl_credit='none'",
    ),
    ({"gamma": 0.0}, r"gamma must be above 0 and at most 1, got 0.0"),
    ({"gamma": 1.01}, r"gamma must be above 0 and at most 1, got 1.01"),
    ({"reward_clip": 0.0}, r"reward_clip must be above 0 or None, got 0.0"),
    ({"reward_clip_at": "later"}, r"reward_clip_at must be one of before_baseline, after_baseline, got"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "reward": torch.zeros(4),
        "response_mask": torch.ones(4, 5, dtype=torch.bool),
        "baseline": "none",
    }
    with pytest.raises(ValueError, match=message):
        remax_advantages(**{**arguments, **change})


@pytest.mark.parametrize("cache", [1, 3, 10])
def test_the_soft_penalty_is_that_of_the_paper(cache: int) -> None:
    def equation_13(length: int) -> float:  # of DAPO, with a limit of 10 tokens
        if length <= 10 - cache:
            return 0.0
        return ((10 - cache) - length) / cache if length <= 10 else -1.0

    shares = soft_overlong_penalty(torch.arange(11), 10, cache)
    torch.testing.assert_close(shares, torch.tensor([-equation_13(length) for length in range(11)]))


@pytest.mark.parametrize("cache", [0, 11])
def test_a_soft_penalty_needs_a_cache_within_the_limit(cache: int) -> None:
    with pytest.raises(ValueError, match=f"cache must be between 1 and max_length=10, got {cache}"):
        soft_overlong_penalty(torch.arange(3), 10, cache)


# Rewards of tokens


def to_go(rewards: list[float], gamma: float) -> list[float]:
    return [sum(gamma ** (s - t) * rewards[s] for s in range(t, len(rewards))) for t in range(len(rewards))]


def held(values: list[float], t: int) -> float:
    """The value at a place, beyond the end the last one."""
    return values[min(t, len(values) - 1)] if values else 0.0


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize(
    ("baseline", "num_samples"), [("greedy", 2), ("leave_one_out", 3), ("group_mean", 2), ("none", 1)]
)
def test_rewards_of_tokens_by_hand(baseline: Any, num_samples: int, gamma: float) -> None:
    """The greedy responses are wider and narrower than the sampled ones; one response is empty."""
    case = make(num_samples, 7)
    lengths = case.mask.sum(1).tolist()
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(case.mask.shape, generator=generator, dtype=torch.float64)
    for width in (3, 9):
        greedy_mask = torch.arange(width) < torch.tensor([1, 2, 3, 3, 1, width])[:, None]
        greedy_values = torch.randn(greedy_mask.shape, generator=generator, dtype=torch.float64)
        is_greedy = baseline == "greedy"
        actual = remax_advantages(
            torch.where(case.mask, values, NAN),
            case.mask,
            num_samples=num_samples,
            baseline=baseline,
            baseline_reward=torch.where(greedy_mask, greedy_values, NAN) if is_greedy else None,
            baseline_mask=greedy_mask if is_greedy else None,
            kl=case.log_ratio,
            kl_coef=0.3,
            gamma=gamma,
            reward_clip=1.5,
        )
        curves = [to_go(row[:length], gamma) for row, length in zip(values.tolist(), lengths, strict=True)]
        greedy = [
            to_go(row[: int(mask.sum())], gamma) for row, mask in zip(greedy_values.tolist(), greedy_mask, strict=True)
        ]
        expected = [[0.0] * 7 for _ in lengths]
        for i, length in enumerate(lengths):
            prompt = i // num_samples
            siblings = range(prompt * num_samples, (prompt + 1) * num_samples)
            for t in range(length):
                compared = {
                    "greedy": [greedy[prompt]],
                    "leave_one_out": [curves[j] for j in siblings if j != i],
                    "group_mean": [curves[j] for j in siblings],
                    "none": [[0.0]],
                }[baseline]
                above = curves[i][t] - sum(held(curve, t) for curve in compared) / len(compared)
                cost = sum(gamma ** (s - t) * case.log_ratio[i][s].item() for s in range(t, length))
                expected[i][t] = max(-1.5, min(1.5, above)) - 0.3 * cost
        assert_equal(actual, expected)


@pytest.mark.parametrize(("baseline", "num_samples"), [("greedy", 1), ("leave_one_out", 2), ("group_mean", 4)])
def test_all_reward_on_the_last_token_is_one_number_per_response(baseline: Any, num_samples: int) -> None:
    case = make(num_samples, 13)
    lengths = case.mask.sum(1)
    reward = torch.where(lengths > 0, case.reward, 0.0)  # an empty response has no token to put it on
    last = case.mask & (torch.arange(13) == lengths[:, None] - 1)
    greedy_mask = torch.arange(5) < torch.tensor([1, 2, 3, 4, 5, 5])[:, None]
    greedy_last = greedy_mask & (greedy_mask.cumsum(1) == greedy_mask.sum(1, keepdim=True))
    is_greedy = baseline == "greedy"
    options: dict[str, Any] = {"num_samples": num_samples, "baseline": baseline, "whiten": True}
    tokens = remax_advantages(
        reward[:, None] * last,
        case.mask,
        baseline_reward=case.baseline_reward[:, None] * greedy_last if is_greedy else None,
        baseline_mask=greedy_mask if is_greedy else None,
        **options,
    )
    whole = remax_advantages(reward, case.mask, baseline_reward=case.baseline_reward if is_greedy else None, **options)
    torch.testing.assert_close(tokens, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("options", "message"), [
    ({"baseline_reward": torch.ones(2, 3)}, r"baseline_mask must have shape \[B, R'\] .* got None"),
    ({"baseline_reward": torch.ones(2), "baseline_mask": torch.ones(2, 3, dtype=torch.bool)},
     r"baseline_reward must have shape \[B, R'\] = \[2, 3\], got \[2\]"),
    ({}, r"baseline_reward must have shape \[B\] for baseline='greedy', got None"),
    ({"baseline": "none", "reward_clip": 1.0, "reward_clip_at": "before_baseline"},
     "reward_clip_at must be after_baseline with a reward per token, got before_baseline"),
    ({"baseline": "leave_one_out", "num_samples": 2, "kl": torch.ones(2, 3), "kl_coef": 0.1, "kl_in_baseline": True},
     "kl_in_baseline must be False with a reward per token"),
])  # fmt: skip
def test_what_rewards_of_tokens_need_and_exclude(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remax_advantages(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), **options)


# Parts on scales of their own


def parts_of(num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values of five prompts on three scales, and a part that is constant: 0.1 is no power of two."""
    generator = torch.Generator().manual_seed(num_samples)
    scales = torch.tensor([1.0, 1e3, 1e-2, 0.0], dtype=torch.float64)
    sampled, greedy = (
        0.1 + scales * torch.randn(rows, 4, generator=generator, dtype=torch.float64) for rows in (5 * num_samples, 5)
    )
    return sampled, greedy, torch.tensor([1.0, -0.5, 2.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_parts_above_their_greedy_values_are_divided_by_their_deviations(num_samples: int) -> None:
    sampled, greedy, weights = parts_of(num_samples)
    actual = normalized_differences(sampled, greedy, weights)
    assert actual.dtype == torch.float64
    above = [
        [value - base for value, base in zip(row, greedy[i // num_samples].tolist(), strict=True)]
        for i, row in enumerate(sampled.tolist())
    ]
    deviations = [max((sum(row[k] ** 2 for row in above) / len(above)) ** 0.5, 1e-4) for k in range(4)]
    expected = [sum(weights[k].item() * row[k] / deviations[k] for k in range(4)) for row in above]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    # The part on the scale of 1000 does not drown the others, and the constant one adds nothing.
    unscaled = normalized_differences(
        sampled * torch.tensor([1.0, 1e-3, 50.0, 1.0]), greedy * torch.tensor([1.0, 1e-3, 50.0, 1.0]), weights
    )
    torch.testing.assert_close(actual, unscaled, rtol=1e-12, atol=1e-12)
    without = normalized_differences(sampled[:, :3], greedy[:, :3], weights[:3])
    assert torch.equal(actual, without)


def test_deviations_are_those_of_all_ranks() -> None:
    sampled, greedy, weights = parts_of(2)
    whole = normalized_differences(sampled, greedy, weights)
    seen: list[Tensor] = []
    shares = ((sampled[:6], greedy[:3]), (sampled[6:], greedy[3:]), (sampled[:0], greedy[:0]))  # a rank without any
    for part, base in shares:
        normalized_differences(part, base, weights, lambda sums: seen.append(sums) or sums)  # type: ignore[func-returns-value]
    total = torch.stack(seen).sum(0)
    ranks = [normalized_differences(part, base, weights, lambda _: total) for part, base in shares]
    torch.testing.assert_close(torch.cat(ranks), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sampled", "greedy", "weights", "message"), [
    (torch.ones(4), torch.ones(2, 1), torch.ones(1), r"parts must have shape \[S, K\]"),
    (torch.ones(4, 2), torch.ones(2, 1), torch.ones(2), r"baseline_parts must have shape \[B, K\]"),
    (torch.ones(4, 2), torch.ones(3, 2), torch.ones(2), "baseline_parts must be of a number of prompts that divides"),
    (torch.ones(4, 2), torch.ones(2, 2), torch.ones(3), r"weights must have shape \[K\]"),
])  # fmt: skip
def test_parts_of_other_shapes_are_refused(sampled: Tensor, greedy: Tensor, weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalized_differences(sampled, greedy, weights)
