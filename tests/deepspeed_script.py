"""Run in a process of its own by test_strategies.py: one weight, SGD, and what its gradient came to."""

from __future__ import annotations

import json
import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from remax_lightning.strategies import ReMaxDeepSpeedStrategy


class OneWeight(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


if __name__ == "__main__":
    accumulate, stage = int(sys.argv[1]), int(sys.argv[2])
    module = OneWeight()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=ReMaxDeepSpeedStrategy(stage=stage),
        accumulate_grad_batches=accumulate,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.ones(accumulate, 1), batch_size=1))
    print("RESULT", json.dumps(module.layer.weight.item()))
