"""Prompts and supervised examples: reading, formatting, ordering, batching."""

from __future__ import annotations

from remax_lightning.data.base import LoadingConfig, TextDataModule
from remax_lightning.data.prompts import PromptDataModule
from remax_lightning.data.reading import read_rows
from remax_lightning.data.sampler import SplitSampler
from remax_lightning.data.supervised import SFTDataModule
from remax_lightning.data.tokenizers import load_tokenizer

__all__ = [
    "LoadingConfig",
    "PromptDataModule",
    "SFTDataModule",
    "SplitSampler",
    "TextDataModule",
    "load_tokenizer",
    "read_rows",
]
