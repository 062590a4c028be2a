"""Intervals of figures: exact where a response counts as one of two values, a bootstrap's elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from remax_lightning.evaluation.intervals import Figure, difference_interval, figures, mean_figure, share_interval
from remax_lightning.evaluation.statistics import proportion_interval
from remax_lightning.files import PromptRecord


def records(rewards: list[list[float]], **sums: list[tuple[float, float]]) -> list[PromptRecord]:
    """Prompts with the rewards of their sampled responses, and what else was summed of them."""
    return [
        PromptRecord(
            i, "", {}, {"sampled": row, "greedy": row[:1]},
            {"reward": (sum(row), float(len(row))), **{name: column[i] for name, column in sums.items()}},
        )
        for i, row in enumerate(rewards)
    ]  # fmt: skip


def reward_of(rewards: list[list[float]]) -> Figure:
    return figures(records(rewards), 400, 0)["reward"]


@pytest.mark.parametrize("right", [0, 1, 40, 63, 64])
def test_a_reward_of_zeros_and_ones_has_an_exact_interval(right: int) -> None:
    figure = reward_of([[float(i < right)] for i in range(64)])
    assert (figure.low, figure.high) == pytest.approx(proportion_interval(right, 64))
    assert (figure.value, figure.n, figure.method) == (right / 64, 64, "exact")


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("right", "number"), [(15, 22), (13, 23), (7, 25), (14, 25), (29, 50), (57, 100)])
def test_a_whole_number_of_successes_is_not_rounded(right: int, number: int, samples: int) -> None:
    """Share times number, 15 / 22 * 22, is just below 15."""
    wins = np.repeat([float(samples), 0.0], [right, number - right])  # the responses of a prompt are alike
    ends = share_interval(wins, np.full(number, float(samples)), (0.0, 1.0))
    assert ends == pytest.approx(proportion_interval(right, number), abs=1e-6)


def test_so_has_a_reward_of_two_other_values() -> None:
    figure = reward_of([[-1.0 if i < 3 else 2.0] for i in range(30)])
    assert (figure.low, figure.high) == pytest.approx(tuple(3 * end - 1 for end in proportion_interval(27, 30)))


def test_a_reward_that_is_always_the_same_has_none() -> None:
    """5 of 5 points for each response: whether the next one gets 4 or 0 is not known."""
    figure = reward_of([[5.0]] * 30)
    assert (figure.value, figure.low, figure.high, figure.method) == (5.0, None, None, None)


def test_other_rewards_keep_the_bootstrap() -> None:
    assert reward_of([[i % 7 / 7] for i in range(40)]).method == "bootstrap"
    kl = figures(records([[0.3 * i] for i in range(9)], kl=[(0.0, 5.0)] * 9), 100, 0)["kl"]
    assert (kl.low, kl.high, kl.method) == (0.0, 0.0, "bootstrap")  # no share: it could not have been 1


def test_several_responses_count_for_as_much_as_they_differ() -> None:
    """As many prompts where the responses to each are alike, as many responses where they are not."""
    alike = reward_of([[float(i % 4 > 0)] * 8 for i in range(64)])
    assert (alike.low, alike.high) == pytest.approx(proportion_interval(48, 64), abs=0.006)
    generator = torch.Generator().manual_seed(0)
    apart = reward_of(torch.bernoulli(torch.full((64, 8), 0.75), generator=generator).tolist())
    assert 1.96 * math.sqrt(0.75 * 0.25 / 512) < (apart.high - apart.low) / 2 < 0.6 * (alike.high - alike.low) / 2
    perfect = reward_of([[1.0] * 8] * 64)
    assert perfect.low == pytest.approx(proportion_interval(64, 64)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("share", "spread"), [(0.97, 0.0), (0.97, 1.0), (0.6, 0.5)])
def test_intervals_of_several_responses_hold_the_truth(share: float, spread: float) -> None:
    """Simulated: `spread` of the prompts have four equal responses, the others independent ones."""
    generator, covered = torch.Generator().manual_seed(3), 0
    for _ in range(400):
        single = torch.bernoulli(torch.full((60, 4), share), generator=generator)
        chosen = torch.where(torch.rand(60, 1, generator=generator) < spread, single[:, :1].expand(60, 4), single)
        low, high = share_interval(chosen.sum(1).double().numpy(), np.full(60, 4.0), (0.0, 1.0))
        covered += low <= share <= high
    assert covered / 400 > 0.95 - 2 * 0.011


@pytest.mark.parametrize("ties", [0, 20, 64])
def test_a_tie_counts_half_a_win(ties: int) -> None:
    rates = [(0.5, 1.0)] * ties + [(1.0, 1.0)] * (64 - ties)
    figure = figures(records([[0.1 * i] for i in range(64)], win_rate_reference=rates), 100, 0)["win_rate_reference"]
    assert (figure.low, figure.high) == pytest.approx(proportion_interval(64 - ties / 2, 64))
    assert figure.method == "exact"


def test_shares_and_parts_of_rewards_are_exact_too() -> None:
    ones, whole = [(1.0, 1.0)] * 20, [(2.0, 2.0)] * 20
    rewards = [[0.1 * i, 0.2] for i in range(20)]
    measured = figures(records(rewards, truncation_rate=ones, **{"reward_part/right": whole}), 100, 0)
    for name in ("truncation_rate", "reward_part/right"):
        assert (measured[name].low, measured[name].high) == pytest.approx(proportion_interval(20, 20))
    graded = [(0.5 + 0.01 * i, 2.0) for i in range(20)]
    assert figures(records(rewards, **{"reward_part/style": graded}), 100, 0)["reward_part/style"].method == "bootstrap"


def test_the_mean_of_scores_is_such_a_figure() -> None:
    assert mean_figure([[1.0]] * 30, 100).low == pytest.approx(proportion_interval(30, 30)[0])
    assert mean_figure([[0.3 * i] for i in range(30)], 100).method == "bootstrap"


# Differences


def side(values: torch.Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return values.double().numpy(), np.ones(len(values))


def test_two_perfect_figures_may_differ() -> None:
    low, high = difference_interval(side(torch.ones(64)), side(torch.ones(64)), (0.0, 1.0))
    room = 1 - 0.025 ** (1 / 64)
    assert (low, high) == pytest.approx((-room, room), abs=1e-9)


def test_a_reward_that_is_always_the_same_has_no_interval_of_a_difference() -> None:
    ends = difference_interval(side(torch.full((4,), 0.7)), side(torch.full((4,), 0.7)), (0.7, 0.7))
    assert all(map(math.isnan, ends))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "shared"), [(0.5, 0.7, 0.0), (0.9, 0.97, 0.8), (0.99, 0.99, 0.5)])
def test_intervals_of_differences_hold_the_truth(before: float, after: float, shared: float) -> None:
    """Simulated: a share of the prompts is as hard for the one as for the other."""
    generator, covered = torch.Generator().manual_seed(5), 0
    for _ in range(400):
        hard, other = torch.rand(2, 64, generator=generator)
        other = torch.where(torch.rand(64, generator=generator) < shared, hard, other)
        low, high = difference_interval(side(hard < before), side(other < after), (0.0, 1.0))
        covered += low <= after - before <= high
    assert covered / 400 > 0.95 - 2 * 0.011


def test_pairs_make_the_interval_of_a_difference_narrow() -> None:
    values = (torch.arange(200) % 2).bool()
    changed = values.clone()
    changed[:6:2] = True
    paired = difference_interval(side(values), side(changed), (0.0, 1.0))
    apart = difference_interval(side(values), side(changed[torch.randperm(200)]), (0.0, 1.0))
    assert paired[1] - paired[0] < 0.4 * (apart[1] - apart[0])
    scaled = difference_interval(*((2 * top - 1, bottom) for top, bottom in (side(values), side(changed))), (-1.0, 1.0))
    assert scaled == pytest.approx(tuple(2 * end for end in paired), abs=0.08)


def test_pass_at_k_has_an_exact_interval_with_disjoint_groups_as_trials() -> None:
    """64 of 64 prompts say no more than 64 trials, whether of one or of four groups that all agree."""
    for groups in (1.0, 4.0):
        figure = figures(records([[1.0]] * 64, pass_at_4=[(groups, groups)] * 64), 100, 0)["pass_at_4"]
        assert (figure.low, figure.high) == pytest.approx(proportion_interval(64, 64))
        assert (figure.value, figure.method) == (1.0, "exact")
    best = figures(records([[0.3 * i] for i in range(9)], best_of_2=[(0.3 * i, 1.0) for i in range(9)]), 100, 0)
    assert best["best_of_2"].method == "bootstrap"
