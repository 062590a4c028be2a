"""Prepared rows as Arrow records: how they are written, and examples that are made of them when a batch asks.

A record has token ids, the prompt as it was rendered, the conversation behind it, and the row itself as JSON. So the
memory of a run does not grow with its data set, and the processes of a machine share one copy of the file.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from remax_lightning.data.collate import Example, PairExample
from remax_lightning.data.conversations import message_form
from remax_lightning.data.reading import Row, Rows
from remax_lightning.errors import DataError
from remax_lightning.types import Conversation, Prompt

if TYPE_CHECKING:
    import pyarrow

BATCH_SIZE = 1000
"""Rows that are rendered, tokenized and written together."""
_ELSEWHERE = frozenset(("row", "prompt", "where", "number", "texts"))
"""Fields that the column `fields` leaves out: they have own columns, follow from the place, or are used up."""

_SCALARS = (str, int, float, bool, type(None))
"""Kinds of values that JSON writes and reads without a change; NaN and infinity aside."""

Outcome = Example | PairExample | DataError
"""The result of preparing a row: an example, or an error if the row cannot be used."""


class PreparedExamples(Sequence[Any]):
    """Examples that are created from their records on access.

    Args:
        batches: the records, `BATCH_SIZE` in each batch but the last.
        rows: where each row stands, and the row itself where its record cannot hold it.
        example_type: what the records are of.
        render: makes an example of a row and its place, for those that JSON cannot hold.
        content: fingerprint of the rows.
        file: where the records are mapped from; None where they are in memory.
    """

    def __init__(
        self,
        batches: Sequence[pyarrow.RecordBatch],
        rows: Rows,
        example_type: type[Example | PairExample],
        render: Callable[[Row, str], Example],
        content: str = "",
        file: Path | None = None,
    ) -> None:
        self.batches, self.example_type, self.content, self.file = batches, example_type, content, file
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
        self._render = None if is_self_contained else render

    def __getstate__(self) -> dict[str, Any]:
        """Leave out records that are mapped from a file: a worker process maps the file again."""
        return vars(self) if self.file is None else {**vars(self), "batches": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.file is not None:
            self.batches = mapped(self.file)

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

    def rows_between(self, start: int, stop: int) -> list[Row]:
        """Return the rows of some examples, without making these: a fifth of the time."""
        numbers = self.numbers[start:stop].tolist()
        texts = (_Record(self.batches, number).value("row") for number in numbers)
        return [
            json.loads(text) if text is not None else self[index].row for index, text in enumerate(texts, start=start)
        ]

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


def to_records(
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


def mapped(file: Path) -> list[pyarrow.RecordBatch]:
    """Return the records of a file, which stay on the disk until they are read."""
    import pyarrow

    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]
