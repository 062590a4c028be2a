"""A user's own DataModule, made from nothing of the project but the batch."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from remax_lightning.types import PromptBatch


class SquarePrompts(LightningDataModule):
    """Asks for squares: `7*7=`."""

    def __init__(self, tokenizer: str, largest: int = 8, batch_size: int = 4) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
        self.rows = [{"number": n, "response": str(n * n)} for n in range(largest)]
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, self.batch_size, shuffle=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, self.batch_size, collate_fn=self.collate)

    predict_dataloader = test_dataloader = val_dataloader

    def collate(self, rows: list[dict]) -> PromptBatch:
        prompts = [f"{row['number']}*{row['number']}=" for row in rows]
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt")
        return PromptBatch(tokens["input_ids"], tokens["attention_mask"].to(torch.bool), prompts, rows)
