"""Prompts, supervised examples and preferences: reading, formatting, ordering, batching."""

from __future__ import annotations

from remax_lightning.data.base import TextDataModule
from remax_lightning.data.collate import MicroBatchSampler
from remax_lightning.data.formatting import PairColumns
from remax_lightning.data.options import LoadingConfig, SelectionConfig
from remax_lightning.data.prompts import PromptDataModule, ReasoningGymDataModule
from remax_lightning.data.reading import read_rows, rows_in_memory
from remax_lightning.data.responses import PreferenceDataModule, SFTDataModule
from remax_lightning.data.tokenizers import load_tokenizer

__all__ = [
    "LoadingConfig",
    "MicroBatchSampler",
    "PairColumns",
    "PreferenceDataModule",
    "PromptDataModule",
    "ReasoningGymDataModule",
    "SFTDataModule",
    "SelectionConfig",
    "TextDataModule",
    "load_tokenizer",
    "read_rows",
    "rows_in_memory",
]
