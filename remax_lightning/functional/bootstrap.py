"""Win rates, figures of several responses, and how sure a figure is: bootstrap and exact intervals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from remax_lightning.functional.masking import check_argument, check_shape

_ENTRIES_AT_ONCE = 2**22
"""Counts that a part of the resamples may take, 32 MiB in float64."""


def win_rates(rewards: Tensor, other_rewards: Tensor) -> Tensor:
    """Return the share of comparisons that `rewards` wins; a tie counts one half.

    Every response is compared with every one of the other side to the same prompt, which uses all of them.

    Args:
        rewards: `[B, n]` rewards of responses to `B` prompts.
        other_rewards: `[B, m]` rewards of the responses that they are compared with.

    Returns:
        `[B]` float64 between 0 and 1.

    Raises:
        ValueError: if the shapes do not fit.
    """
    check_shape("rewards", rewards, "[B, n]", (None, None))
    check_shape("other_rewards", other_rewards, "[B, m]", (rewards.shape[0], None))
    difference = rewards.unsqueeze(2) - other_rewards.unsqueeze(1)  # [B, n, m]
    return ((difference.sign().double() + 1) / 2).mean((1, 2))


def pass_at_k(num_passed: int, num_samples: int, k: int) -> float:
    """Return the probability that at least one of `k` responses passes, without bias.

    `1 - C(n - c, k) / C(n, k)`, the share of all subsets of `k` that hold one that passed (Chen et al. 2021, arXiv
    2107.03374).

    Args:
        num_passed: responses that passed, `c`.
        num_samples: responses to the prompt, `n`.
        k: responses that are looked at, at most `n`.

    Raises:
        ValueError: if a number is out of its range.
    """
    check_argument(1 <= k <= num_samples, "k", f"between 1 and num_samples={num_samples}", k)
    check_argument(0 <= num_passed <= num_samples, "num_passed", f"between 0 and {num_samples}", num_passed)
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def best_of_k(rewards: Sequence[float], k: int) -> float:
    """Return the expected largest reward of `k` responses: its mean over all subsets of `k`, without bias.

    Args:
        rewards: of the `n` responses to a prompt.
        k: responses that the best is chosen of, at most `n`.

    Raises:
        ValueError: if `k` is out of its range.
    """
    check_argument(1 <= k <= len(rewards), "k", f"between 1 and the {len(rewards)} rewards", k)
    subsets = math.comb(len(rewards), k)
    # The i-th smallest reward is the largest of its subset where the other k - 1 are of the i below it.
    return math.fsum(reward * (math.comb(i, k - 1) / subsets) for i, reward in enumerate(sorted(rewards)))


def majority_vote(answers: Sequence[Hashable | None], passed: Sequence[bool]) -> float:
    """Return whether the most frequent answer passes, 0 or 1; of several, the mean, as a drawn one would.

    Args:
        answers: of the responses to a prompt; None casts no vote.
        passed: whether each response passes. An answer that passes in one response and fails in another counts as the
            share of its responses that pass.

    Raises:
        ValueError: if the two are not equally long.
    """
    check_argument(len(answers) == len(passed), "passed", f"as long as the {len(answers)} answers", len(passed))
    votes: dict[Hashable, list[bool]] = {}
    for answer, passes in zip(answers, passed, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(passes)
    most = max(map(len, votes.values()), default=0)
    winners = [passes for passes in votes.values() if len(passes) == most]
    return sum(map(sum, winners)) / (most * len(winners)) if winners else 0.0


def resampled_ratios(
    numerators: Tensor, denominators: Tensor, num_resamples: int, generator: torch.Generator
) -> Tensor:
    """Return ratios of sums over clusters that are drawn anew, with replacement and as many as there are.

    The bootstrap of Efron (1979, doi 10.1214/aos/1176344552) over clusters: what belongs together, such as the samples
    of one prompt, is drawn together. All columns share the draws, so that differences between them are paired.

    Args:
        numerators: `[P, F]` one column per figure, one row per cluster.
        denominators: `[P, F]` likewise, 0 where a cluster has no part in a figure.
        num_resamples: draws, `K`.
        generator: source of randomness, on the CPU.

    Returns:
        `[K, F]` float64, NaN where a draw has nothing of a figure.

    Raises:
        ValueError: if the shapes do not fit, there is no cluster or no draw.
    """
    check_shape("numerators", numerators, "[P, F]", (None, None))
    check_shape("denominators", denominators, "[P, F]", numerators.shape)
    check_argument(len(numerators) >= 1, "numerators", "at least one row", len(numerators))
    check_argument(num_resamples >= 1, "num_resamples", "at least 1", num_resamples)
    clusters, sums = len(numerators), torch.cat([numerators, denominators], 1).double()
    sums_of_draws: list[Tensor] = []  # [k, 2 F] of each part
    for part in torch.arange(num_resamples).split(max(1, _ENTRIES_AT_ONCE // clusters)):
        drawn = torch.randint(clusters, (len(part), clusters), generator=generator)  # [k, P]
        # How often each cluster is drawn; the product with the sums [P, 2 F] adds up the draws.
        counts = torch.zeros(len(part), clusters, dtype=torch.float64)
        sums_of_draws.append(counts.scatter_add_(1, drawn, torch.ones_like(counts)) @ sums)
    top, bottom = torch.cat(sums_of_draws).chunk(2, 1)  # [K, F] each
    return (top / bottom).masked_fill(bottom == 0, torch.nan)


def percentile_interval(resampled: Tensor, confidence: float = 0.95) -> Tensor:
    """Return the bootstrap's percentile interval of each figure.

    Args:
        resampled: `[K, F]` figures of `K` draws; NaN are left out.
        confidence: share of the draws that lies inside.

    Returns:
        `[F, 2]` its lower and upper ends, NaN where there was nothing.

    Raises:
        ValueError: if the shape does not fit, or `confidence` is not between 0 and 1.
    """
    check_shape("resampled", resampled, "[K, F]", (None, None))
    check_argument(0 < confidence < 1, "confidence", "above 0 and below 1", confidence)
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    # One after the other: torch takes no more than 2^24 entries at once.
    return torch.stack([column.nanquantile(ends) for column in resampled.double().unbind(1)])


def proportion_interval(successes: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a proportion (Clopper and Pearson 1934, doi 10.1093/biomet/26.4.404).

    It holds the true proportion at least as often as `confidence` says, at any number of trials. A bootstrap does not:
    of 64 successes in 64 trials every draw is the same. Parts of a success or of a trial make the interval wider.

    Args:
        successes: number of successes; a half where a comparison was tied.
        trials: number of independent trials, or an effective number of them.
        confidence: how often the interval holds the true proportion, at least.

    Returns:
        Its lower and upper ends.

    Raises:
        ValueError: if there is no whole trial, or `successes` or `confidence` is out of its range.
    """
    check_argument(trials >= 1, "trials", "at least 1", trials)
    check_argument(0 <= successes <= trials, "successes", "between 0 and trials", successes)
    check_argument(0 < confidence < 1, "confidence", "above 0 and below 1", confidence)
    # Whole numbers only: fewer trials, and successes rounded to either side, make the interval wider.
    whole, tail = math.floor(trials), (1 - confidence) / 2
    fewest, most = min(whole, math.floor(successes)), min(whole, math.ceil(successes))
    return _lower_end(fewest, whole, tail), 1 - _lower_end(whole - most, whole, tail)


def _lower_end(successes: int, trials: int, tail: float) -> float:
    """Return the proportion under which so many successes, or more, have the probability `tail`."""
    if successes == 0:
        return 0.0
    # The tail is a sum of binomial probabilities, in logs, because binomial coefficients overflow.
    counts = torch.arange(successes, trials + 1, dtype=torch.float64)
    coefficients = math.lgamma(trials + 1) - (counts + 1).lgamma() - (trials - counts + 1).lgamma()
    low, high = 0.0, 1.0
    for _ in range(50):  # halvings: the digits of a float64
        middle = (low + high) / 2
        log_probs = coefficients + counts * math.log(middle) + (trials - counts) * math.log1p(-middle)
        low, high = (middle, high) if float(log_probs.logsumexp(0)) < math.log(tail) else (low, middle)
    return low
