"""Options of data modules: loading, selection of prompts, limits in tokens, and the rows of each stage."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from remax_lightning.data.reading import Rows, count_reasons
from remax_lightning.data.records import PreparedExamples
from remax_lightning.errors import DataError, UserError, above, at_least, check_ranges

Count: TypeAlias = Annotated[int, at_least(1)]
"""Rows or tokens of an option, such as `data.batch_size`."""
ValSize: TypeAlias = Annotated[int | None, at_least(0)]
"""Rows that are held out; None lets the data module choose."""


@dataclass(frozen=True)
class LoadingConfig:
    """Options for loading rows and the tokenizer that are rarely changed.

    Args:
        long_prompts: what happens to a prompt over the limit: `drop` leaves the row out and counts it,
            `error` stops. A prompt is never cut, because its end is what the policy answers.
        on_bad_row: what happens to a row that cannot be used: that cannot be read, lacks a column, is refused by the
            chat template or by the reward, has no response, or is a pair that teaches nothing. `error` stops and says
            where it stands, `drop` leaves it out; one line says how many were left out, and why.
        response_marker: what stands before each response in whole transcripts; the prompt of a pair reaches through
            the last one. The default is that of hh-rlhf.
        stage_split: shares of the rows of `path` that go to supervised fine-tuning, reward model and ReMax, such as
            `[2, 4, 4]`, the paper's: each row to one of them. The data module takes that of its own stage. None gives
            all rows to each.
        stage_seed: seed of this split. It must be the same in all three stages, or their rows overlap.
        chat_template_kwargs: variables of the chat template, such as `{enable_thinking: false}`; a row's own, in a
            column `chat_template_kwargs`, come before them. A column `tools` goes to the template, too.
        cache: whether rendered and tokenized rows are kept for later runs, beside what `datasets` keeps
            (`HF_DATASETS_CACHE`). Other rows, another tokenizer, template or option make them anew.
        num_workers: processes that collate; 0 does it in the training process, which is enough for tokenized
            text.
        pad_token: `eos`, or the text of a token of the vocabulary, for a tokenizer without a pad token.
        trust_remote_code: whether code that comes with the tokenizer may run.
        tokenizer_revision: branch, tag or commit of the tokenizer on the hub.
        hub_name: configuration of a data set on the hub, for instance `main`.
        train_split: split of `path` on the hub.
        val_split: split of `val_path` on the hub.

    Raises:
        UserError: if a value is out of its range.
    """

    long_prompts: Literal["drop", "error"] = "drop"
    on_bad_row: Literal["error", "drop"] = "error"
    response_marker: str = "\n\nAssistant:"
    stage_split: tuple[float, float, float] | None = None
    stage_seed: int = 0
    chat_template_kwargs: dict[str, Any] | None = None
    cache: bool = True
    num_workers: Annotated[int, at_least(0)] = 0
    pad_token: str | None = None
    trust_remote_code: bool = False
    tokenizer_revision: str | None = None
    hub_name: str | None = None
    train_split: str = "train"
    val_split: str = "test"

    def __post_init__(self) -> None:
        """Check the values."""
        check_ranges(type(self), vars(self), "data.loading")


DEFAULT_LOADING = LoadingConfig()


SELECTION = "data.selection"


@dataclass(frozen=True)
class SelectionConfig:
    """Which prompts a run trains on, by what earlier responses to them gave; by default each once per epoch.

    Args:
        skip_uninformative: visits in a row without any advantage (`r - b` was 0 for all samples) after which a prompt
            rests. It misses as many passes over the data, and so it does again if its next visit gives none. 2 or 3,
            because one such visit may be chance. Null lets no prompt rest.
        oversample: most rollout batches of a step. While fewer than `batch_size` prompts have an advantage, another
            batch is drawn and answered; those with an advantage are trained on, filled up with others. 1 is off.
        curriculum: probability that a pass still draws a prompt which always or never passes. One with pass rate `p`
            is drawn with `4 p (1 - p)`, the variance of its reward, if that is more; one that was not seen yet, always.
            The reward has to be from 0 to 1. 0.2 looks at each prompt about every fifth pass. Null draws all.

    Raises:
        UserError: if a value is out of its range.
    """

    skip_uninformative: Annotated[int | None, at_least(1)] = None
    oversample: Annotated[int, at_least(1, note="rollout batches")] = 1
    curriculum: Annotated[float | None, above(0, at_most=1)] = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_ranges(type(self), vars(self), SELECTION)

    @property
    def is_on(self) -> bool:
        """Whether any of it is used."""
        return self != SelectionConfig()

    @property
    def needs_advantages(self) -> bool:
        """Whether it asks which prompts have an advantage."""
        return self.skip_uninformative is not None or self.oversample > 1


def as_text(path: str | list[str] | None) -> str | list[str] | None:
    """Return paths as text; scripts give `pathlib.Path`, too."""
    if path is None or isinstance(path, str | os.PathLike):
        return path and os.fspath(path)
    return [os.fspath(item) for item in path]


def check_sources(path: Any, tokenizer: Any, data: Any, val_path: Any, val_data: Any) -> None:
    """Check that rows and tokenizer come from somewhere, and from one place each.

    Raises:
        UserError: if not.
    """
    missing = "missing, and there is no default; set it in the YAML or on the command line"
    for key, given in (("path", path), ("val_path", val_path)):
        places = given if isinstance(given, list) else [given]
        if any(isinstance(place, str) and not place.strip() for place in places):
            raise UserError(f"data.{key}: expected a file, a folder or a hub name, got {given!r}")
    if path is None and data is None:
        raise UserError(f"data.path: {missing}, or give the rows from Python as data=")
    if tokenizer is None:
        raise UserError(f"data.tokenizer: {missing}")
    for name, in_files, in_memory in (("", path, data), ("val_", val_path, val_data)):
        if in_files is not None and in_memory is not None:
            raise UserError(f"data.{name}path must be null beside data.{name}data, got {in_files!r}; remove one")


def check_val_rows(stage: str | None, has_val: bool) -> None:
    """Check that a stage that evaluates has rows.

    Raises:
        UserError: if it has none.
    """
    if stage in ("validate", "test", "predict") and not has_val:
        raise UserError(
            f"data.val_path must name the rows to {getattr(stage, 'value', stage)} on, got null; set it, or set "
            "data.val_size to hold rows of data.path out"
        )


# ---- Rows that are left out ----


def report_left_out(dropped: Counter[str], total: int, examples: PreparedExamples) -> None:
    """Say in one line how many rows were left out because they cannot be used, and why.

    Raises:
        DataError: if that is all of them.
    """
    source, left_out = examples.rows.source, dropped.total()
    if left_out == total:
        number, problem = min(examples.problems.items())
        raise DataError(
            f"{source}: not one of {total} rows can be used: {count_reasons(dropped)}. The first is"
            f" {examples.rows.where(number)}: {problem}"
        )
    if left_out:
        rank_zero_warn(
            f"{source}: dropped {left_out} of {total} rows (data.loading.on_bad_row): {count_reasons(dropped)}"
        )


_UNSEEN = ("image", "images", "video", "videos", "audio", "audios", "documents")
"""Columns from which models that also see and hear, and templates of retrieval, get more than the messages."""


_SYSTEM = ("system", "system_prompt")
"""Columns with the instructions of a conversation, which are no part of its messages in some data sets."""
_FOR_TEMPLATES = ("tools", "functions", "chat_template_kwargs")
"""Columns that a chat template writes, and text has no place for."""


def warn_of_unseen_columns(examples: PreparedExamples) -> None:
    """Say which columns hold a part of the question that the policy is not shown; of the first 100 rows."""
    unseen, named = dict[str, None](), (*_UNSEEN, *_SYSTEM, *_FOR_TEMPLATES)
    for index, row in enumerate(examples.rows_between(0, min(100, len(examples)))):
        filled = {name: row[name] for name in named if row.get(name) is not None and not _is_empty(row[name])}
        if not filled:
            continue
        prompt = examples[index].prompt
        for name, value in filled.items():
            is_written = name in _FOR_TEMPLATES and prompt.conversation is not None
            # data.template may have written the column
            if not is_written and not (isinstance(value, str) and value.strip() in prompt):
                unseen[name] = None
    if unseen:
        advice = ""
        if not unseen.keys().isdisjoint(_SYSTEM):
            advice += " Instructions belong into a message of the system."
        if not unseen.keys().isdisjoint(_FOR_TEMPLATES):
            advice += " Tools need a prompt of messages."
        rank_zero_warn(
            f"{examples.rows.source}: the policy is not shown what column {' and '.join(map(repr, unseen))} holds, only"
            " the prompt's text; rewards get it with their rows. Documents for a chat template belong into a row's"
            f" chat_template_kwargs.{advice}"
        )


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | list | dict) and (not value or value in ("[]", "{}"))


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
    # ---- Which examples fit: the longest of the parts counts ----
    key = f"{limit.key}={limit.tokens}"
    lengths = np.max([examples.lengths(part) for part in limit.parts], axis=0)  # [N]
    fits = lengths <= limit.tokens  # [N]
    total, dropped = len(examples), int((~fits).sum())
    if dropped and limit.policy == "error":
        first = int(np.argmin(fits))  # the first False
        raise DataError(
            f"{examples.where(first)}: {lengths[first]} tokens, over {key}, and so are {dropped} of "
            f"{total} rows; raise the limit, shorten them, or set data.loading.long_prompts: drop"
        )
    # ---- One line in the log, a warning for more than half ----
    message = f"{examples.rows.source}: dropped {dropped} of {total} rows, longer than {key} tokens"
    if dropped == total:
        raise DataError(f"{message}; none is left, the shortest has {lengths.min()} tokens: raise the limit")
    if dropped * 2 > total:
        rank_zero_warn(f"{message}: that is more than half of them")
    else:
        rank_zero_info(message)
    return examples.select(fits)


# ---- Rows of a stage, and those held out ----

Stage = Literal["supervised", "reward_model", "remax"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_KEY = "data.loading.stage_split"


def check_stage_split(shares: Sequence[float] | None, stage: Stage | None, name: str) -> None:
    """Check that the shares are valid, and that the data module `name` has one.

    Raises:
        UserError: if not.
    """
    if shares is None:
        return
    # ---- Three shares ----
    usable = len(shares) == len(STAGES) and all(math.isfinite(share) and share >= 0 for share in shares)
    if not usable or sum(shares) <= 0:
        raise UserError(
            f"{_KEY} must be three shares of 0 or more, for {', '.join(STAGES)}, as [2, 4, 4] is; got"
            f" {_format_shares(shares)}"
        )
    # ---- A share for this data module ----
    if stage is None:
        raise UserError(f"{_KEY} must be null for {name}, which belongs to no stage, got {_format_shares(shares)}")
    if shares[STAGES.index(stage)] == 0:
        raise UserError(f"{_KEY} leaves nothing for {name}, got {_format_shares(shares)}; its stage is {stage}")


def select_stage_rows(rows: Rows, shares: Sequence[float], stage: Stage, seed: int) -> Rows:
    """Return the rows of one stage, in their order; every row belongs to exactly one stage.

    Raises:
        DataError: if there are too few rows for this stage to get one.
    """
    total = len(rows.values)
    # All stages shuffle alike, and each takes its part of the same order: so no row is in two of them.
    order = list(range(total))
    random.Random(f"stages/{seed}").shuffle(order)
    # 100 rows, shares 2, 4, 4 -> [0, 20, 60, 100]
    bounds = [0, *(round(total * reached / sum(shares)) for reached in accumulate(shares))]
    number = STAGES.index(stage)
    stage_rows = sorted(order[bounds[number] : bounds[number + 1]])  # back in the order of the file
    if not stage_rows:
        raise DataError(
            f"{_KEY}={_format_shares(shares)} leaves none of the {total} rows of {rows.source} to the stage {stage}"
        )
    return rows.take(stage_rows)


def _format_shares(shares: Sequence[float]) -> str:
    return f"[{', '.join(f'{share:g}' for share in shares)}]"


def hold_out(rows: Rows, val_size: int | None, needed: int, seed: int) -> tuple[Rows, Rows | None]:
    """Return the rows to train on, and those held out for validation; None where there are none.

    Args:
        rows: of the stage.
        val_size: how many are held out; None holds out 1 in 20, 64 at most.
        needed: rows that must remain where `val_size` is None.
        seed: draws them.

    Raises:
        DataError: if no row would remain.
    """
    total = len(rows.values)
    if val_size is None:
        val_size = max(min(total // 20, 64, total - needed), 0)
    if val_size >= total:
        raise DataError(f"data.val_size must be below the {total} rows of {rows.source}, got {val_size}")
    if not val_size:
        return rows, None
    # Drawn before any filter, so that a new tokenizer or limit moves no row to the other side.
    held_out = set(random.Random(f"val/{seed}").sample(range(total), val_size))
    return rows.take([i for i in range(total) if i not in held_out]), rows.take(sorted(held_out))
