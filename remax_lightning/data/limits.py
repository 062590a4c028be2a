"""Values and lengths that are out of their limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from remax_lightning.errors import DataError, UserError


class Placed(Protocol):
    """Something that knows where in its source it stands."""

    @property
    def where(self) -> str:
        """Its place, for messages."""


AnyExample = TypeVar("AnyExample", bound=Placed)


def check_at_least(least: int, **values: int) -> None:
    """Check that every value is at least `least`; the names are keys under `data`.

    Raises:
        UserError: if one is below.
    """
    for name, value in values.items():
        if value < least:
            raise UserError(f"data.{name} must be at least {least}, got {value}")


def within_limit(
    examples: Sequence[AnyExample],
    lengths: Sequence[int],
    limit: int,
    *,
    key: str,
    source: str,
    policy: Literal["drop", "error"],
) -> list[AnyExample]:
    """Return the examples that are within a limit in tokens, and say in one line how many are not.

    Raises:
        DataError: if `policy` is `error` and one is too long, or if none is left.
    """
    fitting = [example for example, length in zip(examples, lengths, strict=True) if length <= limit]
    dropped = len(examples) - len(fitting)
    if dropped and policy == "error":
        first = next(i for i, length in enumerate(lengths) if length > limit)
        raise DataError(
            f"{examples[first].where}: {lengths[first]} tokens, over {key}={limit}, and so are {dropped} of "
            f"{len(examples)} rows; raise the limit, shorten them, or set data.loading.long_prompts: drop"
        )
    message = f"{source}: dropped {dropped} of {len(examples)} rows, longer than {key}={limit} tokens"
    if not fitting:
        raise DataError(f"{message}; none is left, the shortest has {min(lengths)} tokens: raise the limit")
    if dropped * 2 > len(examples):
        rank_zero_warn(f"{message}: that is more than half of them")
    else:
        rank_zero_info(message)
    return fitting
