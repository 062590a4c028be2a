"""Rows from files and from the hub, each row knowing where it stands."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from remax_lightning.errors import DataError

Row = dict[str, Any]

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")


class Rows(NamedTuple):
    """The rows of one data set.

    Args:
        source: the file, or the name on the hub.
        unit: what `numbers` count: `line` in JSONL, `row` elsewhere.
        values: the rows.
        numbers: the place of each row in the source, from 1.
    """

    source: str
    unit: str
    values: Sequence[Row]
    numbers: Sequence[int]

    def where(self, index: int) -> str:
        """Say where row `index` stands, for messages: `train.jsonl, line 7`."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"

    def take(self, indices: Sequence[int]) -> Rows:
        """Return the rows at `indices`, which keep their places."""
        return self._replace(values=[self.values[i] for i in indices], numbers=[self.numbers[i] for i in indices])


def is_file_path(path: str) -> bool:
    """Whether `path` names a file, rather than a data set on the hub or a folder for `datasets`."""
    file = Path(path).expanduser()
    looks_so = file.suffix.lower() in EXTENSIONS or path.startswith((".", "/", "~")) or path.count("/") > 1
    return file.is_file() or (looks_so and not file.is_dir())


def read_rows(path: str, *, split: str = "train", name: str | None = None, key: str = "data.path") -> Rows:
    """Read all rows of a file or of a data set on the hub.

    Args:
        path: a `.jsonl`, `.json` (a list of objects), `.csv` or `.parquet` file, else what
            `datasets.load_dataset` takes.
        split: split of a data set on the hub; a file has none.
        name: configuration of a data set on the hub; a file has none.
        key: configuration key of `path`, for messages.

    Raises:
        DataError: if there is no such file or data set, if it holds no row, or if a row cannot be read.
    """
    if not is_file_path(path):
        values = list(load_hub(path, split=split, name=name, key=key))
        rows = Rows(f"{path} ({split})", "row", values, range(1, len(values) + 1))
    else:
        file = Path(path).expanduser()
        if not file.is_file():
            raise DataError(f"{key}: there is no file {path!r}; give an existing file or a hub name")
        rows = _read_file(file, path, key)
    if not rows.values:
        raise DataError(f"{key}: {rows.source} holds no rows; expected at least one")
    return rows


def load_hub(path: str, *, split: str, name: str | None, key: str) -> Any:
    """Return a split of a data set through `datasets`, which downloads it once and keeps it.

    Raises:
        DataError: if `datasets` cannot give it.
    """
    from datasets import load_dataset

    try:
        return load_dataset(str(Path(path).expanduser()) if path.startswith("~") else path, name, split=split)
    except Exception as error:  # network, missing name, unknown split or configuration: no common base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{key}: split {split!r} of the data set {path!r} could not be loaded ({reason}); give a hub name "
            f"that this machine can reach, or a file ending in {', '.join(EXTENSIONS)}"
        ) from error


def _read_file(file: Path, source: str, key: str) -> Rows:
    extension = file.suffix.lower()
    if extension == ".jsonl":
        numbered = list(_jsonl(file, source))
        return Rows(source, "line", [row for _, row in numbered], [number for number, _ in numbered])
    readers = {".json": _json, ".csv": _csv, ".parquet": _parquet}
    if extension not in readers:
        raise DataError(
            f"{key}: cannot read {source}; give a file ending in {', '.join(EXTENSIONS)}, got {extension!r}"
        )
    values = list(readers[extension](file, source))
    return Rows(source, "row", values, range(1, len(values) + 1))


def _checked(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with named columns, got {type(value).__name__}")
    return value


def _jsonl(file: Path, source: str) -> Iterator[tuple[int, Row]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{source}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:  # also bytes that are not UTF-8
                raise DataError(f"{where}: not valid JSON ({error}); write one object per line") from error
            yield number, _checked(value, where)


def _json(file: Path, source: str) -> Iterator[Row]:
    try:
        values = json.loads(file.read_bytes() or b"[]")
    except ValueError as error:
        raise DataError(f"{source}: not valid JSON ({error})") from error
    if not isinstance(values, list):
        raise DataError(
            f"{source}: expected a list of objects, got {type(values).__name__}; "
            "write [{...}, {...}], or one object per line in a .jsonl file"
        )
    for number, value in enumerate(values, start=1):
        yield _checked(value, f"{source}, row {number}")


def _csv(file: Path, source: str) -> Iterator[Row]:
    number = 0
    try:
        # utf-8-sig drops the byte order mark that spreadsheets write
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True)
            columns = list(reader.fieldnames or [])
            if len(set(columns)) < len(columns):
                raise DataError(f"{source}: two columns share a name; got {', '.join(columns)}")
            for number, row in enumerate(reader, start=1):
                cells = sum(value is not None for name, value in row.items() if name is not None)
                cells += len(row.get(None) or [])
                if cells != len(columns):
                    raise DataError(f"{source}, row {number}: expected {len(columns)} cells, got {cells}")
                yield dict(row)
    except csv.Error as error:
        raise DataError(f"{source}, row {number + 1}: not valid CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source}, near row {number + 1}: not UTF-8 ({error}); save it as UTF-8") from error


def _parquet(file: Path, source: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        # not read_table, which takes folder names such as split=train for columns
        table = parquet.ParquetFile(file).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source}: not a readable Parquet file ({error})") from error
    for batch in table.to_batches():
        yield from batch.to_pylist()
