from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remax_lightning.data import read_rows
from remax_lightning.data.reading import is_file_path
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n', r"a\.jsonl, line 2: expected an object with named columns, got list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b"\n\n", r"data\.path: .*a\.jsonl holds no rows"),
        ("a.json", b'[{"a": 1}, 3]', r"a\.json, row 2: expected an object with named columns, got int"),
        ("a.json", b'{"a": 1}', r"a\.json: expected a list of objects, got dict"),
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
        ("a.txt", b"nothing", r"data\.path: cannot read .*a\.txt; give a file ending in \.jsonl"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize("path", ["nothing.jsonl", "./nothing", "/nowhere/nothing", "a/b/c/train", "~/nothing.csv"])
def test_missing_file_is_said_without_asking_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would fail
    with pytest.raises(DataError, match=r"data\.val_path: there is no file"):
        read_rows(path, key="data.val_path")


def test_hub_names_are_no_file_paths(tmp_path: Path) -> None:
    assert not is_file_path("openai/gsm8k")
    assert not is_file_path("imdb")
    assert not is_file_path(str(tmp_path))


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


@pytest.mark.slow
def test_import_is_cheap() -> None:
    code = (
        "import sys, remax_lightning.data; "
        "heavy = ('datasets', 'deepspeed', 'pyarrow', 'transformers.modeling_utils'); "
        "print(*(name for name in heavy if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
