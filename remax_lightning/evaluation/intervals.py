"""From what was measured on each prompt to figures with intervals, and to a table of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from remax_lightning.functional import percentile_interval, resampled_ratios
from remax_lightning.types import PromptRecord

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


class Figure(NamedTuple):
    """A figure with its interval.

    Args:
        value: the figure; None where it is not finite.
        low: lower end of the interval; None where there are fewer than two prompts to draw from.
        high: upper end.
        n: prompts, or pieces of a text, that it was measured on.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


class RecordSums(NamedTuple):
    """The sums of records, side by side.

    Args:
        names: the `F` figures.
        numerators: `[P, F]` float64, one row per record.
        denominators: `[P, F]` float64, 0 where a record has nothing of a figure.
    """

    names: list[str]
    numerators: Tensor
    denominators: Tensor

    def values(self) -> Tensor:
        """Return the `[F]` figures."""
        return ratios_to_figures(self.names, self.numerators.sum(0) / self.denominators.sum(0))

    def resampled(self, num_resamples: int, seed: int) -> Tensor:
        """Return `[K, F]` figures of as many draws of records."""
        generator = torch.Generator().manual_seed(seed)
        drawn = resampled_ratios(self.numerators, self.denominators, num_resamples, generator)
        return ratios_to_figures(self.names, drawn)


def ratios_to_figures(names: Sequence[str], ratios: Tensor) -> Tensor:
    """Return ratios `[..., F]` as figures: a perplexity is the exponential of nats per token."""
    is_perplexity = torch.tensor([name.endswith("perplexity") for name in names])
    return torch.where(is_perplexity, ratios.exp(), ratios)


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
    pairs = torch.tensor(
        [[record.sums.get(name, (0.0, 0.0)) for name in chosen] for record in records], dtype=torch.float64
    ).view(len(records), len(chosen), 2)
    return RecordSums(chosen, *pairs.unbind(-1))


def figures(records: Sequence[PromptRecord], num_resamples: int, seed: int) -> dict[str, Figure]:
    """Return the figures with their bootstrap intervals; none without a record."""
    if not records:
        return {}
    sums = collect_sums(records)
    ends = percentile_interval(sums.resampled(num_resamples, seed), CONFIDENCE).tolist()
    counts = (sums.denominators > 0).sum(0).tolist()
    return {
        name: with_interval(value, end, count)
        for name, value, end, count in zip(sums.names, sums.values().tolist(), ends, counts, strict=True)
        if count
    }


def with_interval(value: float, ends: Sequence[float], count: int) -> Figure:
    """Return a figure with its interval, None in the place of what there is not."""
    low, high = ends if count > 1 else (math.nan, math.nan)
    return Figure(finite_or_none(value), finite_or_none(low), finite_or_none(high), count)


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


def format_interval(figure: Figure) -> str:
    """Return the interval in words; a dash for none."""
    return (
        "-"
        if figure.low is None or figure.high is None
        else f"{format_number(figure.low)} to {format_number(figure.high)}"
    )
