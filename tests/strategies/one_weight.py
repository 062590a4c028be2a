"""One weight, SGD, and what its gradient came to; run by test_strategies.py on one rank."""

from __future__ import annotations

from pathlib import Path

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


def main(accumulate: int, result: Path) -> None:
    module = OneWeight()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=ReMaxDeepSpeedStrategy(stage=2),
        accumulate_grad_batches=accumulate,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.ones(accumulate, 1), batch_size=1))
    result.write_text(str(module.layer.weight.item()))
