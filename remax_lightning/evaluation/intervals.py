"""From what was measured on each prompt to figures with intervals, and to a table of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from remax_lightning.evaluation.statistics import percentile_interval, proportion_interval, resampled_ratios
from remax_lightning.files import PromptRecord

CONFIDENCE = 0.95

MEANINGS = {
    "reward": "of sampled responses",
    "baseline_reward": "of greedy responses",
    "reference_reward": "of the reference's sampled responses",
    "chosen_reward": "of the data set's responses",
    "win_rate_reference": "sampled responses over the reference's, under the reward",
    "win_rate_chosen": "sampled responses over the data set's, under the reward",
    "kl": "to the reference, nats per token",
    "kl_per_response": "to the reference, nats per response",
    "entropy": "of the policy, nats per token",
    "response_length": "tokens",
    "truncation_rate": "share of responses cut at the length limit",
    "perplexity": "of the policy, per token of held-out text",
    "reference_perplexity": "of the reference, on the same text",
}
"""The figures in the order of the table, and what they are."""


REWARDS = {"reward": "sampled", "baseline_reward": "greedy", "reference_reward": "reference", "chosen_reward": "chosen"}
"""Figures that are means of rewards, and whose responses they are of."""

_REPEATED = {
    "pass_at_": "{k} sampled responses, one of which passes",
    "maj_at_": "{k} sampled responses, whose most frequent answer passes",
    "best_of_": "highest reward of {k} sampled responses",
}
"""Figures of several responses by the beginning of their names."""

Method = Literal["exact", "bootstrap"]
Side: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]
"""`[P]` sums of one evaluation, and the numbers of responses in them."""


def meaning_of(name: str) -> str:
    """Return what a figure is, in a few words; empty where its name says it."""
    for start, meaning in _REPEATED.items():
        if name.startswith(start):
            return meaning.format(k=name.removeprefix(start))
    return MEANINGS.get(name, "")


class Figure(NamedTuple):
    """A figure with its interval.

    Args:
        value: the figure; None where it is not finite.
        low: lower end of the interval; None with fewer than two prompts, and for a reward that is the same for every
            response, because it does not show which values the reward can take.
        high: upper end.
        n: prompts, or pieces of a text, that it was measured on.
        method: how the interval was made: `exact` (Clopper and Pearson's) or `bootstrap`.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: Method | None = None


class RecordSums(NamedTuple):
    """The sums of records, side by side.

    Args:
        names: the `F` figures.
        numerators: `[P, F]` float64, one row per record.
        denominators: `[P, F]` float64, 0 where a record has nothing of a figure.
    """

    names: list[str]
    numerators: NDArray[np.float64]
    denominators: NDArray[np.float64]

    def values(self) -> NDArray[np.float64]:
        """Return the `[F]` figures."""
        with np.errstate(divide="ignore", invalid="ignore"):  # NaN where no record has the figure
            ratios = self.numerators.sum(0) / self.denominators.sum(0)
        return ratios_to_figures(self.names, ratios)

    def resampled(self, num_resamples: int, seed: int) -> NDArray[np.float64]:
        """Return `[K, F]` figures of as many draws of records."""
        drawn = resampled_ratios(self.numerators, self.denominators, num_resamples, seed)
        return ratios_to_figures(self.names, drawn)


def ratios_to_figures(names: Sequence[str], ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ratios `[..., F]` as figures: a perplexity is the exponential of nats per token."""
    is_perplexity = np.array([name.endswith("perplexity") for name in names], dtype=bool)
    with np.errstate(over="ignore"):
        return np.where(is_perplexity, np.exp(ratios), ratios)


def collect_sums(records: Sequence[PromptRecord], names: Iterable[str] | None = None) -> RecordSums:
    """Return the sums of at least one record.

    Args:
        records: one row each.
        names: the figures; None for all that there are, in the order of the table.
    """
    # An advantage is what a step trains on, and no measure of a policy.
    measured = {name: None for record in records for name in record.sums if name != "advantage"}
    ordered = [name for name in MEANINGS if name in measured] + [name for name in measured if name not in MEANINGS]
    chosen = ordered if names is None else list(names)
    sums = [[record.sums.get(name, (0.0, 0.0)) for name in chosen] for record in records]
    pairs = np.array(sums, dtype=np.float64).reshape(len(records), len(chosen), 2)
    return RecordSums(chosen, pairs[..., 0], pairs[..., 1])


def figures(records: Sequence[PromptRecord], num_resamples: int, seed: int) -> dict[str, Figure]:
    """Return the figures with their intervals; none without a record.

    Shares, win rates and rewards that take two values have an exact interval, the other figures a bootstrap interval.
    """
    if not records:
        return {}
    # ---- One set of draws for all figures, so that a comparison of figures is paired ----
    sums = collect_sums(records)
    ends = percentile_interval(sums.resampled(num_resamples, seed), CONFIDENCE).tolist()
    figures_by_name = {}
    # ---- Exact intervals where the counts allow them, the bootstrap's elsewhere ----
    for i, (name, value, end) in enumerate(zip(sums.names, sums.values().tolist(), ends, strict=True)):
        numerators, denominators = sums.numerators[:, i], sums.denominators[:, i]  # [P]
        if count := int((denominators > 0).sum()):
            support = two_values(name, records, numerators, denominators)
            method: Method = "bootstrap" if support is None else "exact"
            limits = end if support is None else share_interval(numerators, denominators, support)
            figures_by_name[name] = with_interval(value, limits, count, method)
    return figures_by_name


def mean_figure(scores: Sequence[Sequence[float]], num_resamples: int, seed: int = 0) -> Figure:
    """Return the mean of scores with its interval.

    Args:
        scores: those of one prompt are one list.
        num_resamples: draws of the bootstrap, where the scores take more than two values.
        seed: of the draws.
    """
    records = [
        PromptRecord(None, "", {}, {"sampled": list(row)}, {"reward": (sum(row), float(len(row)))}) for row in scores
    ]
    return figures(records, num_resamples, seed)["reward"]


def with_interval(value: float, ends: Sequence[float], count: int, method: Method = "bootstrap") -> Figure:
    """Return a figure with its interval; None for a value or an end that is not finite."""
    low, high = map(finite_or_none, ends if count > 1 else (math.nan, math.nan))
    return Figure(finite_or_none(value), low, high, count, None if low is None else method)


# ---- Shares ----


def two_values(
    name: str, records: Sequence[PromptRecord], numerators: NDArray[np.float64], denominators: NDArray[np.float64]
) -> tuple[float, float] | None:
    """Return the two values that a response can have in a figure, the lower first; None if it can have others.

    A response hits the length limit or not, and wins a comparison or not. Rewards say themselves which values they
    take; a pair of equal values stands for a reward that is always the same, and neither 0 nor 1.

    Args:
        name: of the figure.
        records: what was measured.
        numerators: `[P]` sums of the figure.
        denominators: `[P]` responses, or comparisons, in each sum.
    """
    # ---- By definition ----
    if name == "truncation_rate" or "win_rate" in name or name.startswith(("pass_at_", "maj_at_")):
        return 0.0, 1.0
    if name in REWARDS or name.startswith("best_of_"):
        whose = REWARDS.get(name, "sampled")
        rewards = {reward for record in records for reward in record.rewards.get(whose, ())}
    elif name.startswith("reward_part/"):
        measured = denominators > 0
        tops, bottoms = numerators[measured], denominators[measured]
        # A record has the sum of a part. It tells the values only of one response, or of zeros and ones.
        if (bottoms > 1).any() and ((tops != tops.round()) | (tops < 0) | (tops > bottoms)).any():
            return None
        rewards = {0.0, 1.0} if (bottoms > 1).any() else set(tops.tolist())
    else:
        return None
    # ---- By the values that were seen: a verifier's rewards are 0 and 1 even where all of them are 1 ----
    if rewards and rewards <= {0.0, 1.0}:
        return 0.0, 1.0
    return (min(rewards), max(rewards)) if 1 <= len(rewards) <= 2 else None


def share_interval(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64], support: tuple[float, float]
) -> tuple[float, float]:
    """Return the exact interval of a mean of numbers that take two values.

    Several responses to one prompt are alike, so that they tell less than as many prompts. The number of trials is then
    the one at which independent trials would vary as the prompts do (Korn and Graubard 1998, Survey Methodology 24):
    between the number of prompts and that of responses. A tie of a win rate counts half a win, which makes the interval
    a little wider than need be, never too narrow.

    Args:
        numerators: `[P]` sums.
        denominators: `[P]` responses, or comparisons, in each.
        support: the two values; if they are equal, both ends are NaN.
    """
    least, largest = support
    if least == largest:
        return math.nan, math.nan
    # Map the two values to 0 and 1, take the interval of the share, and map it back.
    wins = (numerators - least * denominators) / (largest - least)  # [P]
    share, trials = float(wins.sum() / denominators.sum()), _effective_trials(wins, denominators)
    low, high = proportion_interval(min(1.0, max(0.0, share)) * trials, trials, CONFIDENCE)
    return least + (largest - least) * low, least + (largest - least) * high


def _effective_trials(wins: NDArray[np.float64], trials: NDArray[np.float64]) -> float:
    prompts, total = float((trials > 0).sum()), float(trials.sum())
    if prompts < 2 or total <= prompts:
        return prompts
    # The variance of a ratio of sums over prompts, with the correction for few prompts.
    share = float(wins.sum()) / total
    variance = float(np.square(wins - share * trials).sum()) / total**2 * prompts / (prompts - 1)
    if variance == 0:  # all prompts agree: at 0 or 1 nothing says that their responses are not alike
        return total if 0 < share < 1 else prompts
    return min(total, max(prompts, share * (1 - share) / variance))


def difference_interval(first: Side, second: Side, support: tuple[float, float]) -> tuple[float, float]:
    """Return the interval of the second mean minus the first, of numbers that take two values, on the same prompts.

    From the interval of each and the correlation of the pairs (Newcombe 1998, doi
    10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C, method 10). A bootstrap of two figures that are
    both 64 of 64 would say that they do not differ.

    Args:
        first: `[P]` sums and numbers of responses.
        second: likewise, row by row of the same prompt.
        support: the two values; if they are equal, both ends are NaN.
    """
    if support[0] == support[1]:
        return math.nan, math.nan
    means = [float(top.sum() / bottom.sum()) for top, bottom in (first, second)]
    (low_1, high_1), (low_2, high_2) = (share_interval(*side, support) for side in (first, second))
    # Distances of the ends from each mean: the difference is lowest where the first is high and the second low.
    below_1, above_1, below_2, above_2 = means[0] - low_1, high_1 - means[0], means[1] - low_2, high_2 - means[1]
    correlation = _correlation(first, second)
    below = below_2**2 + above_1**2 - 2 * correlation * below_2 * above_1
    above = above_2**2 + below_1**2 - 2 * correlation * above_2 * below_1
    difference = means[1] - means[0]
    return difference - math.sqrt(max(0.0, below)), difference + math.sqrt(max(0.0, above))


def _correlation(first: Side, second: Side) -> float:
    """Return the correlation of the prompts' means, a positive one lowered as Newcombe does for few prompts."""
    (tops_1, bottoms_1), (tops_2, bottoms_2) = first, second  # [P] each
    # Prompts that both figures were measured on.
    measured = (bottoms_1 > 0) & (bottoms_2 > 0)
    one, two = (tops_1 / bottoms_1)[measured], (tops_2 / bottoms_2)[measured]
    one, two = one - one.mean(), two - two.mean()
    scale, product = math.sqrt(np.square(one).mean() * np.square(two).mean()), float((one * two).mean())
    if scale == 0:
        return 0.0
    # Newcombe takes n / 2 off the ad - bc of a 2 x 2 table: 1 / 2n off the covariance of values that are 0 or 1, and
    # w^2 / 2n of values at the distance w.
    width = max(float(values.max() - values.min()) for values in (one, two))
    return (max(0.0, product - width**2 / (2 * len(one))) if product > 0 else product) / scale


# ---- Text ----


def finite_or_none(value: float) -> float | None:
    """Return a number as JSON has it, which knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns, the first and the last of them on the left, numbers on the right."""
    last = len(rows[0]) - 1
    widths = [max(len(row[column]) for row in rows) for column in range(last + 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if column in (0, last) else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def format_number(value: float | None) -> str:
    """Return a number in about four digits; a dash for none."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
    return f"{value:.2e}"


def intervals_are(num_resamples: int) -> str:
    """Return how intervals are made, for the heading of a table."""
    return f"intervals exact for shares (0 or 1 for each response), else of {num_resamples} draws of prompts"


def format_interval(figure: Figure) -> str:
    """Return the interval in words; a dash for none."""
    return (
        "-"
        if figure.low is None or figure.high is None
        else f"{format_number(figure.low)} to {format_number(figure.high)}"
    )
