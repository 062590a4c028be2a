from __future__ import annotations

import csv
import inspect
import io
import json
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pandas
import pytest

from remax_lightning.data import read_rows, rows_in_memory
from remax_lightning.data.reading import _reason, is_on_hub
from remax_lightning.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1=", "answer": "2"},
    {"prompt": 'a "quoted", line\nand another', "answer": "ü"},
    {"prompt": "3+4=", "answer": "7"},
]


def write(tmp_path: Path, extension: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = tmp_path / f"rows{extension}"
    if extension == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif extension == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif extension == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("extension", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path, extension)
    rows = read_rows(str(path))
    assert list(rows.values) == ROWS
    unit = "line" if extension == ".jsonl" else "row"
    assert rows.where(2) == f"{path}, {unit} 3"


def test_nested_columns_survive_parquet_and_partition_names(tmp_path: Path) -> None:
    folder = tmp_path / "split=train"
    folder.mkdir()
    rows = [{"messages": [{"role": "user", "content": "hi"}]}]
    assert list(read_rows(str(write(folder, ".parquet", rows))).values) == rows


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a"}\n   \n\n{"prompt": "b"}\n\n')
    rows = read_rows(str(path))
    assert [row["prompt"] for row in rows.values] == ["a", "b"]
    assert list(rows.numbers) == [2, 5]
    assert rows.take([1]).where(0) == f"{path}, line 5"


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    for name, text in (("a.csv", "prompt\nx\n"), ("a.jsonl", '{"prompt": "x"}\n')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert list(read_rows(str(tmp_path / name)).values) == [{"prompt": "x"}]


def zipped(flags: int = 0, method: int = 0) -> bytes:
    """An archive of one file that says it is encrypted (bit 0) or compressed in another way."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", '{"a": 1}')
    data = bytearray(file.getvalue())
    for start in (6, data.index(b"PK\x01\x02") + 8):  # in front of the file, and in the directory
        data[start : start + 4] = struct.pack("<HH", flags, method)
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n', r"a\.jsonl, line 2: expected an object with named columns, got list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8 .*; save it as UTF-8"),
        ("a.jsonl", b"\n\n", r"data\.path: .*a\.jsonl holds no rows"),
        ("a.json", b'[{"a": 1}, 3]', r"a\.json, row 2: expected an object with named columns, got int"),
        ("a.json", b'3', r"a\.json: expected a list of objects, got int"),
        ("a.json", b'{"version": 1, "Data": [{"a": 1}]}', r"a\.json: one object with rows under 'Data', expected"),
        ("a.json", b'{"a": ["x", "y"], "b": [1, 2]}', r"a\.json: one object with a list for each column, expected a"),
        ("a.json", b'{\n"a": 1,\n}', r"a\.json: not valid JSON"),
        ("a.json", b'{"a": 1}\n{"a": \n', r"a\.json, line 2: not valid JSON"),
        ("a.jsonl", b'[1]\n[2]', r"a\.jsonl, line 1: expected an object with named columns, got list"),
        ("a.jsonl", b'{"a": "ok"}\n{"a": "x \\ud83d"}', r"a\.jsonl, line 2: column 'a' holds half a surr.*\\ud83d"),
        ("a.jsonl", b'{"a": [{"b": "\\uDE00"}]}', r"a\.jsonl, line 1: column 'a' holds half a surrogate.*\\ude00"),
        ("a.jsonl", b'{"a": "\xed\xa0\xbd"}', r"a\.jsonl, line 1: not UTF-8"),
        ("a.json", b'[{"a": "\\ud83d"}]', r"a\.json, row 1: column 'a' holds half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: JSON that cannot be read \(nested too deep, more than 64"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 65 + b"]" * 65 + b"}", r"line 2: column 'a' is nested too deep"),
        ("a.json", b'[{"a": ' + b'{"b": ' * 200 + b"1" + b"}" * 200 + b"}]", r"row 1: column 'a' is nested too deep"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}', r"a\.jsonl, line 2: column 'a' stands twice; remove one"),
        ("a.jsonl", b'{"a": [{"b": 1, "b": 1}]}', r"line 1: column 'a' has the key 'b' twice in an object; remove one"),
        ("a.json", b'[{"a": 1}, {"a": 1, "a": 1}]', r"a\.json, row 2: column 'a' stands twice; remove one"),
        ("a.json", b'[{"a": {"b": 1, "b": 1}}]', r"a\.json, row 1: column 'a' has the key 'b' twice"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"JSON that cannot be read \(a whole number of more than 4300"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x00", r"a\.jsonl\.zst: cannot be read"),
        ("a.jsonl.zip", b"PK\x03\x04", r"a\.jsonl\.zip: cannot be read"),
        ("a.jsonl.zip", zipped(flags=1), r"a\.jsonl\.zip: cannot be read \(a\.jsonl in it is encrypted; unpack it"),
        ("a.jsonl.zip", zipped(method=93), r"a\.jsonl\.zip: cannot be read \(That compression method is not"),
        ("a.tsv", b"a\tb\n1\t2\n3\n", r"a\.tsv, row 2: expected 2 cells, got 1"),
        ("a.json", b'[{"a": 1},', r"a\.json: not valid JSON"),
        ("a.json", b"", r"a\.json holds no rows"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv, row 2: expected 2 cells, got 1"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv, row 1: expected 2 cells, got 3"),
        ("a.csv", b'a,b\n1,2\n"3"x,4\n', r"a\.csv, row 2: not valid CSV"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv: two columns share a name"),
        ("a.csv", b"a,b\n", r"a\.csv holds no rows"),
        ("a.csv", b"", r"a\.csv holds no rows"),
        ("a.csv", b"a,b\n\xff,1\n", r"a\.csv, near row 1: not UTF-8"),
        ("a.parquet", b"nothing", r"a\.parquet: not a readable Parquet file"),
        ("a.doc", b"nothing", r"data\.path: cannot read .*a\.doc; give a file ending in \.jsonl"),
        ("a.arrow", b"nothing", r"a\.arrow: not a readable Arrow file"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    "path", ["nothing.jsonl", "./nothing", "/nowhere/nothing", "a/b/c/train", "~/nothing.csv", "rows.tsv.gz"]
)
def test_missing_file_is_said_without_asking_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would fail
    with pytest.raises(DataError, match=r"data\.val_path: there is no file"):
        read_rows(path, key="data.val_path")


def test_only_hub_names_are_downloaded(tmp_path: Path) -> None:
    assert is_on_hub("openai/gsm8k")
    assert is_on_hub("imdb")
    assert is_on_hub(["rows.jsonl", "imdb"])
    assert not is_on_hub(str(tmp_path))
    assert not is_on_hub(["rows.jsonl", "./rows", "rows.jsonl.gz", "a/b/c"])


@pytest.mark.slow
def test_datasets_reads_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, ".jsonl").rename(folder / "train.jsonl")
    write(folder, ".jsonl", ROWS[:1]).rename(folder / "test.jsonl")
    assert list(read_rows(str(folder)).values) == ROWS
    rows = read_rows(str(folder), split="test")
    assert list(rows.values) == ROWS[:1]
    assert rows.where(0) == f"{folder} (test), row 1"
    with pytest.raises(DataError, match=r"data\.path: split 'dev' of the data set .* could not be loaded"):
        read_rows(str(folder), split="dev")
    with pytest.raises(DataError, match=r"data\.val_path: split 'train' of the data set 'nobody/nothing'"):
        read_rows("nobody/nothing", key="data.val_path")


def test_gsm8k_row_counts(gsm8k: Path) -> None:
    for name, count in (("train.jsonl", 7473), ("test.jsonl", 1319)):
        rows = read_rows(str(gsm8k / name))
        assert len(rows.values) == count
        assert set(rows.values[-1]) == {"question", "answer"}


def compressed(name: str, data: bytes) -> bytes:
    """The bytes as the program that makes such files writes them."""
    import bz2
    import gzip
    import lzma

    import pyarrow

    if name.endswith(".zip"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("rows.jsonl", data)
        return file.getvalue()
    if name.endswith((".zst", ".lz4")):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd" if name.endswith(".zst") else "lz4") as stream:
            stream.write(data)
        return bytes(sink.getvalue())
    if name.endswith(".gz"):
        # in two members, as `cat a.gz b.gz` makes them
        return gzip.compress(data[:40]) + gzip.compress(data[40:])
    return bz2.compress(data) if name.endswith(".bz2") else lzma.compress(data)


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip"])
def test_compressed_files_keep_their_line_numbers(tmp_path: Path, ending: str) -> None:
    text = "\n".join(["", *map(json.dumps, ROWS)]).encode()
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(compressed(path.name, text))
    rows = read_rows(str(path))
    assert list(rows.values) == ROWS
    assert rows.where(0) == f"{path}, line 2"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.json", "\n".join(map(json.dumps, ROWS))),
        ("rows.ndjson", "\r\n".join(map(json.dumps, ROWS))),
        ("rows.jsonl", json.dumps(ROWS, indent=1)),
        ("rows.JSON.gz", json.dumps(ROWS)),
    ],
)
def test_what_json_holds_decides_and_not_its_ending(tmp_path: Path, name: str, text: str) -> None:
    data = text.encode()
    (tmp_path / name).write_bytes(compressed(name, data) if name.endswith(".gz") else data)
    assert list(read_rows(str(tmp_path / name)).values) == ROWS


def test_one_object_is_one_row_as_datasets_has_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert list(read_rows(str(tmp_path / "a.json")).values) == [{"a": 1}]


def test_utf_16_and_long_cells_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "ü"}\n', encoding="utf-16")
    assert list(read_rows(str(tmp_path / "a.jsonl")).values) == [{"prompt": "ü"}]
    (tmp_path / "a.csv").write_text(f"prompt,n\n{'x' * 300_000},1\n")
    assert len(read_rows(str(tmp_path / "a.csv")).values[0]["prompt"]) == 300_000


def test_tsv_and_arrow(tmp_path: Path) -> None:
    import pyarrow

    (tmp_path / "a.tsv").write_text("prompt\tmargin\n1,1\t0.5\n")
    assert list(read_rows(str(tmp_path / "a.tsv")).values) == [{"prompt": "1,1", "margin": "0.5"}]
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    rows = read_rows(str(tmp_path / "a.arrow"))
    assert list(rows.values) == ROWS
    assert rows.where(1) == f"{tmp_path}/a.arrow, row 2"


def test_patterns_and_lists_are_one_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS[2]))
    (tmp_path / "a.jsonl").write_text("\n".join(["", *map(json.dumps, ROWS[:2])]))
    (tmp_path / "c.csv").write_text("prompt,answer\n9,9\n")
    monkeypatch.chdir(tmp_path)
    rows = read_rows("*.jsonl")
    assert list(rows.values) == ROWS
    assert [rows.where(i) for i in range(3)] == ["a.jsonl, line 2", "a.jsonl, line 3", "b.jsonl, line 1"]
    assert read_rows(str(tmp_path / "**" / "b*.jsonl")).where(0) == f"{tmp_path}/b.jsonl, line 1"
    mixed = read_rows(["c.csv", "*.jsonl"])
    assert list(mixed.values) == [{"prompt": "9", "answer": "9"}, *ROWS]
    assert mixed.where(0) == "c.csv, row 1"
    taken = mixed.take([3, 0])
    assert list(taken.values) == [ROWS[2], {"prompt": "9", "answer": "9"}]
    assert taken.where(0) == "b.jsonl, line 1"
    with pytest.raises(DataError, match=r"data\.path: no file matches 'x\*\.jsonl'"):
        read_rows("x*.jsonl")
    with pytest.raises(DataError, match=r"data\.path: there is no file 'd\.jsonl'"):
        read_rows(["a.jsonl", "d.jsonl"])
    with pytest.raises(DataError, match=r"data\.path: an empty list holds no rows"):
        read_rows([])


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "splits"))
    assert list(read_rows(str(tmp_path / "plain")).values) == ROWS
    assert list(read_rows(str(tmp_path / "splits"), split="test").values) == ROWS[1:2]
    with pytest.raises(DataError, match=r"data\.path: .*splits has no split 'dev' .*, only train, test"):
        read_rows(str(tmp_path / "splits"), split="dev")


def test_only_a_hub_name_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("openai/gsm8k", name="main", split="test")
    assert list(rows.values) == ROWS
    assert rows.where(0) == "openai/gsm8k (test), row 1"
    with pytest.raises(DataError, match=r"there is no file 'my data', and it is no name of a data set on the hub"):
        read_rows("my data")
    read_rows("hf://datasets/a/b/rows.tsv")
    read_rows("https://host/rows.parquet?download=true")
    assert asked == [
        ("openai/gsm8k", "main", {"split": "test"}),
        ("csv", {"data_files": {"train": "hf://datasets/a/b/rows.tsv"}, "split": "train", "delimiter": "\t"}),
        ("parquet", {"data_files": {"train": "https://host/rows.parquet?download=true"}, "split": "train"}),
    ]


class Records(list[Any]):
    """A sequence of a user's own."""


class MapStyle:
    """What torch calls a map-style data set: any index gives something."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        return ROWS[index % 3]


def test_rows_in_memory_are_taken_as_they_are() -> None:
    import datasets
    import pandas

    data = datasets.Dataset.from_list(ROWS)
    forms: list[Any] = [data, ROWS, Records(ROWS), pandas.DataFrame(ROWS), data.to_dict()]
    forms += [MapStyle()]
    forms.append(datasets.DatasetDict(train=data, test=data.select([0])))
    for form in forms:
        rows = rows_in_memory(form)
        assert list(rows.values) == ROWS
        assert rows.where(2) == "data, row 3"
    assert list(rows_in_memory(forms[-1], split="test").values) == ROWS[:1]
    assert rows_in_memory(ROWS).values[0] is ROWS[0]
    assert list(rows_in_memory(data.select([2, 0])).values) == [ROWS[2], ROWS[0]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter(ROWS), "data: expected a datasets.Dataset, a DataFrame or a list of dictionaries, got list_iterator"),
        ("rows.jsonl", "data: expected a datasets.Dataset.*got str; write path='rows.jsonl' for a file"),
        (pandas.DataFrame({"prompt": ["1"]})["prompt"], r"data: .*got Series; write data\.to_frame\('prompt'\)"),
        (pandas.DataFrame([["1", "2"]], columns=["a", "a"]), "data: the column 'a' stands there 2 times; rename one"),
        ({"a": 1}, "data: expected a datasets.Dataset.*got dict"),
        ([], "data: it holds no rows"),
        ({"a": ["1", 2]}, "data: expected columns of one length, each with values of one type, .*list of dictionaries"),
        ({"a": ["1", "2"], "b": ["3"]}, "data: expected columns of one length, .*got length 1"),
        (pandas.DataFrame({"a": ["1", 2]}), "data: expected columns of one length, each with values of one type, got"),
        ([{"a": 1}, "b"], "data, row 2: expected an object with named columns, got str"),
        ([{"a": "\ud83d"}], r"data, row 1: column 'a' holds half a surrogate pair \(\\ud83d\)"),
    ],
)
def test_what_is_no_row_in_memory_is_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_in_memory(data)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_bad_rows_are_dropped_and_counted_on_demand(tmp_path: Path, name: str) -> None:
    lines = {
        "a.jsonl": ['{"a": "1"}', "{", '{"a": "\\ud83d"}', "[]", '{"a": "2"}', "}"],
        "a.csv": ["a", "1", "1,2", "2"],
    }[name]
    (tmp_path / name).write_text("\n".join(lines))
    rows = read_rows(str(tmp_path / name), on_bad_row="drop")
    assert list(rows.values) == [{"a": "1"}, {"a": "2"}]
    assert list(rows.numbers) == ([1, 5] if name == "a.jsonl" else [1, 3])
    reasons = {"not valid JSON": 2, "column 'a' holds half a surrogate pair": 1}
    reasons["expected an object with named columns"] = 1
    assert dict(rows.dropped) == (reasons if name == "a.jsonl" else {"expected N cells": 1})
    (tmp_path / name).write_text("\n".join(["a,b", "1"] if name == "a.csv" else ["{", "{"]))
    with pytest.raises(DataError, match=r"data\.path: not one row of .* can be read: \d (not valid|expected)"):
        read_rows(str(tmp_path / name), on_bad_row="drop")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"a": "1", "a": "2"}', "column 'a' stands twice"),
        ('{"a": {"b": 1, "b": 2}}', "column 'a' has the key 'b' twice in an object"),
        ('{"a": ' + "[" * 65 + "]" * 65 + "}", "column 'a' is nested too deep, more than N lists and objects"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_rows_that_json_leaves_open_are_dropped_on_demand(name: str, row: str, reason: str, tmp_path: Path) -> None:
    rows = ['{"a": "0"}', row, '{"a": "3"}']
    (tmp_path / name).write_text("\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]")
    read = read_rows(str(tmp_path / name), on_bad_row="drop")
    assert list(read.values) == [{"a": "0"}, {"a": "3"}]
    assert dict(read.dropped) == {reason: 1}


@pytest.mark.slow(0.3)
@pytest.mark.usefixtures("no_garbage_search")
def test_a_row_that_was_read_can_be_read_again_deep_within_other_calls(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": ' + "[" * 60 + "]" * 60 + "}")
    [row] = values = read_rows(str(tmp_path / "a.jsonl")).values

    def below(depth: int) -> Any:
        return values[0] if depth == 0 else below(depth - 1)

    assert below(sys.getrecursionlimit() - len(inspect.stack()) - 150) == row


def test_rows_in_memory_that_hold_themselves_are_refused() -> None:
    row: dict[str, Any] = {"a": []}
    row["a"] += [row["a"], row["a"]]
    with pytest.raises(DataError, match="data, row 1: column 'a' is nested too deep"):
        rows_in_memory([row])


@pytest.mark.slow(0.3)
def test_fingerprints_follow_contents_alone(tmp_path: Path) -> None:
    import datasets

    def fingerprint(rows: list[dict[str, Any]], folder: str = "a", extension: str = ".jsonl") -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        return read_rows(str(write(tmp_path / folder, extension, rows))).fingerprint()

    same_length = [{**ROWS[0], "answer": "3"}, *ROWS[1:]]
    for extension in (".jsonl", ".csv", ".parquet"):
        assert fingerprint(ROWS, "a", extension) == fingerprint(ROWS, "b", extension)
        assert fingerprint(ROWS, "a", extension) != fingerprint(same_length, "b", extension)
    rows = read_rows(str(tmp_path / "a" / "rows.csv"))
    assert rows.take([0, 1]).fingerprint() != rows.take([1, 0]).fingerprint()
    data = datasets.Dataset.from_list(ROWS)
    assert rows_in_memory(data).fingerprint() == rows_in_memory(datasets.Dataset.from_list(ROWS)).fingerprint()
    assert rows_in_memory(data).fingerprint() != rows_in_memory(data.select([1, 0, 2])).fingerprint()
    assert rows_in_memory(ROWS).fingerprint() != rows_in_memory(same_length).fingerprint()


def test_a_transform_is_part_of_the_fingerprint() -> None:
    """Else the prompts of another transform of the same rows would come out of the cache."""
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    shouted = data.with_transform(lambda batch: {"prompt": [text.upper() for text in batch["prompt"]]})
    asked = data.with_transform(lambda batch: {"prompt": [f"{text}?" for text in batch["prompt"]]})
    prints = {rows_in_memory(values).fingerprint() for values in (data, data.with_format("torch"), shouted, asked)}
    assert len(prints) == 3
    assert next(iter(rows_in_memory(asked).values)) == {"prompt": "1+1=?"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json.gz", "rows.parquet", "rows.arrow"])
def test_a_pointer_of_git_lfs_is_named(name: str, tmp_path: Path) -> None:
    """`git clone` of a data set leaves it where Git LFS is missing."""
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=rf"{name}: it is a pointer of Git LFS, not the data; run `git lfs pull`"):
        read_rows(str(tmp_path / name))


def test_paths_may_be_of_pathlib(tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl")
    assert list(read_rows(path).values) == list(read_rows([path]).values) == ROWS


def test_a_ring_of_causes_ends() -> None:
    """`datasets` wraps what went wrong in errors that say nothing, and a cause may lead back to them."""
    kind = type("DatasetGenerationError", (Exception,), {})
    outer, inner, reason = kind("outer"), kind("inner"), ValueError("cannot cast\nmore")
    outer.__cause__, inner.__cause__ = inner, outer
    assert _reason(outer) == "outer"
    inner.__cause__ = reason
    assert _reason(outer) == "cannot cast"
