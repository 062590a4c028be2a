"""Win rates, figures of several responses, and how sure a figure is: bootstrap and exact intervals.

In numpy: `remax compare` needs these alone, and starts in a tenth of the time that importing torch takes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ENTRIES_AT_ONCE = 2**22
"""Counts that a part of the resamples may take, 32 MiB in float64."""
ROUNDED_DIGITS = 6
"""Decimal places of a count of trials or successes; what is behind them is rounding."""


def win_rates(rewards: ArrayLike, other_rewards: ArrayLike) -> NDArray[np.float64]:
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
    one = _as_table("rewards", rewards, "[B, n]", (None, None))
    other = _as_table("other_rewards", other_rewards, "[B, m]", (len(one), None))
    difference = one[:, :, None] - other[:, None, :]  # [B, n, m]
    rates: NDArray[np.float64] = ((np.sign(difference) + 1) / 2).mean((1, 2))
    return rates


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
    _check(1 <= k <= num_samples, "k", f"between 1 and num_samples={num_samples}", k)
    _check(0 <= num_passed <= num_samples, "num_passed", f"between 0 and {num_samples}", num_passed)
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def best_of_k(rewards: Sequence[float], k: int) -> float:
    """Return the expected largest reward of `k` responses: its mean over all subsets of `k`, without bias.

    Args:
        rewards: of the `n` responses to a prompt.
        k: responses that the best is chosen of, at most `n`.

    Raises:
        ValueError: if `k` is out of its range.
    """
    _check(1 <= k <= len(rewards), "k", f"between 1 and the {len(rewards)} rewards", k)
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
    _check(len(answers) == len(passed), "passed", f"as long as the {len(answers)} answers", len(passed))
    votes: dict[Hashable, list[bool]] = {}
    for answer, passes in zip(answers, passed, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(passes)
    most = max(map(len, votes.values()), default=0)
    winners = [passes for passes in votes.values() if len(passes) == most]
    return sum(map(sum, winners)) / (most * len(winners)) if winners else 0.0


def resampled_ratios(
    numerators: ArrayLike, denominators: ArrayLike, num_resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return ratios of sums over clusters that are drawn anew, with replacement and as many as there are.

    The bootstrap of Efron (1979, doi 10.1214/aos/1176344552) over clusters: what belongs together, such as the samples
    of one prompt, is drawn together. All columns share the draws, so that differences between them are paired.

    Args:
        numerators: `[P, F]` one column per figure, one row per cluster.
        denominators: `[P, F]` likewise, 0 where a cluster has no part in a figure.
        num_resamples: draws, `K`.
        seed: of the draws, which are those of `torch.randint` under this seed.

    Returns:
        `[K, F]` float64, NaN where a draw has nothing of a figure.

    Raises:
        ValueError: if the shapes do not fit, there is no cluster or no draw.
    """
    tops = _as_table("numerators", numerators, "[P, F]", (None, None))
    bottoms = _as_table("denominators", denominators, "[P, F]", tops.shape)
    _check(len(tops) >= 1, "numerators", "at least one row", len(tops))
    _check(num_resamples >= 1, "num_resamples", "at least 1", num_resamples)
    clusters, sums = len(tops), np.concatenate([tops, bottoms], 1)  # [P, 2 F]
    # The Mersenne Twister's words of 32 bits modulo P, as torch draws them.
    stream = np.random.RandomState(seed % 2**32)
    sums_of_draws = []  # [k, 2 F] of each part
    at_once = max(1, _ENTRIES_AT_ONCE // clusters)
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)  # k
        drawn = stream.randint(0, 2**32, (size, clusters), dtype=np.uint32) % clusters  # [k, P]
        # How often each cluster is drawn; the product with the sums adds up the draws.
        places = drawn + clusters * np.arange(size)[:, None]
        counts = np.bincount(places.ravel(), minlength=size * clusters).reshape(size, clusters)
        sums_of_draws.append(counts.astype(np.float64) @ sums)
    top, bottom = np.split(np.concatenate(sums_of_draws), 2, axis=1)  # [K, F] each
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom == 0, np.nan, top / bottom)


def percentile_interval(resampled: ArrayLike, confidence: float = 0.95) -> NDArray[np.float64]:
    """Return the bootstrap's percentile interval of each figure.

    Args:
        resampled: `[K, F]` figures of `K` draws; NaN are left out.
        confidence: share of the draws that lies inside.

    Returns:
        `[F, 2]` its lower and upper ends, NaN where there was nothing.

    Raises:
        ValueError: if the shape does not fit, or `confidence` is not between 0 and 1.
    """
    figures = _as_table("resampled", resampled, "[K, F]", (None, None))
    _check(0 < confidence < 1, "confidence", "above 0 and below 1", confidence)
    shares = (1 - confidence) / 2, (1 + confidence) / 2
    if figures.size and not np.isnan(figures).any():
        return np.quantile(figures, shares, axis=0).T
    ends = np.full((figures.shape[1], 2), np.nan)  # [F, 2]
    for i, column in enumerate(figures.T):
        known = column[~np.isnan(column)]
        if known.size:
            ends[i] = np.quantile(known, shares)
    return ends


class CheapestBaseline(NamedTuple):
    """The baseline that needs the least time for a gradient of the same precision; as text, a sentence.

    Args:
        name: its short name.
        used: the one that it is divided by, or "the one in use" where several have the same figures.
        value: its share of the seconds.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    name: str
    used: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Say it."""
        interval = f"(95\N{NO-BREAK SPACE}%: {self.low:.2f} to {self.high:.2f})"
        of_used = f"{self.value:.2f} of the seconds of {self.used}"
        return f"{self.name} needs {of_used} for a gradient of the same precision {interval}"


def cheapest_baseline(metrics: Mapping[str, float]) -> CheapestBaseline | None:
    """Return the cheapest baseline of the figures of `GradientVariance`; None where there are none, or it is in use.

    Args:
        metrics: by the key that they are logged under; others are left alone.
    """
    prefix = "train/variance_seconds/"
    costs = {key.removeprefix(prefix): float(value) for key, value in metrics.items() if key.startswith(prefix)}
    costs = {name: value for name, value in costs.items() if math.isfinite(value)}
    ends = {
        name: [float(metrics.get(f"train/variance_seconds_{end}/{name}", math.nan)) for end in ("low", "high")]
        for name in costs
    }
    # The one in use is divided by itself, whatever is drawn; so are those that have had the same values, as
    # `cached_greedy` has in the first epoch.
    used = [name for name, value in costs.items() if value == 1 and ends[name] == [1, 1]]
    if not used:
        return None
    best = min(costs, key=lambda name: costs[name])
    name = used[0] if len(used) == 1 else "the one in use"
    return None if best in used else CheapestBaseline(best, name, costs[best], *ends[best])


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
    _check(trials >= 1, "trials", "at least 1", trials)
    _check(0 <= successes <= trials, "successes", "between 0 and trials", successes)
    _check(0 < confidence < 1, "confidence", "above 0 and below 1", confidence)
    # Whole numbers only: fewer trials, and successes rounded to either side, make the interval wider. A share times a
    # number is whole up to rounding: 15 / 22 * 22 is just below 15.
    successes, trials = (round(number, ROUNDED_DIGITS) for number in (successes, trials))
    whole, tail = math.floor(trials), (1 - confidence) / 2
    fewest, most = min(whole, math.floor(successes)), min(whole, math.ceil(successes))
    return _lower_end(fewest, whole, tail), 1 - _lower_end(whole - most, whole, tail)


def _lower_end(successes: int, trials: int, tail: float) -> float:
    """Return the proportion under which so many successes, or more, have the probability `tail`."""
    if successes == 0:
        return 0.0
    # The tail is a sum of binomial probabilities, in logs, because binomial coefficients overflow.
    counts = np.arange(successes, trials + 1)
    log_ways = [-math.lgamma(count + 1) - math.lgamma(trials - count + 1) for count in counts.tolist()]
    coefficients = math.lgamma(trials + 1) + np.array(log_ways)
    low, high = 0.0, 1.0
    for _ in range(50):  # halvings: the digits of a float64
        middle = (low + high) / 2
        log_probs = coefficients + counts * math.log(middle) + (trials - counts) * math.log1p(-middle)
        largest = log_probs.max()
        log_tail = largest + math.log(np.exp(log_probs - largest).sum())
        low, high = (middle, high) if log_tail < math.log(tail) else (low, middle)
    return low


def _as_table(name: str, values: ArrayLike, letters: str, expected: tuple[int | None, ...]) -> NDArray[np.float64]:
    """Return values in float64; refuse another shape than `expected`, None for any size."""
    table = np.asarray(values, dtype=np.float64)
    if len(table.shape) == len(expected) and all(
        want in (None, have) for want, have in zip(expected, table.shape, strict=True)
    ):
        return table
    known = ", ".join("any" if size is None else str(size) for size in expected)
    raise ValueError(f"{name} must have shape {letters} = [{known}], got {list(table.shape)}")


def _check(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got}")
