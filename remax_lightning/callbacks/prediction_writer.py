"""Writes the responses and rewards of `remax predict`, one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from remax_lightning.disk import append_lines, describe_disk_error, tolerate_disk_errors
from remax_lightning.distributed import gather_objects, max_over_ranks, sum_over_ranks
from remax_lightning.errors import UserError
from remax_lightning.run_folder import run_folder


class PredictionWriter(Callback):
    """Writes the dictionaries that `predict_step` returns to a JSONL file, batch by batch.

    With several ranks, each rank writes a file: `predictions.rank0.jsonl` and so on.

    Args:
        path: the file; `predictions.jsonl` in the run's folder by default. It must not exist.

    Raises:
        UserError: if the file exists when prediction starts, or cannot be written.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path = path
        self._lines = 0
        self._pending: list[str] = []
        self._warned: set[str] = set()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to overwrite or extend the file of another run."""
        # ---- The file must be new on every rank ----
        self._lines, self._pending = 0, []
        path = self._file(trainer)
        # All ranks decide the same, or the others would wait for the rank that stopped.
        if max_over_ranks(trainer, [float(path.exists())])[0] > 0:
            raise UserError(
                f"predictions.path must be a file that does not exist yet, got {path}; "
                "move it away or give another path"
            )
        # ---- It must be possible to write it: now, before anything is generated ----
        problem = ""
        try:
            append_lines(path, [])
            path.unlink()
        except OSError as error:
            problem = f"predictions.path: {describe_disk_error(error, path)}; give another path"
        if problems := [text for text in gather_objects(problem) if text]:
            raise UserError(problems[0])

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the predictions of a batch."""
        if not isinstance(outputs, list) or not all(isinstance(line, dict) for line in outputs):
            return
        # `default=str` writes dates of Parquet files as text.
        self._pending += [json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in outputs]
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        path = self._file(trainer)
        with tolerate_disk_errors(path, self._warned, "Predictions are kept in memory and tried again."):
            append_lines(path, self._pending)
            # Not reached if the write failed: the lines are tried again with the next batch.
            self._lines += len(self._pending)
            self._pending = []

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where the predictions are.

        Raises:
            UserError: if some of them could not be written.
        """
        missing = sum(gather_objects(len(self._pending)))
        if missing:
            raise UserError(f"predictions.path: {missing} predictions could not be written to {self._file(trainer)}")
        total = int(sum_over_ranks(trainer, [float(self._lines)])[0])
        if total:
            others = "" if trainer.world_size == 1 else f" and the files of the {trainer.world_size - 1} other ranks"
            rank_zero_info(f"Wrote {total} predictions to {self._file(trainer)}{others}.")

    def _file(self, trainer: Trainer) -> Path:
        path = Path(self.path) if self.path is not None else run_folder(trainer) / "predictions.jsonl"
        if trainer.world_size == 1:
            return path
        return path.with_name(f"{path.stem}.rank{trainer.global_rank}{path.suffix}")
