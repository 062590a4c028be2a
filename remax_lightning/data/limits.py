"""Values and lengths that are out of their limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from remax_lightning.data.preparation import PreparedExamples
from remax_lightning.errors import DataError, UserError


def check_at_least(least: int, **values: int) -> None:
    """Check that every value is at least `least`; the names are keys under `data`.

    Raises:
        UserError: if one is below.
    """
    for name, value in values.items():
        if value < least:
            raise UserError(f"data.{name} must be at least {least}, got {value}")


class Limit(NamedTuple):
    """A limit in tokens.

    Args:
        parts: fields of an example, of which the longest counts; `prompt` is its prompt.
        tokens: the most that are taken.
        key: its configuration key, for messages.
        policy: what happens to an example beyond it.
    """

    parts: Sequence[str]
    tokens: int
    key: str
    policy: Literal["drop", "error"]


def within_limit(examples: PreparedExamples, limit: Limit) -> PreparedExamples:
    """Return the examples that are within a limit, and say in one line how many are not.

    Raises:
        DataError: if its policy is `error` and one is too long, or if none is left.
    """
    key = f"{limit.key}={limit.tokens}"
    lengths = np.max([examples.lengths(part) for part in limit.parts], axis=0)  # [N]
    fits = lengths <= limit.tokens  # [N]
    total, dropped = len(examples), int((~fits).sum())
    if dropped and limit.policy == "error":
        first = int(np.argmin(fits))
        raise DataError(
            f"{examples.where(first)}: {lengths[first]} tokens, over {key}, and so are {dropped} of "
            f"{total} rows; raise the limit, shorten them, or set data.loading.long_prompts: drop"
        )
    message = f"{examples.rows.source}: dropped {dropped} of {total} rows, longer than {key} tokens"
    if dropped == total:
        raise DataError(f"{message}; none is left, the shortest has {lengths.min()} tokens: raise the limit")
    if dropped * 2 > total:
        rank_zero_warn(f"{message}: that is more than half of them")
    else:
        rank_zero_info(message)
    return examples.select(fits)
