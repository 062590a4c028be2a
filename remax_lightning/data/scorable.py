"""What a reward says of the rows before any model is loaded: those that it refuses stop the run, or are left out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from remax_lightning.data.reading import Row, count_reasons
from remax_lightning.data.records import PreparedExamples
from remax_lightning.errors import DataError

_PART = 1000
"""Rows that a reward is shown at once; of these it always sees the first."""
_SECONDS = 5.0
"""Time for all of them, after which no further part begins: enough for 100,000 rows and a check of 20 us."""


class ChecksRows(Protocol):
    """What is known of a reward here; `remax_lightning.rewards.Reward` describes it."""

    @property
    def checks_rows(self) -> bool:
        """Whether it looks at rows."""

    def check_rows(self, rows: Sequence[Row], places: Sequence[str]) -> None:
        """Refuse rows that it cannot score."""

    def refused_rows(self, rows: Sequence[Row], places: Sequence[str]) -> dict[int, str]:
        """Return what is wrong with those that it cannot score, by index."""


def check_examples(examples: PreparedExamples, reward: ChecksRows) -> None:
    """Refuse examples that a reward cannot score: it sees as many as it can in a few seconds.

    Raises:
        UserError: for the first one.
    """
    end = time.monotonic() + _SECONDS
    for start, rows, places in _parts(examples):
        if start and time.monotonic() > end:
            rank_zero_info(
                f"{examples.rows.source}: the reward has looked at {start:,} of {len(examples):,} rows before training,"
                f" in {_SECONDS:g} s; one of the others that it cannot score ends the run when its turn comes"
            )
            return
        reward.check_rows(rows, places)


def scorable_examples(examples: PreparedExamples, reward: ChecksRows) -> PreparedExamples:
    """Return the examples that a reward can score, and say in one line how many it cannot, and why.

    It sees all of them, whatever time that takes, so that all ranks leave out the same.

    Raises:
        DataError: if none is left.
    """
    problems: dict[int, str] = {}
    for start, rows, places in _parts(examples):
        problems |= {start + index: problem for index, problem in reward.refused_rows(rows, places).items()}
    if not problems:
        return examples
    # ---- Which ones, and why ----
    source, total = examples.rows.source, len(examples)
    reasons = count_reasons(Counter(_reason(problem, examples.where(index)) for index, problem in problems.items()))
    if len(problems) == total:
        raise DataError(
            f"{source}: the reward refuses all of {total} rows: {reasons}. It says of the first: {problems[0]}"
        )
    left_out = f"dropped {len(problems)} of {total} rows that the reward refuses (data.loading.on_bad_row)"
    rank_zero_warn(f"{source}: {left_out}: {reasons}")
    return examples.select(np.array([index not in problems for index in range(total)]))


def _parts(examples: PreparedExamples) -> Iterator[tuple[int, list[Row], list[str]]]:
    """Yield the rows in parts, each with the index of its first row and with where they stand."""
    for start in range(0, len(examples), _PART):
        stop = min(start + _PART, len(examples))
        yield start, examples.rows_between(start, stop), [examples.where(index) for index in range(start, stop)]


def _reason(problem: str, place: str) -> str:
    """Return what is wrong without the place, so that rows with the same mistake are counted together."""
    return DataError(problem.replace(f"{place}: ", "").replace(f" for {place}", "")).reason
