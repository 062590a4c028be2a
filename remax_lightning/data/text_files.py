"""Rows of JSON and CSV files, compressed or not; they stay text and are parsed on access."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import re
import sys
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from remax_lightning.errors import DataError
from remax_lightning.files import MAX_DEPTH, may_be_too_deep, parse_json

Row = dict[str, Any]
OnBadRow = Literal["error", "drop"]

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
# `json.loads` joins "\ud83d\ude00" to one character, so what is left in this range is half a pair.
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")
# "1", "-0.5", ".5", "1e-3"; unlike `float`, not "nan", "inf" or "1_000"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LFS = b"version https://git-lfs.github.com/spec/"
_WRAPPERS = ("data", "rows", "examples", "train", "test", "validation", "items", "records", "instances", "samples")
"""Keys that stand around the rows of a file in public data sets and exports."""
# "\ud83d" as JSON escapes it
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRows(Sequence[Row]):
    """Rows as they stand in one text, a JSON object each, parsed at every access.

    A hundred thousand parsed rows take some three times the memory of their text, and only a batch of them is looked
    at together.

    Args:
        text: UTF-8 that holds the objects.
        starts: where each object starts in `text`, in bytes.
        ends: where each ends.
    """

    def __init__(self, text: bytes, starts: Sequence[int], ends: Sequence[int]) -> None:
        self.text, self.starts, self.ends = text, starts, ends

    @classmethod
    def of(cls, rows: Iterable[Row]) -> JsonRows:
        """Write rows down as JSON."""
        text, ends = bytearray(), array("Q", [0])  # row i ends where row i + 1 starts
        for row in rows:
            text += json.dumps(row, ensure_ascii=False).encode()
            ends.append(len(text))
        return cls(bytes(text), ends[:-1], ends[1:])

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return JsonRows(self.text, self.starts[index], self.ends[index])
        row: Row = json.loads(self.text[self.starts[index] : self.ends[index]])
        return row

    def select(self, indices: Iterable[int]) -> JsonRows:
        """Return the rows at `indices`, of the same text."""
        indices = list(indices)
        starts, ends = (array("Q", (places[i] for i in indices)) for places in (self.starts, self.ends))
        return JsonRows(self.text, starts, ends)


class TextFile(NamedTuple):
    """The rows of a file.

    Args:
        values: its rows.
        numbers: the line or row number of each, from 1.
        unit: what `numbers` count: `line` in JSON lines, `row` elsewhere.
        dropped: how many rows were left out, by reason.
    """

    values: JsonRows
    numbers: Sequence[int]
    unit: Literal["line", "row"]
    dropped: Counter[str]


def data_suffix(path: str | Path) -> str:
    """Return the ending that names the format of a file, in lower case: `.jsonl` of `train.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_text_file(file: Path, source: str, on_bad_row: OnBadRow = "error") -> TextFile:
    """Read a file of JSON lines, a JSON array, CSV or TSV; what it is compressed with is seen in its first bytes.

    JSON lines and arrays are told apart by what the file holds, since both are published under either name.

    Args:
        file: ends in one of `EXTENSIONS`, and perhaps in one of `COMPRESSED` after that.
        source: what messages call it.
        on_bad_row: whether a row that is no object with named columns stops the reading or is left out.

    Raises:
        DataError: if the file cannot be read; the message names the line or row.
    """
    # ---- Bytes to UTF-8 ----
    text = _utf8(_decompressed(file, source), source)
    # ---- CSV by its name; JSON, a list or lines, by what the file holds ----
    suffix = data_suffix(file)
    if suffix in (".csv", ".tsv"):
        return _collected(_csv(text, source, "," if suffix == ".csv" else "\t"), source, "row", on_bad_row)
    values = _whole_json(text, source, suffix)
    if values is not None:
        return _collected(enumerate(values, start=1), source, "row", on_bad_row)
    return _json_lines(text, source, on_bad_row)


class _RepeatedKey(Row):
    """An object of JSON in which a key stands twice: of which value the writer thought, nobody knows."""

    key = ""


class _Objects:
    """Makes the objects of a JSON text, and marks and counts those in which a key stands twice."""

    def __init__(self) -> None:
        self.repeated = 0

    def __call__(self, pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) == len(pairs):
            return row
        self.repeated += 1
        marked = _RepeatedKey(row)
        marked.key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return marked


def _fault(value: Any) -> str | None:
    """Return what makes a value no text and numbers, wherever in it; None if nothing does.

    Without recursion: objects of Python may be as deep as they like, or hold themselves.
    """
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str):
            if half := _HALF_PAIR.search(item):
                return (
                    f"holds half a surrogate pair ({ascii(half[0])[1:-1]}), which is no text; write the whole"
                    " character, or remove it"
                )
        elif isinstance(item, dict | list | tuple):
            if depth == MAX_DEPTH:
                return f"is nested too deep, more than {MAX_DEPTH} lists and objects; write it as text"
            if isinstance(item, _RepeatedKey):
                return f"has the key {item.key!a} twice in an object; remove one"
            inner = [*item, *item.values()] if isinstance(item, dict) else item
            stack += [(part, depth + 1) for part in inner]
    return None


def check_row(value: object, where: str) -> Row:
    """Check that a row is an object with named columns, each of them once, and valid texts; return it.

    Raises:
        DataError: if it is not; the message begins with `where` and names the column.
    """
    if isinstance(value, DataError):
        raise value
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with named columns, got {type(value).__name__}")
    if isinstance(value, _RepeatedKey):
        raise DataError(f"{where}: column {value.key!a} stands twice; remove one")
    for name, item in value.items():
        if fault := _fault(item) or _fault(name):
            raise DataError(f"{where}: column {name!a} {fault}")
    return value


def parse_number(value: Any) -> float | None:
    """Return a number, or a text that spells one as JSON does, as a finite float; None for everything else."""
    if isinstance(value, str):
        value = float(value) if _NUMBER.fullmatch(value.strip()) else None
    # `Real` are also NumPy's, and Parquet has decimals; `bool` is a kind of `int`
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):  # integers that are no float, a signaling NaN
        return None
    return number if math.isfinite(number) else None


# ---- What the file is wrapped in ----


def check_is_no_pointer(file: Path, source: str) -> None:
    """Refuse what `git clone` leaves in place of a large file where Git LFS is missing.

    Raises:
        DataError: if the file is that.
    """
    with suppress(OSError), file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            raise DataError(
                f"{source}: it is a pointer of Git LFS, not the data; run `git lfs pull` in its folder, or download it"
            )


def _unzip(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # macOS adds a folder __MACOSX with attributes of the files.
        names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX")]
        if len(names) != 1:
            raise zipfile.BadZipFile(f"it holds {len(names)} files, expected one")
        if archive.getinfo(names[0]).flag_bits & 1:
            raise zipfile.BadZipFile(f"{names[0]} in it is encrypted; unpack it, and give the file itself")
        return archive.read(names[0])


def _by_arrow(codec: str) -> Callable[[bytes], bytes]:
    def decompress(data: bytes) -> bytes:
        import pyarrow

        with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), codec) as stream:
            return bytes(stream.read())

    return decompress


_CODECS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
    b"\x28\xb5\x2f\xfd": _by_arrow("zstd"),
    b"\x04\x22\x4d\x18": _by_arrow("lz4"),
    b"PK\x03\x04": _unzip,
}
"""Functions that decompress, by the first bytes of a file. No JSON or CSV text in UTF-8 begins with these bytes."""
# The last is raised for ways of compressing that Python does not know, such as those of later ZIP archives.
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)


def _decompressed(file: Path, source: str) -> bytes:
    check_is_no_pointer(file, source)
    try:
        data = file.read_bytes()
        for magic, decompress in _CODECS.items():
            if data.startswith(magic):
                return decompress(data)
    except _UNREADABLE as error:
        raise DataError(f"{source}: cannot be read ({error})") from error
    return data


def _utf8(data: bytes, source: str) -> bytes:
    """Return the text without the mark that spreadsheets put in front, and as UTF-8 where PowerShell wrote UTF-16."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # byte order marks of UTF-16
        try:
            return data.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: not UTF-16, though it begins so ({error}); save it as UTF-8") from error
    return data.removeprefix(b"\xef\xbb\xbf")


# ---- JSON ----


def _parsed(text: bytes, where: str, objects: _Objects) -> Any:
    """Parse JSON and mark objects in which a key stands twice; how deep a row is, `check_row` will say.

    `json.loads` of bytes would let half surrogate pairs in UTF-8 pass.
    """
    try:
        return parse_json(text.decode(), objects)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error}); write one object per line") from error
    except ValueError as error:
        raise DataError(f"{where}: JSON that cannot be read ({error})") from error


def _whole_json(text: bytes, source: str, suffix: str) -> list[Any] | None:
    """Return the rows of a file that is one JSON value, or None where it holds one value per line."""
    # ---- By the first character: `[` begins a list, in .jsonl everything else is lines ----
    start = text.lstrip()[:1]
    if not start:
        return []
    if start != b"[" and suffix != ".json":
        return None
    try:
        value = _parsed(text, source, _Objects())
    except DataError as error:
        # ---- Not one value: lines if the first of them is one; else the error of the whole file is told ----
        first_line = text.lstrip().partition(b"\n")[0]
        try:
            _parsed(first_line, source, _Objects())
        except DataError:
            if suffix == ".json":
                raise DataError(str(error).partition("; write one object")[0]) from error
        return None
    # ---- One value ----
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        _refuse_wrapped_rows(value, source)
        return [value]
    raise DataError(
        f"{source}: expected a list of objects, got {type(value).__name__}; write [{{...}}, {{...}}], or one object"
        " per line"
    )


def _refuse_wrapped_rows(value: Row, source: str) -> None:
    """Refuse an object that is no row, but stands around the rows of a file.

    Raises:
        DataError: with what to write in its place.
    """
    # {"version": 1, "data": [{"prompt": ...}, ...]}
    for name, inner in value.items():
        if name.lower() in _WRAPPERS and isinstance(inner, list) and inner and isinstance(inner[0], dict):
            raise DataError(
                f"{source}: one object with rows under {name!r}, expected a list of objects; write that list alone, or"
                " a list around the object if it is a row itself"
            )
    # {"prompt": ["a", "b"], "answer": ["c", "d"]}; a row of its own has a text
    columns = list(value.values())
    if all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        cells = [cell for column in columns for cell in column]
        if cells and not any(isinstance(cell, list | dict) for cell in cells):
            raise DataError(
                f"{source}: one object with a list for each column, expected a list of objects, one for each row"
            )


def _json_lines(text: bytes, source: str, on_bad_row: OnBadRow) -> TextFile:
    """Find the lines of the text; the text itself stays the only copy of the rows."""
    starts, ends, numbers = array("Q"), array("Q"), array("Q")
    dropped: Counter[str] = Counter()
    start = number = 0
    while start < len(text):
        number += 1
        end = text.find(b"\n", start)
        end = len(text) if end < 0 else end
        line = text[start:end]
        if line.strip():
            try:
                objects = _Objects()
                row = _parsed(line, f"{source}, line {number}", objects)
                # Half a pair can only come from an escape; rows that need no look at their parts are the most.
                unusual = objects.repeated or may_be_too_deep(line) or _ESCAPED_SURROGATE.search(line)
                if unusual or not isinstance(row, dict):
                    check_row(row, f"{source}, line {number}")
            except DataError as error:
                if on_bad_row == "error":
                    raise
                dropped[error.reason] += 1
            else:
                starts.append(start)
                ends.append(end)
                numbers.append(number)
        start = end + 1
    return TextFile(JsonRows(text, starts, ends), numbers, "line", dropped)


def _collected(
    values: Iterable[tuple[int, object]], source: str, unit: Literal["line", "row"], on_bad_row: OnBadRow
) -> TextFile:
    numbers, dropped = array("Q"), Counter[str]()

    def usable() -> Iterator[Row]:
        for number, value in values:
            try:
                row = check_row(value, f"{source}, {unit} {number}")
            except DataError as error:
                if on_bad_row == "error":
                    raise
                dropped[error.reason] += 1
            else:
                numbers.append(number)  # while `JsonRows.of` writes the rows
                yield row

    return TextFile(JsonRows.of(usable()), numbers, unit, dropped)


# ---- CSV ----


def _csv(text: bytes, source: str, delimiter: str) -> Iterator[tuple[int, Row | DataError]]:
    """Yield the rows with their numbers; a row whose cells do not fit the columns is yielded as an error."""
    number = 0
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a long document
    try:
        lines = io.TextIOWrapper(io.BytesIO(text), encoding="utf-8", newline="")
        reader = csv.DictReader(lines, strict=True, delimiter=delimiter)
        columns = list(reader.fieldnames or [])
        if len(set(columns)) < len(columns):
            raise DataError(f"{source}: two columns share a name; got {', '.join(columns)}")
        for number, row in enumerate(reader, start=1):
            # DictReader fills missing cells with None, and puts surplus ones in a list under None.
            cells = sum(value is not None for name, value in row.items() if name is not None)
            cells += len(row.get(None) or [])
            if cells == len(columns):
                yield number, dict(row)
            else:
                yield number, DataError(f"{source}, row {number}: expected {len(columns)} cells, got {cells}")
    except csv.Error as error:
        raise DataError(f"{source}, row {number + 1}: not valid CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source}, near row {number + 1}: not UTF-8 ({error}); save it as UTF-8") from error
