"""A user's own callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class RewardNotes(Callback):
    """Writes the mean reward of every step to a file of its own."""

    def __init__(self, file: str, decimals: int = 3) -> None:
        self.file = Path(file)
        self.decimals = decimals

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        mean = outputs["rollout"].reward.mean().item()
        with self.file.open("a") as file:
            file.write(f"{trainer.global_step} {mean:.{self.decimals}f}\n")
