"""Render and tokenize rows once, in batches and with a progress bar, and cache them in a file for later runs.

A row becomes one Arrow record: its token ids, the prompt as it was rendered, the conversation behind it, and the row
itself as JSON. Examples are made of records when a batch asks for them. So the memory of a run does not grow with its
data set, and the processes of a machine share one copy of the file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload
from uuid import uuid4

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from remax_lightning.data.collate import Example, PairExample
from remax_lightning.data.conversations import message_form
from remax_lightning.data.reading import Row, Rows
from remax_lightning.data.template_limits import template_limits
from remax_lightning.errors import DataError
from remax_lightning.types import Conversation, Prompt

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 1000
"""Rows that are rendered, tokenized and written together."""
LONG_ENOUGH = 10_000
"""Rows from which on preparing them takes so long that it is worth a progress bar and a line in the log."""
_ELSEWHERE = frozenset(("row", "prompt", "where", "number", "texts"))
"""Fields that the column `fields` leaves out: they have own columns, follow from the place, or are used up."""

_SCALARS = (str, int, float, bool, type(None))
"""Kinds of values that JSON writes and reads without a change; NaN and infinity aside."""

Outcome = Example | PairExample | DataError
"""The result of preparing a row: an example, or an error if the row cannot be used."""


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
            _to_records(outcomes, [len(getattr(outcome, "prompt_ids", ())) for outcome in rendered], self.example_type),
            next((outcome for outcome in outcomes if isinstance(outcome, DataError)), None),
        )


class PreparedExamples(Sequence[Any]):
    """Examples that are created from their records on access.

    Args:
        batches: the records, `BATCH_SIZE` in each batch but the last.
        rows: where each row stands, and the row itself where its record cannot hold it.
        recipe: what made the records.
        content: fingerprint of the rows.
        file: where the records are mapped from; None where they are in memory.
    """

    def __init__(
        self,
        batches: Sequence[pyarrow.RecordBatch],
        rows: Rows,
        recipe: Recipe,
        content: str = "",
        file: Path | None = None,
    ) -> None:
        self.batches, self.example_type, self.content, self.file = batches, recipe.example_type, content, file
        self.numbers = np.arange(len(rows.values))  # [N], of which `select` leaves some
        self.problems: dict[int, str] = {}
        """What is wrong with the rows that cannot be used, by number."""
        for start, batch in zip(range(0, len(self.numbers), BATCH_SIZE), batches, strict=True):
            column = batch.column("problem")
            if column.null_count < len(column):
                problems = enumerate(column.to_pylist(), start=start)
                self.problems |= {i: problem for i, problem in problems if problem is not None}
        without_row = sum(batch.column("row").null_count for batch in batches)
        # Where every record holds its row, nothing needs the rows as they were read any more.
        is_self_contained = without_row == len(self.problems)
        self.rows = rows._replace(values=()) if is_self_contained else rows
        self._render = None if is_self_contained else recipe.render

    def __getstate__(self) -> dict[str, Any]:
        """Leave out records that are mapped from a file: a worker process maps the file again."""
        return vars(self) if self.file is None else {**vars(self), "batches": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.file is not None:
            self.batches = _mapped(self.file)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        # ---- The row and its conversation, rendered again where JSON could not hold them ----
        number = int(self.numbers[index])
        record, where = _Record(self.batches, number), self.rows.where(number)
        row_text, conversation_text = record.value("row"), record.value("conversation")
        if row_text is None and self._render is not None:  # of a kind that JSON does not know
            made = self._render(self.rows.values[number], where)
            row, conversation = made.row, made.prompt.conversation
        else:
            row = json.loads(row_text)
            fields = {} if conversation_text is None else json.loads(conversation_text)
            conversation = Conversation(**fields)._replace(where=where) if fields else None
        # ---- Token ids, prompt, and the plain fields ----
        fields = json.loads(record.value("fields"))
        for name in self.example_type._fields:
            if name.endswith("_ids"):
                fields[name] = record.token_ids(name)
        prompt = Prompt(record.value("prompt"), conversation)
        return self.example_type(prompt=prompt, row=row, where=where, number=number, **fields)

    def select(self, indices: Any) -> PreparedExamples:
        """Return the examples at `indices`, or where a mask `[N]` is True; they keep their numbers."""
        selected = copy.copy(self)
        selected.numbers = self.numbers[indices]
        return selected

    def fingerprint(self) -> str:
        """Return a hash of the rows that are here, in their order. Tokenizer and template do not matter."""
        return hashlib.sha256(self.content.encode() + self.numbers.astype(np.int64).tobytes()).hexdigest()

    def where(self, index: int) -> str:
        """Say where an example stands, for messages."""
        return self.rows.where(int(self.numbers[index]))

    def lengths(self, name: str) -> np.ndarray[Any, Any]:
        """Return how many tokens the examples have, `[N]`; `name` is a field of token ids, or `prompt`."""
        import pyarrow.compute as pc

        # over all records first, then those that are selected
        columns = (batch.column("prompt_length" if name == "prompt" else name) for batch in self.batches)
        counts = [column if name == "prompt" else pc.list_value_length(column) for column in columns]
        lengths = np.concatenate([pc.fill_null(count, 0).to_numpy(zero_copy_only=False) for count in counts])
        return lengths[self.numbers]

    def last_ids(self, name: str) -> set[int]:
        """Return the ids that a field of token ids ends with, over all records."""
        ids: set[int] = set()
        for batch in self.batches:
            column = batch.column(name)
            # offsets [0, 3, 3, 5] are lists of 3, 0 and 2 ids; an empty one has no last id
            offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
            ends = offsets[1:][offsets[1:] > offsets[:-1]]
            ids.update(np.unique(values[ends - 1]).tolist())
        return ids

    def first_of_each_form(self) -> dict[str, int]:
        """Return the index of the first example of each form of a conversation; plain text is a form, too."""
        forms = [form for batch in self.batches for form in batch.column("form").to_pylist()]
        indices: dict[str, int] = {}
        for index, number in enumerate(self.numbers.tolist()):
            indices.setdefault(forms[number], index)
        return indices

    def chat_kinds(self) -> set[bool]:
        """Return whether the prompts are chats, over all records: {True}, {False}, or both."""
        return {is_chat for batch in self.batches for is_chat in batch.column("is_chat").unique().to_pylist()} - {None}


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
            prepared = PreparedExamples(_mapped(file), rows, recipe, content, file)
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
    return PreparedExamples(batches, rows, recipe, content, file)


def cache_folder() -> Path:
    """Return where prepared rows are kept: beside what `datasets` keeps, wherever `HF_DATASETS_CACHE` puts that."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets").expanduser() / "remax_lightning"


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


# ---- Records ----


class _Record:
    """One of the records."""

    def __init__(self, batches: Sequence[pyarrow.RecordBatch], number: int) -> None:
        part, self.place = divmod(number, BATCH_SIZE)  # 2345 -> batch 2, place 345
        self.batch = batches[part]

    def value(self, name: str) -> Any:
        return self.batch.column(name)[self.place].as_py()

    def token_ids(self, name: str) -> list[int]:
        ids: list[int] = self.batch.column(name)[self.place].values.to_numpy().tolist()
        return ids


def _to_records(
    outcomes: Sequence[Outcome], prompt_lengths: Sequence[int], example_type: type[Example | PairExample]
) -> pyarrow.RecordBatch:
    """Write what became of a batch of rows as records; a row that cannot be used has its problem only."""
    import pyarrow

    # ---- Columns, one for each field of token ids ----
    token_fields = [name for name in example_type._fields if name.endswith("_ids")]
    types = {name: pyarrow.string() for name in ("problem", "row", "prompt", "conversation", "form", "fields")}
    types |= {"is_chat": pyarrow.bool_(), "prompt_length": pyarrow.int32()}
    types |= {name: pyarrow.list_(pyarrow.int32()) for name in token_fields}
    columns: dict[str, list[Any]] = {name: [] for name in types}
    # ---- Values: null where a record has no such field ----
    for outcome, prompt_length in zip(outcomes, prompt_lengths, strict=True):
        if isinstance(outcome, DataError):
            record: dict[str, Any] = {"problem": outcome.without_place}
        else:
            record = {name: getattr(outcome, name) for name in token_fields} | _to_record(outcome)
            record["prompt_length"] = prompt_length
        for name, values in columns.items():
            values.append(record.get(name))
    # ---- One Arrow batch ----
    arrays = [
        _to_lists(columns[name]) if name in token_fields else pyarrow.array(columns[name], type=kind)
        for name, kind in types.items()
    ]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=pyarrow.schema(list(types.items())))


def _to_lists(rows: Sequence[Sequence[int] | None]) -> pyarrow.ListArray:
    """Return lists of token ids as one array; through NumPy, which takes a fifth of Arrow's own time."""
    import pyarrow

    # [[5, 6], None, [7]] -> offsets [0, 2, 2, 3], values [5, 6, 7], missing [False, True, False]
    lengths = [0 if ids is None else len(ids) for ids in rows]
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    values = np.fromiter(chain.from_iterable(ids for ids in rows if ids is not None), np.int32, count=offsets[-1])
    missing = pyarrow.array([ids is None for ids in rows])
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values), mask=missing)


def _to_record(example: Example | PairExample) -> dict[str, Any]:
    """Return the columns of an example besides those of its token ids."""
    conversation, row = example.prompt.conversation, _exact_json(example.row)
    others = {name: getattr(example, name) for name in example._fields if name not in _ELSEWHERE}
    record = {
        "row": row,
        "prompt": str(example.prompt),
        "is_chat": conversation is not None,
        "form": "" if conversation is None else repr([message_form(message) for message in conversation.messages]),
        "fields": json.dumps({name: value for name, value in others.items() if not name.endswith("_ids")}),
    }
    if conversation is not None:
        # The place is added when the record is read. Without its conversation a record is rendered again, from the row.
        record["conversation"] = _exact_json({**conversation._asdict(), "where": ""})
        record["row"] = record["conversation"] and row
    return record


def _exact_json(value: Any) -> str | None:
    """Return a value as JSON, or None where JSON would give back another one: dates, images, keys that are numbers."""
    try:
        if not _is_json(value):
            return None
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()  # fails for half a surrogate pair
        return text
    except (TypeError, ValueError, RecursionError):
        return None


def _is_json(value: Any) -> bool:
    """Whether a value is made of what JSON gives back as it was; this costs far less than reading the text again."""
    kind = type(value)
    if kind is dict:
        return all(type(name) is str and _is_json(item) for name, item in value.items())
    return all(map(_is_json, value)) if kind is list else kind in _SCALARS


# ---- The file ----


class _NotKeptError(Exception):
    """The file of the records cannot be written; its cause says why."""


def _mapped(file: Path) -> list[pyarrow.RecordBatch]:
    import pyarrow

    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


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
    return batches if file is None else _mapped(file)


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
