"""The four sources of a data module's rows: paths and memory, for training and validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remax_lightning.data import PreferenceDataModule, PromptDataModule, SFTDataModule
from remax_lightning.errors import DataError, UserError

ROWS = [
    {"prompt": f"{n}+{n}=", "response": str(2 * n), "chosen": str(2 * n), "rejected": "no", "n": n} for n in range(6)
]
KINDS = [PromptDataModule, SFTDataModule, PreferenceDataModule]


def numbers(batches: Any) -> list[int]:
    return [row["n"] for batch in batches for row in batch.rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["list", "dataset"])
def test_rows_in_memory_make_the_batches_of_their_file(kind: Any, form: str, policy_path: Path, tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = ROWS if form == "list" else datasets.Dataset.from_list(ROWS)
    in_memory = kind(data=rows, val_data=rows, tokenizer=str(policy_path), batch_size=2)
    from_file = kind(path, policy_path, [path], batch_size=2)
    in_memory.setup()
    from_file.setup()
    for loader in ("train_dataloader", "val_dataloader"):
        pairs = zip(getattr(in_memory, loader)(), getattr(from_file, loader)(), strict=True)
        for batch, expected in pairs:
            assert batch.rows == expected.rows
            assert batch.prompts == expected.prompts
            assert all(
                (value == other).all() for value, other in zip(batch, expected, strict=True) if hasattr(value, "shape")
            )
    assert numbers(in_memory.val_dataloader()) == list(range(6))


def test_held_out_rows_in_memory(policy_path: Path) -> None:
    data = PromptDataModule(data=ROWS, val_size=2, tokenizer=str(policy_path), batch_size=1)
    data.setup()
    rows = numbers(data.train_dataloader()), numbers(data.val_dataloader())
    assert [len(part) for part in rows] == [4, 2]
    assert sorted(rows[0] + rows[1]) == list(range(6))


@pytest.mark.parametrize("kind", KINDS)
def test_errors_name_the_argument_and_the_row(kind: Any, policy_path: Path) -> None:
    with pytest.raises(DataError, match=r"^val_data, row 1: there is no column 'p'"):
        kind(data=ROWS, val_data=ROWS, prompt_column="p", tokenizer=str(policy_path)).setup("validate")
    with pytest.raises(DataError, match=r"needs 64 training rows, but data \(data\) has 6 to use"):
        kind(data=ROWS, tokenizer=str(policy_path), batch_size=64).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"^data\.path: missing, and there is no default; .*from Python as data="),
        ({"path": "a.jsonl"}, r"^data\.tokenizer: missing, and there is no default"),
        ({"path": "a.jsonl", "data": ROWS, "tokenizer": "t"}, r"data\.path must be null beside data\.data"),
        ({"data": ROWS, "val_path": "a", "val_data": ROWS, "tokenizer": "t"}, r"data\.val_path must be null beside"),
        (
            {"data": ROWS, "val_data": ROWS, "val_size": 2, "tokenizer": "t"},
            r"must be 0 beside data\.val_data",
        ),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_from_one_place(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(**options)
