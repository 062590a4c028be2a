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


def main(gradients: list[float], result: Path, precision: str = "32-true", stage: int = 2) -> None:
    """Train a weight of 1 with the mean of `gradients` and a learning rate of 1, a micro-batch for each."""
    module, accumulate = OneWeight(), len(gradients)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=ReMaxDeepSpeedStrategy(stage=stage),
        precision=precision,
        accumulate_grad_batches=accumulate,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = torch.tensor(gradients, dtype=torch.bfloat16 if "bf16" in precision else torch.float32)[:, None]
    trainer.fit(module, DataLoader(rows, batch_size=1))
    result.write_text(str(module.layer.weight.item()))
