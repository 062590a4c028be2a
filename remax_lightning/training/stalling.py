"""Tells the watchdog of a run what it has reached: batches, evaluations, checkpoints."""

from __future__ import annotations

import math
import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from remax_lightning.errors import UserError
from remax_lightning.run_folder import run_folder
from remax_lightning.strategies.stall_watchdog import StallWatchdog


class StallTimeout(Callback):
    """Ends a run that makes no progress for too long, with the stacks of all ranks in the folder of the run.

    The modules of this package add it to every run. It watches from the start of the fit or the evaluation, when models
    are loaded, to the end.

    Args:
        seconds: without a batch, a rollout, a score or a checkpoint.

    Raises:
        UserError: if it is not above 0.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        if not 0 < seconds < math.inf:
            raise UserError(f"model.stall_timeout: expected seconds above 0, or null for none, got {seconds}")
        self.seconds = seconds
        self._watchdog: StallWatchdog | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to watch."""
        self._start(trainer, "the fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to watch, unless the evaluation is part of a fit."""
        self._start(trainer, "an evaluation")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to watch."""
        self._start(trainer, "an evaluation")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to watch."""
        self._start(trainer, "predictions")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Report a batch."""
        self._report(f"training batch {batch_idx} after optimizer step {trainer.global_step}")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Report the end of a batch."""
        self._report(f"what follows optimizer step {trainer.global_step}: callbacks, checkpoints, the next batch")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Report a batch of an evaluation."""
        self._report(f"batch {batch_idx} of an evaluation")

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Report a checkpoint."""
        self._report("saving a checkpoint")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the end of training: checkpoints and exports follow."""
        self._report("the end of training")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch no longer."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Watch no longer: the run has ended."""
        self._stop()

    def _start(self, trainer: Trainer, what: str) -> None:
        # The evaluations of a fit come here too, and go on with its watchdog. It needs POSIX signals.
        if self._watchdog is None and os.name == "posix":
            self._watchdog = StallWatchdog(self.seconds, run_folder(trainer), trainer.global_rank, trainer.world_size)
        self._report(what)

    def _report(self, what: str) -> None:
        if self._watchdog is not None:
            self._watchdog.report(what)

    def _stop(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
