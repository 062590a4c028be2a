"""The shared DataModule on real text; its parts are tested with the subclasses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remax_lightning.data import PromptDataModule


@pytest.mark.slow
def test_gsm8k(gsm8k: Path, policy_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = gsm8k / "train.jsonl"
    lengths = [len(json.loads(line)["question"]) for line in path.open(encoding="utf-8")]
    # the character tokenizer makes one token of each character and puts one in front
    kept = sum(length + 1 <= 300 for length in lengths)
    assert 0 < kept < len(lengths) == 7473
    data = PromptDataModule(
        str(path),
        str(policy_path),
        val_path=str(gsm8k / "test.jsonl"),
        prompt_column="question",
        batch_size=32,
        max_prompt_length=300,
    )
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        data.setup("fit")
    assert f"dropped {7473 - kept} of 7473 rows" in caplog.text
    assert len(data.train_dataloader()) == kept // 32
    batch = next(iter(data.train_dataloader()))
    assert [row["question"] for row in batch.rows] == batch.prompts
    assert all("####" in row["answer"] for row in batch.rows)
