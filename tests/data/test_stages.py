"""One data set over three stages: every row in one of them, whatever else is set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remax_lightning.data import LoadingConfig, PreferenceDataModule, PromptDataModule, SFTDataModule
from remax_lightning.data.base import TextDataModule
from remax_lightning.data.options import STAGES, select_stage_rows
from remax_lightning.data.reading import Rows
from remax_lightning.errors import DataError, UserError


def rows(total: int) -> Rows:
    return Rows("x.jsonl", "line", [{"n": n} for n in range(total)], range(1, total + 1))


def shares_of(total: int, shares: tuple[float, float, float], seed: int = 0) -> list[list[int]]:
    return [[row["n"] for row in select_stage_rows(rows(total), shares, stage, seed).values] for stage in STAGES]


@pytest.mark.parametrize("total", [10, 23, 100, 1001])
@pytest.mark.parametrize("shares", [(2, 4, 4), (1, 1, 1), (0.2, 0.3, 0.5), (1, 1, 8)])
def test_every_row_is_in_one_stage(total: int, shares: tuple[float, float, float]) -> None:
    found = shares_of(total, shares)
    assert sorted(n for part in found for n in part) == list(range(total))
    for part, share in zip(found, shares, strict=True):
        assert abs(len(part) - total * share / sum(shares)) <= 1
        assert part == sorted(part)


def test_the_seed_decides_and_nothing_else() -> None:
    assert shares_of(50, (2, 4, 4)) == shares_of(50, (2, 4, 4))
    assert shares_of(50, (2, 4, 4)) == shares_of(50, (1, 2, 2))
    assert shares_of(50, (2, 4, 4), seed=1) != shares_of(50, (2, 4, 4))
    assert shares_of(50, (2, 4, 4))[0] != list(range(10))


def test_a_stage_without_a_row_is_told() -> None:
    with pytest.raises(DataError, match=r"stage_split=\[1, 100, 100\] leaves none of the 3 rows of x\.jsonl to"):
        shares_of(3, (1, 100, 100))


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    texts = [{"n": n, "prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "no"} for n in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return str(path)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("val_size", [0, 4])
def test_the_three_data_modules_share_a_file(pairs: str, policy_path: Path, val_size: int) -> None:
    """Whatever seed, batch or held-out rows each of them has of its own."""
    seen: list[set[int]] = []
    for number, (kind, options) in enumerate(
        [(SFTDataModule, {"response_column": "chosen"}), (PreferenceDataModule, {}), (PromptDataModule, {})]
    ):
        loading = LoadingConfig(stage_split=(2, 4, 4))
        data: Any = kind(
            pairs, str(policy_path), val_size=val_size, batch_size=2, seed=number, loading=loading, **options
        )
        data.setup("fit")
        seen.append({example.row["n"] for part in (data._train, data._val) if part for example in part.examples})
    assert [len(each) for each in seen] == [10, 20, 20]
    assert set.union(*seen) == set(range(50))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ((0, 4, 4), r"stage_split leaves nothing for SFTDataModule, got \[0, 4, 4\]; its stage is supervised"),
        ((0, 0, 0), r"must be three shares of 0 or more, for supervised, reward_model, remax"),
        ((1, -1, 4), r"must be three shares of 0 or more"),
        ((1, float("nan"), 4), r"must be three shares of 0 or more"),
        ((1, 2), r"must be three shares of 0 or more"),
    ],
)
def test_shares_are_checked(split: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SFTDataModule("x.jsonl", "y", loading=LoadingConfig(stage_split=split))


def test_a_data_module_of_no_stage_takes_no_share() -> None:
    class Own(TextDataModule):
        def _collate(self, num_micro_batches: int) -> Any: ...

    with pytest.raises(UserError, match="stage_split must be null for Own, which belongs to no stage"):
        Own("x.jsonl", "y", None, 0, "prompt", None, 1, 1, 0, LoadingConfig(stage_split=(2, 4, 4)))
