"""One data set over the three stages, each row in one of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

from remax_lightning.data.reading import Rows
from remax_lightning.errors import DataError, UserError

Stage = Literal["supervised", "reward_model", "remax"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_KEY = "data.loading.stage_split"


def check_stage_split(shares: Sequence[float] | None, stage: Stage | None, name: str) -> None:
    """Check that shares can be dealt out, and that the data module `name` has one.

    Raises:
        UserError: if not.
    """
    if shares is None:
        return
    usable = len(shares) == len(STAGES) and all(math.isfinite(share) and share >= 0 for share in shares)
    if not usable or sum(shares) <= 0:
        raise UserError(
            f"{_KEY} must be three shares of 0 or more, for {', '.join(STAGES)}, as [2, 4, 4] is; got"
            f" {_format_shares(shares)}"
        )
    if stage is None:
        raise UserError(f"{_KEY} must be null for {name}, which belongs to no stage, got {_format_shares(shares)}")
    if shares[STAGES.index(stage)] == 0:
        raise UserError(f"{_KEY} leaves nothing for {name}, got {_format_shares(shares)}; its stage is {stage}")


def select_stage_rows(rows: Rows, shares: Sequence[float], stage: Stage, seed: int) -> Rows:
    """Return the rows of one stage, in their order; every row is one stage's.

    Raises:
        DataError: if there are too few rows for this stage to get one.
    """
    total = len(rows.values)
    order = list(range(total))
    random.Random(f"stages/{seed}").shuffle(order)
    bounds = [0, *(round(total * reached / sum(shares)) for reached in accumulate(shares))]
    number = STAGES.index(stage)
    stage_rows = sorted(order[bounds[number] : bounds[number + 1]])
    if not stage_rows:
        raise DataError(
            f"{_KEY}={_format_shares(shares)} leaves none of the {total} rows of {rows.source} to the stage {stage}"
        )
    return rows.take(stage_rows)


def _format_shares(shares: Sequence[float]) -> str:
    return f"[{', '.join(f'{share:g}' for share in shares)}]"
