"""Loggers that cannot write: training goes on without them, and they are tried again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from remax_lightning.disk import silence_tensorboard_thread, tolerate_disk_errors
from remax_lightning.run_folder import run_folder

RETRY_SECONDS = 60.0
"""How long a TensorBoard writer that failed is left alone: each attempt creates another event file."""


class TolerantMethod:
    """Stands in for a method of a logger: a file that cannot be written is a warning, once for each logger.

    TensorBoard writes in a thread, which ends at its first error and raises that from every later call. A writer that
    failed is dropped, so that the next call opens another one.
    """

    def __init__(self, logger: Logger, method: Callable[..., Any], folder: Path, warned: set[str]) -> None:
        self._logger, self._method, self._folder, self._warned = logger, method, folder, warned

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the method, unless its logger failed a moment ago."""
        logger: Any = self._logger
        if time.monotonic() < vars(logger).get("_retry_at", 0.0):
            return None
        with tolerate_disk_errors(self._folder, self._warned, "Training goes on; the log is tried again."):
            return self._method(*args, **options)
        if isinstance(logger, TensorBoardLogger):
            logger._experiment = None
            logger._retry_at = time.monotonic() + RETRY_SECONDS
        return None


def tolerate_failing_logs(trainer: Trainer) -> None:
    """Have a run go on where a logger's files cannot be written; a second call changes nothing."""
    folder = run_folder(trainer)
    for logger in trainer.loggers:
        warned: set[str] = set()
        for name in ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize"):
            method = getattr(logger, name)
            if not isinstance(method, TolerantMethod):
                setattr(logger, name, TolerantMethod(logger, method, folder, warned))
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        silence_tensorboard_thread()
