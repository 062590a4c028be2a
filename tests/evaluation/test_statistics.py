"""Win rates and the bootstrap over clusters against loops, and how often its intervals hold a known truth."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from remax_lightning.evaluation import statistics
from remax_lightning.evaluation.statistics import (
    best_of_k,
    cheapest_baseline,
    majority_vote,
    pass_at_k,
    percentile_interval,
    proportion_interval,
    resampled_ratios,
    win_rates,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wins_by_hand(own: list[float], other: list[float]) -> float:
    points = 0.0
    for one in own:
        for two in other:
            points += 1.0 if one > two else 0.5 if one == two else 0.0
    return points / (len(own) * len(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 3), (4, 1)])
def test_every_response_is_compared_with_every_other(n: int, m: int, dtype: torch.dtype) -> None:
    draw = random.Random(n + 10 * m)
    own = [[draw.randrange(4) for _ in range(n)] for _ in range(50)]
    other = [[draw.randrange(4) for _ in range(m)] for _ in range(50)]
    found = win_rates(torch.tensor(own, dtype=dtype), torch.tensor(other, dtype=dtype))
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx([wins_by_hand(*each) for each in zip(own, other, strict=True)], abs=1e-15)


def test_a_tie_counts_one_half_and_both_sides_share_one() -> None:
    own, other = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 3.0], [0.0, -1.0]])
    assert win_rates(own, other).tolist() == [0.375, 0.75]  # half, lost, won, lost; half, won, half, won
    assert (win_rates(own, other) + win_rates(other, own)).tolist() == [1.0, 1.0]


def resampled_by_hand(tops: list[list[float]], bottoms: list[list[float]], draws: list[list[int]]) -> list[list[float]]:
    found = []
    for draw in draws:
        row = []
        for figure in range(len(tops[0])):
            top = sum(tops[cluster][figure] for cluster in draw)
            bottom = sum(bottoms[cluster][figure] for cluster in draw)
            row.append(top / bottom if bottom else math.nan)
        found.append(row)
    return found


@pytest.mark.parametrize("at_once", [2**22, 21, 1])
def test_ratios_are_those_of_the_drawn_clusters(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_ENTRIES_AT_ONCE", at_once)
    draw = random.Random(0)
    tops = [[draw.gauss(0, 1), draw.gauss(5, 2), 3.0 if i == 0 else 0.0] for i in range(7)]
    bottoms = [[1.0, float(draw.randrange(1, 5)), 1.0 if i == 0 else 0.0] for i in range(7)]
    found = resampled_ratios(tops, bottoms, 100, seed=0)
    draws = torch.randint(7, (100, 7), generator=generator()).tolist()
    expected = resampled_by_hand(tops, bottoms, draws)
    np.testing.assert_allclose(found, expected, atol=1e-12, rtol=0, equal_nan=True)
    assert 10 < np.isnan(found[:, 2]).sum() < 60  # (6 / 7)^7 of the draws have nothing of the third figure


@pytest.mark.slow(0.3)
def test_the_spread_of_a_mean_is_its_standard_error() -> None:
    values = torch.randn(200, 1, generator=generator(1), dtype=torch.float64)
    found = resampled_ratios(values, torch.ones_like(values), 20_000, seed=2)
    assert float(found.std()) == pytest.approx(float(values.std(correction=0)) / math.sqrt(200), rel=0.03)
    assert float(found.mean()) == pytest.approx(float(values.mean()), abs=2e-3)


def percentile(values: list[float], share: float) -> float:
    """Of sorted values, with the straight line between two of them."""
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_an_interval_leaves_out_equally_many_on_both_sides(confidence: float) -> None:
    draw = random.Random(3)
    columns = [[draw.gauss(0, 1) for _ in range(999)], [draw.expovariate(1) for _ in range(999)]]
    columns[1][::3] = [math.nan] * 333
    found = percentile_interval(torch.tensor(columns, dtype=torch.float64).T, confidence)
    for ends, column in zip(found.tolist(), columns, strict=True):
        known = sorted(value for value in column if not math.isnan(value))
        shares = ((1 - confidence) / 2, (1 + confidence) / 2)
        assert ends == pytest.approx([percentile(known, share) for share in shares], abs=1e-12)


def test_nothing_has_no_interval() -> None:
    assert np.isnan(percentile_interval([[math.nan]] * 5)).all()


def clusters(seed: int, count: int) -> Tensor:
    """`[P, 4]` values of mean 1 whose larger part is common to a cluster."""
    numbers = torch.randn(count, 5, generator=generator(seed), dtype=torch.float64)
    return 1 + numbers[:, :1] + 0.3 * numbers[:, 1:]


def covers(values: Tensor, seed: int) -> bool:
    """Whether the interval for the mean of the rows of `values` holds the true one."""
    tops, bottoms = values.sum(1, keepdim=True), torch.full((len(values), 1), float(values.shape[1]))
    low, high = percentile_interval(resampled_ratios(tops, bottoms, 400, seed))[0].tolist()
    return low <= 1 <= high


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Samples that were drawn one by one would hide that those of a prompt are alike."""
    samples = [clusters(seed, 60) for seed in range(600)]
    together = sum(covers(values, seed) for seed, values in enumerate(samples)) / 600
    apart = sum(covers(values.reshape(-1, 1), seed) for seed, values in enumerate(samples)) / 600
    assert 0.92 < together < 0.975  # 95 %, two standard errors of 0.9 % and what 60 clusters lack
    assert apart < 0.8


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (64, 64, 0.025 ** (1 / 64), 1.0),  # where no trial failed, the end has a closed form
        (0, 64, 0.0, 1 - 0.025 ** (1 / 64)),
        (1, 1, 0.025, 1.0),
        (5, 10, 0.187086, 0.812914),  # the table of Clopper and Pearson
        (8, 10, 0.443905, 0.974789),
        (81, 263, 0.2527, 0.3676),  # Newcombe 1998, table I
    ],
)
def test_exact_intervals_are_those_of_the_tables(successes: int, trials: int, low: float, high: float) -> None:
    assert proportion_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("trials", [10, 64, 500])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.97, 0.99, 0.998])
def test_exact_intervals_hold_the_truth_at_least_as_often_as_they_say(share: float, trials: int) -> None:
    """Simulated: a bootstrap holds 0.99 at 64 trials in 45 of 100 cases, this in 95 or more."""
    drawn = torch.bernoulli(torch.full((2000, trials), share), generator=generator(7)).sum(1)
    ends = {count: proportion_interval(count, trials) for count in set(drawn.tolist())}
    covered = sum(ends[count][0] <= share <= ends[count][1] for count in drawn.tolist()) / 2000
    assert covered > 0.95 - 2 * 0.005  # two standard errors
    assert sum(ends[count][1] - ends[count][0] for count in drawn.tolist()) / 2000 < 2.6 / trials**0.5 + 2 / trials


def test_parts_of_a_success_or_a_trial_make_an_interval_wider() -> None:
    half, low, high = proportion_interval(5.5, 10), proportion_interval(5, 10), proportion_interval(6, 10)
    assert half == (low[0], high[1])
    assert proportion_interval(9.9, 9.9) == proportion_interval(9, 9)


def test_the_seed_fixes_the_draws() -> None:
    values = clusters(0, 20)
    first, again, other = (resampled_ratios(values, torch.ones_like(values), 50, seed) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 3])
def test_the_draws_are_those_of_torch(seed: int) -> None:
    """Intervals of earlier versions, which drew with torch, can be computed again."""
    values = torch.randn(13, 1, dtype=torch.float64, generator=generator(1))
    drawn = torch.randint(13, (40, 13), generator=generator(seed))  # [K, P]
    expected = values[drawn, 0].mean(1, keepdim=True)
    np.testing.assert_allclose(resampled_ratios(values, torch.ones_like(values), 40, seed), expected, rtol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    one = torch.ones(3, 2)
    for call, text in (
        (
            lambda: win_rates(one, torch.ones(2, 2)),
            r"other_rewards must have shape \[B, m\] = \[3, any\], got \[2, 2\]",
        ),
        (lambda: win_rates(one[0], one), "rewards must have shape"),
        (lambda: resampled_ratios(one, one[:, :1], 5, 0), r"denominators must have shape .*\[3, 2\]"),
        (lambda: resampled_ratios(one[:0], one[:0], 5, 0), "numerators must be at least one row, got 0"),
        (lambda: resampled_ratios(one, one, 0, 0), "num_resamples must be at least 1, got 0"),
        (lambda: percentile_interval(one, 1.0), "confidence must be above 0 and below 1, got 1.0"),
        (lambda: percentile_interval(one[0]), "resampled must have shape"),
        (lambda: proportion_interval(0, 0), "trials must be at least 1, got 0"),
        (lambda: proportion_interval(3, 2), "successes must be between 0 and trials, got 3"),
        (lambda: proportion_interval(1, 2, 0.0), "confidence must be above 0 and below 1, got 0.0"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


# Figures of several responses, against all subsets


@pytest.mark.parametrize("num_passed", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_one_that_passes(num_passed: int, k: int) -> None:
    passes = [i < num_passed for i in range(5)]
    subsets = [any(subset) for subset in combinations(passes, k)]
    assert pass_at_k(num_passed, 5, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-15)


@pytest.mark.parametrize("k", range(1, 6))
def test_best_of_k_is_the_mean_of_the_largest_of_all_subsets(k: int) -> None:
    rewards = [0.5, -1.0, 2.0, 0.5, 0.1]
    largest = [max(subset) for subset in combinations(rewards, k)]
    assert best_of_k(rewards, k) == pytest.approx(sum(largest) / len(largest), rel=1e-12)


def test_many_responses_neither_overflow_nor_lose_digits() -> None:
    assert pass_at_k(1, 1000, 500) == pytest.approx(0.5, rel=1e-12)
    assert best_of_k([0.0] * 999 + [1.0], 500) == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize(("answers", "passed", "expected"), [
    (["5", "6", "5"], [True, False, True], 1.0),
    (["5", "6", "6"], [True, False, False], 0.0),
    (["5", "6"], [True, False], 0.5),  # a tie
    (["5", None, None], [True, False, False], 1.0),  # no answer is no vote
    ([None, None], [True, True], 0.0),
    (["5", "5"], [True, False], 0.5),  # the reward looks at more than the answer
])  # fmt: skip
def test_the_most_frequent_answer_counts(answers: list[str | None], passed: list[bool], expected: float) -> None:
    assert majority_vote(answers, passed) == expected


def test_figures_of_several_responses_need_as_many() -> None:
    with pytest.raises(ValueError, match="k must be between 1 and num_samples=4, got 5"):
        pass_at_k(1, 4, 5)
    with pytest.raises(ValueError, match="num_passed must be between 0 and 4, got 5"):
        pass_at_k(5, 4, 2)
    with pytest.raises(ValueError, match="k must be between 1 and the 2 rewards, got 3"):
        best_of_k([1.0, 0.0], 3)
    with pytest.raises(ValueError, match="passed must be as long as the 2 answers, got 1"):
        majority_vote(["5", "6"], [True])


@pytest.mark.parametrize(("same", "used"), [((), "greedy"), (("cached_greedy", "tracker"), "the one in use")])
def test_the_baseline_in_use_is_named_where_it_is_known(same: tuple[str, ...], used: str) -> None:
    """In the first epoch, `cached_greedy` has the values of `greedy`; files of logs sort their keys."""
    figures = {"greedy": (1.0, 1.0, 1.0), "none": (0.5, 0.4, 0.6), **dict.fromkeys(same, (1.0, 1.0, 1.0))}
    metrics = {
        f"train/variance_seconds{end}/{name}": value
        for name in sorted(figures)
        for end, value in zip(("", "_low", "_high"), figures[name], strict=True)
    }
    assert cheapest_baseline(metrics) == ("none", used, 0.5, 0.4, 0.6)
    assert cheapest_baseline({key: value for key, value in metrics.items() if not key.endswith("none")}) is None
