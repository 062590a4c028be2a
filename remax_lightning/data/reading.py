"""Read rows from files, folders, the hub and memory; for each row, messages can say where it is."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import pickle
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, cast, overload
from urllib.parse import urlsplit

from remax_lightning.data.text_files import (
    COMPRESSED,
    EXTENSIONS,
    JsonRows,
    OnBadRow,
    check_is_no_pointer,
    check_row,
    data_suffix,
    read_text_file,
)
from remax_lightning.data.text_files import Row as Row  # the name that other modules import from here
from remax_lightning.errors import DataError, exception_chain

BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".xml": "xml",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".tar": "webdataset",
}
"""Endings of the formats that `datasets` reads, with the name of its builder."""

READABLE = f"{', '.join((*EXTENSIONS, '.parquet', '.arrow'))} (or one of the first five in {', '.join(COMPRESSED)})"


class Rows(NamedTuple):
    """The rows of one data set.

    Args:
        source: the file, or the name on the hub.
        unit: what `numbers` count: `line` in JSON lines, `row` elsewhere.
        values: the rows, read or parsed on access; iterate over them once where possible.
        numbers: the place of each row in the source, from 1.
        files: what messages call the place of each row, without its number, where `source` is several files.
        dropped: how many rows were left out when they were read, by reason.
    """

    source: str
    unit: str
    values: Sequence[Row]
    numbers: Sequence[int]
    files: Sequence[str] | None = None
    dropped: Counter[str] = Counter()  # noqa: RUF012 - never written to

    def where(self, index: int) -> str:
        """Return the location of row `index` for messages: `train.jsonl, line 7`."""
        # "train.jsonl, line 7"; of several files, "a.csv, row 7"
        place = f"{self.source}, {self.unit}" if self.files is None else self.files[index]
        return f"{place} {self.numbers[index]}"

    def take(self, indices: Sequence[int]) -> Rows:
        """Return the rows at `indices` without copying them; they keep their locations."""
        select = getattr(self.values, "select", None)  # of JsonRows and of a Dataset
        return self._replace(
            values=_Selected(self.values, indices) if select is None else select(indices),
            numbers=[self.numbers[i] for i in indices],
            files=None if self.files is None else [self.files[i] for i in indices],
            dropped=Counter(),
        )

    def fingerprint(self) -> str:
        """Return a hash of the rows' contents, in their order; their file's name, place and time do not matter."""
        digest = hashlib.sha256()
        _hash(self.values, digest)
        return digest.hexdigest()


class _Selected(Sequence[Row]):
    """Some of the rows of another sequence."""

    def __init__(self, values: Sequence[Row], indices: Sequence[int]) -> None:
        self.values, self.indices = values, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return _Selected(self.values, self.indices[index])
        return self.values[self.indices[index]]


class _Joined(Sequence[Row]):
    """Several sequences of rows, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self.parts = parts
        self.starts = [0, *accumulate(len(part) for part in parts)]  # parts of 3 and 2 rows -> [0, 3, 5]

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return _Selected(self, range(len(self))[index])
        index = range(len(self))[index]  # raises IndexError, and counts from the end below 0
        part = bisect(self.starts, index) - 1
        return self.parts[part][index - self.starts[part]]


def read_rows(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str = "train",
    name: str | None = None,
    key: str = "data.path",
    on_bad_row: OnBadRow = "error",
) -> Rows:
    """Read all rows of files, of a folder or of a data set on the hub.

    JSON lines, JSON arrays, CSV and TSV are read here, compressed or not, so that messages know the line; whatever else
    is read by `datasets`.

    Args:
        path: a file, a pattern such as `data/*.jsonl.gz`, a folder that `Dataset.save_to_disk` wrote or that
            `datasets.load_dataset` reads, an address (`https://`, `hf://`, `s3://`), or the name of a data set on the
            hub; or a list of these.
        split: split of a data set on the hub or in a folder; a file has none.
        name: configuration of a data set on the hub; a file has none.
        key: configuration key of `path`, for messages.
        on_bad_row: whether a row that is no object with named columns stops the reading, or is left out and counted.

    Raises:
        DataError: if there is no such file or data set, if it holds no row, or if a row cannot be read.
    """
    # ---- Read each item; a pattern such as "data/*.jsonl" is several parts ----
    items = [os.fspath(item) for item in ([path] if isinstance(path, str | os.PathLike) else path)]
    parts = [part for item in items for part in _read_item(item, split, name, key, on_bad_row)]
    source = ", ".join(items)
    rows = parts[0] if len(parts) == 1 else _join(parts, source)
    # ---- At least one row ----
    if not len(rows.values):
        if rows.dropped:
            raise DataError(f"{key}: not one row of {rows.source} can be read: {count_reasons(rows.dropped)}")
        raise DataError(f"{key}: {rows.source or 'an empty list'} holds no rows; expected at least one")
    return rows


def rows_in_memory(data: Any, *, split: str = "train", key: str = "data", on_bad_row: OnBadRow = "error") -> Rows:
    """Return rows that are in memory already; none is copied.

    Args:
        data: a `datasets.Dataset`, a `DatasetDict` of which `split` is taken, a DataFrame, columns as a dictionary of
            lists, or a list or another sequence of dictionaries.
        split: split of a `DatasetDict`.
        key: name of the argument, for messages.
        on_bad_row: as in `read_rows`.

    Raises:
        DataError: if it is none of these, or holds no row.
    """
    import datasets

    # By the module's name, so that pandas and polars are imported only by those who use them.
    form = type(data).__module__.partition(".")[0]
    if isinstance(data, Mapping) and data and all(isinstance(value, datasets.Dataset) for value in data.values()):
        data = _of_split(data, split, key)  # {"train": Dataset, "test": Dataset}
    elif isinstance(data, Mapping) and all(isinstance(value, list | tuple) for value in data.values()):
        data = _of_columns(partial(datasets.Dataset.from_dict, dict(data)), key)  # {"prompt": [...], "answer": [...]}
    elif form in ("pandas", "polars") and not hasattr(data, "columns"):
        raise DataError(f"{key}: expected a DataFrame, got {type(data).__name__}; write data.to_frame('prompt')")
    elif form in ("pandas", "polars") and (twice := [name for name, n in Counter(data.columns).items() if n > 1]):
        raise DataError(
            f"{key}: the column {twice[0]!r} stands there {Counter(data.columns)[twice[0]]} times; rename one"
        )
    elif form in ("pandas", "polars"):
        data = _of_columns(partial(_of_frame, data, form), key)
    # ---- A Dataset, or any sequence of rows ----
    is_sequence = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, datasets.Dataset):
        rows = Rows(key, "row", cast("Sequence[Row]", data), range(1, len(data) + 1))
    elif is_sequence and not isinstance(data, str | bytes | Mapping):
        rows = _checked_list(data, key, on_bad_row)
    else:
        raise DataError(
            f"{key}: expected a datasets.Dataset, a DataFrame or a list of dictionaries, got {type(data).__name__};"
            f" {_instead(data, key)}"
        )
    if not len(rows.values):
        raise DataError(f"{key}: it holds no rows{f': {count_reasons(rows.dropped)}' if rows.dropped else ''}")
    return rows


def _instead(data: Any, key: str) -> str:
    if isinstance(data, str | Path):
        return f"write {key.removesuffix('data')}path={str(data)!r} for a file or a name on the hub"
    return "make a list or a Dataset of what can be read only once"


def count_reasons(dropped: Mapping[str, int], most: int = 5) -> str:
    """Say how many rows were dropped for which reason, the commonest reasons first: `3 not valid JSON, 1 ...`."""
    # {"not valid JSON": 3, "no column 'prompt'": 1} -> "3 not valid JSON, 1 no column 'prompt'"
    common = Counter(dropped).most_common()
    text = ", ".join(f"{count} {reason}" for reason, count in common[:most])
    rest = sum(count for _, count in common[most:])
    return f"{text}, {rest} for other reasons" if rest else text


def is_on_hub(path: str | Sequence[str]) -> bool:
    """Whether `datasets` has to download a part of what `path` names."""
    if not isinstance(path, str):
        return any(is_on_hub(item) for item in path)
    return not _looks_like_file(path) and not Path(path).expanduser().exists()


def load_hub(path: str, *, split: str, name: str | None, key: str) -> Any:
    """Return a split of a data set through `datasets`, which downloads it once and keeps it.

    Raises:
        DataError: if `datasets` cannot give it.
    """
    from datasets import load_dataset
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    folder = Path(path).expanduser()
    if "://" in path:
        # An address: its ending chooses the builder, which downloads the file. JSON is the default.
        suffix = data_suffix(urlsplit(path).path)  # without what a link may end with, as in "?download=true"
        builder = BUILDERS.get(suffix, "csv" if suffix in (".csv", ".tsv") else "json")
        options: dict[str, Any] = {"delimiter": "\t"} if suffix == ".tsv" else {}
        return _load(path, split, key, lambda: load_dataset(builder, data_files={split: path}, split=split, **options))
    if not folder.exists():
        try:
            # refuses what cannot be "owner/name", before the hub is asked
            validate_repo_id(path)
        except HFValidationError as error:
            raise DataError(
                f"{key}: there is no file {path!r}, and it is no name of a data set on the hub; give a file ending in"
                f" {READABLE}"
            ) from error
    return _load(path, split, key, lambda: load_dataset(str(folder) if folder.exists() else path, name, split=split))


# ---- One path ----


def _looks_like_file(path: str) -> bool:
    # "train.jsonl", "./rows" and "data/my/rows" are files; "owner/name" is a data set on the hub
    known = data_suffix(path) in (*EXTENSIONS, *BUILDERS) or Path(path).suffix.lower() in COMPRESSED
    return "://" not in path and (known or path.startswith((".", "/", "~")) or path.count("/") > 1)


def _read_item(path: str, split: str, name: str | None, key: str, on_bad_row: OnBadRow) -> list[Rows]:
    place = Path(path).expanduser()
    # ---- What exists here comes first: it may have the name of a data set on the hub ----
    if place.is_file():
        return [_read_file(place, path, key, on_bad_row)]
    if place.is_dir():
        return [_read_folder(place, path, split, name, key)]
    # ---- A pattern ----
    if glob.has_magic(path) and "://" not in path:
        # pathlib takes relative patterns only, so it starts at "/" or at the current folder
        files = sorted(file for file in Path(place.anchor).glob(str(place.relative_to(place.anchor))) if file.is_file())
        if not files:
            raise DataError(f"{key}: no file matches {path!r}")
        return [_read_file(file, str(file), key, on_bad_row) for file in files]
    # ---- The hub, unless the path must be a file, which is then missing ----
    if _looks_like_file(path):
        raise DataError(f"{key}: there is no file {path!r}; give an existing file or a hub name")
    return [_of_dataset(load_hub(path, split=split, name=name, key=key), f"{path} ({split})")]


def _read_file(file: Path, source: str, key: str, on_bad_row: OnBadRow) -> Rows:
    suffix = data_suffix(file)
    # JSON and CSV are read here, since `datasets` would not say which line is wrong.
    if suffix in EXTENSIONS:
        read = read_text_file(file, source, on_bad_row)
        return Rows(source, read.unit, read.values, read.numbers, dropped=read.dropped)
    if suffix not in BUILDERS:
        raise DataError(f"{key}: cannot read {source}; give a file ending in {READABLE}, got {file.suffix!r}")
    check_is_no_pointer(file, source)
    from datasets import load_dataset

    # ---- Parquet, Arrow and others ----
    files = {"train": str(file)}
    with _quiet():
        try:
            values = load_dataset(BUILDERS[suffix], data_files=files, split="train")
        except Exception as error:  # a broken file: no common base class
            kind = BUILDERS[suffix].capitalize()
            raise DataError(f"{source}: not a readable {kind} file ({_reason(error)})") from error
    return _of_dataset(values, source)


def _read_folder(folder: Path, source: str, split: str, name: str | None, key: str) -> Rows:
    """Read a folder of `save_to_disk`, or one whose files `load_dataset` makes splits of."""
    # state.json is of a Dataset, dataset_dict.json of a DatasetDict
    if not any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _of_dataset(load_hub(source, split=split, name=name, key=key), f"{source} ({split})")
    from datasets import load_from_disk

    data = _load(source, split, key, lambda: load_from_disk(str(folder)))
    if isinstance(data, Mapping):
        return _of_dataset(_of_split(data, split, f"{key}: {source}"), f"{source} ({split})")
    return _of_dataset(data, source)


def _of_dataset(data: Any, source: str) -> Rows:
    return Rows(source, "row", data, range(1, len(data) + 1))


def _of_frame(frame: Any, form: str) -> Any:
    from datasets import Dataset

    return Dataset.from_polars(frame) if form == "polars" else Dataset.from_pandas(frame, preserve_index=False)


def _of_columns(make: Callable[[], Any], key: str) -> Any:
    """Return the data set of columns, whose values have to be of one type each."""
    try:
        return make()
    except Exception as error:  # of Arrow and of its guesses: no common base class
        raise DataError(
            f"{key}: expected columns of one length, each with values of one type, got others ({_reason(error)});"
            " give a list of dictionaries, whose values may be of any type"
        ) from error


def _of_split(data: Mapping[str, Any], split: str, what: str) -> Any:
    if split not in data:
        raise DataError(f"{what} has no split {split!r} (data.loading.train_split, val_split), only {', '.join(data)}")
    return data[split]


def _checked_list(data: Sequence[Any], key: str, on_bad_row: OnBadRow) -> Rows:
    values, numbers, dropped = [], [], Counter[str]()
    # By index: a map-style data set of torch need not end an iteration.
    for number, value in enumerate((data[i] for i in range(len(data))), start=1):
        try:
            # any mapping will do; the rows are dictionaries
            row = dict(value) if isinstance(value, Mapping) and not isinstance(value, dict) else value
            values.append(check_row(row, f"{key}, row {number}"))
            numbers.append(number)
        except DataError as error:
            if on_bad_row == "error":
                raise
            dropped[error.reason] += 1
    return Rows(key, "row", values, numbers, dropped=dropped)


def _join(parts: Sequence[Rows], source: str) -> Rows:
    # Each file numbers its own rows, so every row has the name of its file.
    places = [f"{part.source}, {part.unit}" for part in parts]
    return Rows(
        source,
        "row",
        _Joined([part.values for part in parts]),
        [number for part in parts for number in part.numbers],
        [place for place, part in zip(places, parts, strict=True) for _ in part.numbers],
        sum((part.dropped for part in parts), Counter()),
    )


# ---- What `datasets` does ----


def _load(path: str, split: str, key: str, load: Any) -> Any:
    with _quiet():
        try:
            return load()
        except Exception as error:  # network, missing name, unknown split or configuration: no common base class
            missing = "" if "://" in path or Path(path).expanduser().exists() else f"; there is no file {path!r} either"
            raise DataError(
                f"{key}: split {split!r} of the data set {path!r} could not be loaded ({_reason(error)}){missing}; give"
                f" a hub name that this machine can reach, or a file ending in {READABLE}"
            ) from error


def _reason(error: BaseException) -> str:
    """Return the first line of what went wrong; `datasets` wraps that in an error that says nothing."""
    reasons = (cause for cause in exception_chain(error) if type(cause).__name__ != "DatasetGenerationError")
    error = next(reasons, error)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of `datasets` where nobody watches them move."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _hash(values: Any, digest: Any) -> None:
    """Add the contents of rows to a hash, as stored bytes where there are some."""
    # The bytes of each row, as they are in the file.
    if isinstance(values, JsonRows):
        for start, end in zip(values.starts, values.ends, strict=True):
            digest.update(values.text[start:end] + b"\n")
    elif isinstance(values, _Joined):
        for part in values.parts:
            _hash(part, digest)
    elif (
        hasattr(values, "with_format") and values.format["type"] != "custom"
    ):  # a Dataset, in batches of Arrow: a hundred times as fast as row by row
        import pyarrow

        for table in values.with_format("arrow").iter(1000):
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table.combine_chunks())
            digest.update(sink.getvalue())
    else:  # rows in memory, and a Dataset whose transform makes others of what it stores
        for row in values:
            digest.update(_as_bytes(row) + b"\n")


def _as_bytes(row: Row) -> bytes:
    """Return bytes that are the same for equal rows, for a hash."""
    try:
        return json.dumps(row, sort_keys=True).encode()
    except (TypeError, ValueError, RecursionError):  # dates, arrays, images, keys of several types
        try:
            return pickle.dumps(row)
        except Exception:  # whatever an object of a user's own raises
            return repr(row).encode()
