"""Render and tokenize rows once, in batches and with a progress bar, and cache them in a file for later runs.

A row becomes one Arrow record, of which `records.py` makes examples when a batch asks for them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from remax_lightning.data.collate import Example, PairExample
from remax_lightning.data.reading import Row, Rows
from remax_lightning.data.records import BATCH_SIZE, Outcome, PreparedExamples, mapped, to_records
from remax_lightning.data.templates import template_limits
from remax_lightning.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

LONG_ENOUGH = 10_000
"""Rows from which on preparing them takes so long that it is worth a progress bar and a line in the log."""


class Batch(NamedTuple):
    """Rows that were prepared together.

    Args:
        records: one of each row.
        error: of the first row that cannot be used; None if all rows can.
    """

    records: pyarrow.RecordBatch
    error: DataError | None


class Recipe:
    """How rows become examples.

    Args:
        render: makes an example of a row and its place, without token ids; raises `DataError` for a row that cannot be
            used.
        finish: adds token ids to rendered examples. Where one turns out to be of no use, its error takes its place.
        example_type: what `finish` makes of an example: `Example` or `PairExample`.
    """

    def __init__(
        self,
        render: Callable[[Row, str], Example],
        finish: Callable[[list[Example]], Sequence[Outcome]],
        example_type: type[Example | PairExample],
    ) -> None:
        self.render, self.finish, self.example_type = render, finish, example_type

    def rendered(self, rows: Iterable[tuple[Row, str]]) -> list[Example | DataError]:
        """Render a batch of rows."""
        outcomes: list[Example | DataError] = []
        with template_limits():
            for row, where in rows:
                try:
                    outcomes.append(self.render(row, where))
                except DataError as error:
                    outcomes.append(error)
        return outcomes

    def records(self, rendered: list[Example | DataError]) -> Batch:
        """Tokenize a rendered batch."""
        # `finish` gets the examples alone; the errors then go back to their places between the outcomes.
        examples = [outcome for outcome in rendered if isinstance(outcome, Example)]
        finished = iter(self.finish(examples))
        outcomes = [outcome if isinstance(outcome, DataError) else next(finished) for outcome in rendered]
        return Batch(
            to_records(outcomes, [len(getattr(outcome, "prompt_ids", ())) for outcome in rendered], self.example_type),
            next((outcome for outcome in outcomes if isinstance(outcome, DataError)), None),
        )


def prepare(
    rows: Rows, recipe: Recipe, *, content: str = "", key: str | None = None, stop_at_error: bool = True
) -> PreparedExamples:
    """Render and tokenize rows, or load them from the cache.

    Many rows have a progress bar on a terminal, and one line in the log.

    Rendering goes on in this thread while another tokenizes the batch before: tokenizers work without Python's lock.

    Args:
        rows: the rows.
        recipe: what becomes of each.
        content: their fingerprint.
        key: from `preparation_key`, the name under which later runs find the records; None keeps them in memory only.
        stop_at_error: whether the first row that cannot be used is raised. Else it is one of `problems`.

    Raises:
        DataError: the first row's that cannot be used.
    """
    import pyarrow

    # ---- From an earlier run ----
    file = None if key is None else cache_folder() / f"{key}.arrow"
    if file is not None and file.is_file():
        try:
            prepared = PreparedExamples(mapped(file), rows, recipe.example_type, recipe.render, content, file)
        except (pyarrow.ArrowException, OSError, ValueError):
            pass  # cut off, or of other rows: it is made anew
        else:
            _log(f"took {len(rows.values):,} prepared rows from {file}", rows)
            if prepared.problems and stop_at_error:
                number, problem = min(prepared.problems.items())
                raise DataError(f"{rows.where(number)}: {problem}")
            return prepared
    # ---- Anew; in memory if the disk is full or read-only, which must not stop a run ----
    started = time.monotonic()
    try:
        batches = _write(file, rows, recipe, stop_at_error)
    except _NotKeptError as error:
        rank_zero_warn(f"prepared rows are not kept for the next run: {error.__cause__}; free or set HF_DATASETS_CACHE")
        file = None
        batches = _write(None, rows, recipe, stop_at_error)
    seconds = time.monotonic() - started
    _log(f"prepared {len(rows.values):,} rows in {seconds:.0f} s", rows)
    return PreparedExamples(batches, rows, recipe.example_type, recipe.render, content, file)


def cache_folder() -> Path:
    """Return where prepared rows are kept: beside what `datasets` keeps, wherever `HF_DATASETS_CACHE` puts that."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets").expanduser() / "remax_lightning"


# ---- What prepared rows depend on ----

# Settings of these types have a `repr` that names their value, so it can be part of the cache's key.
_PLAIN = (str, int, float, bool, list, tuple, dict, type(None))
_CHANGE_NO_ROW = frozenset(
    (
        *("path", "val_path", "data", "val_data", "val_size", "hub_name", "train_split", "val_split", "tokenizer_path"),
        *("batch_size", "micro_batch_size", "num_micro_batches", "tokens_per_micro_batch", "looks_ahead"),
        *("seed", "stage_split", "stage_seed", "num_workers", "selection", "_selecting", "_rows_by_place"),
        *("max_prompt_length", "max_response_length", "max_length", "long_prompts", "on_bad_row", "cache", "loading"),
        *("num_rows", "num_left_out", "response_ends", "formatter", "_tokenizer", "_train", "_val", "_kinds"),
        *vars(LightningDataModule()),
    )
)
"""Attributes that do not change how a row is rendered or tokenized: they select and order rows, or hold results."""


def source_files(module: object, base: type) -> set[Path]:
    """Return the source files that make examples of rows; none if a class was written where no file tells it all.

    That is a notebook, a shell, or a function, whose variables a class may read.

    Args:
        module: the data module.
        base: the class that all data modules derive from.
    """
    # A changed line in these files may change what rows become, so the cache's key has their hashes.
    classes = [cls for cls in type(module).__mro__ if issubclass(cls, base)]
    if any("<locals>" in cls.__qualname__ for cls in classes):
        return set()
    try:
        code = {*Path(__file__).parent.glob("*.py"), *(Path(inspect.getfile(cls)) for cls in classes)}
    except (TypeError, OSError):
        return set()
    return code if all(file.is_file() for file in code) else set()


def settings_of_rows(module: Any) -> dict[str, str] | None:
    """Return what may change a row: the class of a data module, and its attributes that are not in `_CHANGE_NO_ROW`.

    None if one is an object, such as a function of a subclass: its changes could not be detected.
    """
    loading = {field.name: getattr(module.loading, field.name) for field in fields(module.loading)}
    settings = {name: value for name, value in (vars(module) | loading).items() if name not in _CHANGE_NO_ROW}
    if not all(isinstance(value, _PLAIN) or is_dataclass(value) for value in settings.values()):
        return None
    # One file may have several classes.
    kind = type(module)
    return {name: repr(value) for name, value in settings.items()} | {"": f"{kind.__module__}.{kind.__qualname__}"}


def preparation_key(
    content: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, object], code: Iterable[Path]
) -> str:
    """Return a hash of everything that prepared rows depend on.

    Args:
        content: fingerprint of the rows.
        tokenizer: hashed with its chat template.
        options: settings that rendering and tokenizing read.
        code: source files that do it.
    """
    # ---- Rows, tokenizer, template, options, versions of libraries ----
    digest = hashlib.sha256(content.encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)  # None for tokenizers in Python
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    template = json.dumps(tokenizer.chat_template)
    parts = [type(tokenizer).__name__, vocabulary, template, repr(sorted(tokenizer.special_tokens_map.items()))]
    parts += [repr(sorted(options.items())), *(version(name) for name in ("transformers", "tokenizers", "jinja2"))]
    if "strftime_now" in template:  # a template that writes the day's date
        parts.append(datetime.now(UTC).astimezone().date().isoformat())
    # ---- Source files ----
    parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(code)]
    # Hashes of equal length, so that ("ab", "c") is not ("a", "bc").
    for part in parts:
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


# ---- The file ----


class _NotKeptError(Exception):
    """The file of the records cannot be written; its cause says why."""


def _write(file: Path | None, rows: Rows, recipe: Recipe, stop_at_error: bool) -> list[pyarrow.RecordBatch]:
    """Make the records batch by batch, and return them from the file that they went to, or from memory."""
    batches = []
    with _writer(file) as write:
        for batch in _pipeline(rows, recipe):
            if stop_at_error and batch.error is not None:
                raise batch.error
            if file is None:
                batches.append(batch.records)
            else:
                write(batch.records)
    return batches if file is None else mapped(file)


@contextmanager
def _writer(file: Path | None) -> Iterator[Callable[[pyarrow.RecordBatch], None]]:
    """Yield what writes records to a file, which is written atomically."""
    import pyarrow

    if file is None:
        yield lambda _: None
        return
    # Written beside the file and renamed, so that a reader sees all of it or nothing; each process has its own.
    partial = file.with_name(f".{file.stem}.{uuid4().hex}.tmp")
    writer = None

    def write(batch: pyarrow.RecordBatch) -> None:
        nonlocal writer
        try:
            # the schema is known with the first batch
            if writer is None:
                file.parent.mkdir(parents=True, exist_ok=True)
                writer = pyarrow.ipc.new_file(str(partial), batch.schema)
            writer.write_batch(batch)
        except OSError as error:
            raise _NotKeptError from error

    try:
        yield write
        try:
            if writer is not None:
                writer.close()
                partial.replace(file)
        except OSError as error:
            raise _NotKeptError from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _pipeline(rows: Rows, recipe: Recipe) -> Iterator[Batch]:
    """Yield the records of each batch in order, one batch being tokenized while the next one is rendered."""
    from tqdm import tqdm

    total = len(rows.values)
    is_hidden = total < LONG_ENOUGH or (getattr(rank_zero_only, "rank", None) or 0) > 0
    places = ((row, rows.where(i)) for i, row in enumerate(rows.values))
    with (
        # None hides it where nobody sees it move, off a terminal.
        tqdm(total=total, desc="Preparing rows", unit=" rows", disable=is_hidden or None, leave=False) as bar,
        ThreadPoolExecutor(1) as tokenizing,
    ):
        pending: Future[Batch] | None = None  # the batch that is being tokenized
        while batch := list(islice(places, BATCH_SIZE)):
            rendered = recipe.rendered(batch)
            if pending is not None:
                yield pending.result()
            pending = tokenizing.submit(recipe.records, rendered)
            bar.update(len(batch))
        if pending is not None:
            yield pending.result()  # the last batch


def _log(text: str, rows: Rows) -> None:
    if len(rows.values) >= LONG_ENOUGH:
        rank_zero_info(f"{rows.source}: {text}")
