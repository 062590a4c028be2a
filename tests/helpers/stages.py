"""Rows and data modules of the stages before ReMax: preference pairs and supervised examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.training import write_rows

from remax_lightning.data import PairColumns, PreferenceDataModule, SFTDataModule

PAIRS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "11", "gap": 0.0},
    {"prompt": "12+34=", "chosen": "46, I think", "rejected": "1234", "gap": 1.0},
    {"prompt": "say a long word", "chosen": "incomprehensibilities", "rejected": "no", "gap": 0.5},
    {"prompt": "x", "chosen": "yz", "rejected": "", "gap": 0.0},
    {"prompt": "9", "chosen": "10", "rejected": "nine and ninety times nine", "gap": 0.25},
    {"prompt": "b", "chosen": "c", "rejected": "a", "gap": 0.0},
    {"prompt": "hello", "chosen": "world", "rejected": "hello hello", "gap": 0.0},
    {"prompt": "q", "chosen": "r?", "rejected": "s!", "gap": 2.0},
]
EXAMPLES = [
    {"prompt": "1+1=", "response": "2"},
    {"prompt": "12+34=", "response": "46"},
    {"prompt": "say a long word", "response": "incomprehensibilities"},
    {"prompt": "x", "response": "yz"},
    {"prompt": "9", "response": "10"},
    {"prompt": "b", "response": "c"},
    {"prompt": "hello", "response": "world"},
    {"prompt": "q", "response": "r?"},
]


def pair_data(
    folder: Path, tokenizer: str, kind: type[PreferenceDataModule] = PreferenceDataModule, **options: Any
) -> PreferenceDataModule:
    path = write_rows(folder / "pairs.jsonl", PAIRS)
    columns = PairColumns(margin="gap")
    defaults = {"val_path": path, "batch_size": 8, "pair_columns": columns, "max_prompt_length": 64, "max_length": 128}
    return kind(path, tokenizer, **(defaults | options))


def sft_data(folder: Path, policy: str, **options: Any) -> SFTDataModule:
    path = write_rows(folder / "rows.jsonl", EXAMPLES)
    defaults = {"val_path": path, "batch_size": 8, "max_prompt_length": 64, "max_response_length": 64}
    return SFTDataModule(path, policy, **(defaults | options))
