"""A logger for trackio, Hugging Face's experiment tracker on this machine; Lightning has none."""

from __future__ import annotations

import io
import math
import os
import time
import uuid
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _add_prefix, _convert_params
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from remax_lightning.errors import UserError


class TrackioLogger(Logger):
    """Logs to trackio: a SQLite database on this machine, or a Space on the Hugging Face hub.

    `trackio show` opens the dashboard. Steps are the optimizer steps done.

    Args:
        project: the project, which holds runs.
        name: the name of the run, by which trackio knows it. By default one from the time of its start. A run that
            exists is continued.
        save_dir: folder of trackio's files and parent of the runs' folders; None takes `TRACKIO_DIR`, else trackio's
            own, and `trainer.default_root_dir` for the folders of runs. One process writes to one such folder only.
        space_id: a Space on the hub to log to, as `owner/name`, instead of files on this machine.
        group: a group of runs in the dashboard.
        prefix: what every name of a metric begins with.

    Raises:
        UserError: if trackio is not installed, or writes to another folder already.
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        project: str = "remax",
        name: str | None = None,
        save_dir: str | None = None,
        space_id: str | None = None,
        group: str | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        if find_spec("trackio") is None:
            raise UserError("trainer.logger: TrackioLogger needs trackio; pip install 'remax-lightning[loggers]'")
        self._project, self._run_name, self._save_dir = project, name, save_dir
        self._space_id, self._group, self._prefix = space_id, group, prefix
        self._experiment: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The name of the run; None before it has started, unless it was set."""
        return self._run_name

    @property
    def save_dir(self) -> str | None:
        """The folder that was set."""
        return self._save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run, which starts here.

        Raises:
            UserError: if trackio writes to another folder than `save_dir` already.
        """
        if self._experiment is None:
            if self._save_dir is not None:
                os.environ.setdefault("TRACKIO_DIR", str(Path(self._save_dir).absolute()))  # read at the first import
            import trackio

            folder = Path(trackio.utils.TRACKIO_DIR)
            if self._save_dir is not None and folder.absolute() != Path(self._save_dir).absolute():
                raise UserError(
                    f"trainer.logger.init_args.save_dir: trackio writes to {str(folder)!r} in this process, got"
                    f" {self._save_dir!r}; use one folder, which TRACKIO_DIR may set"
                )
            if self._run_name is None:
                self._run_name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
            with redirect_stdout(io.StringIO()):  # it prints how to open the dashboard
                self._experiment = trackio.init(
                    self._project,
                    self._run_name,
                    group=self._group,
                    space_id=self._space_id,
                    resume="allow",
                    embed=False,
                )
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Add to the configuration of the run, which trackio stores with the next metrics."""
        self.experiment.config.update(_convert_params(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers, tables or histograms; numbers that are not finite are left out."""
        named = _add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR)
        plain = {name: float(value) if hasattr(value, "item") else value for name, value in named.items()}
        finite = {name: value for name, value in plain.items() if not isinstance(value, float) or math.isfinite(value)}
        self.experiment.log(finite, step=step)

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], data: Sequence[Sequence[Any]], step: int | None = None) -> None:
        """Log a table."""
        import trackio

        self.log_metrics({key: trackio.Table(columns=columns, data=[list(row) for row in data])}, step)

    @rank_zero_only
    def log_histogram(self, key: str, values: Any, step: int | None = None) -> None:
        """Log the histogram of an array."""
        import trackio

        self.log_metrics({key: trackio.Histogram(values)}, step)

    @rank_zero_only
    def log_artifact(self, folder: Path, name: str, alias: str) -> None:
        """Store a copy of a folder as a new version of an artifact."""
        self.experiment.log_artifact(str(folder), name=name, type="model", aliases=[alias])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is queued; whatever is logged afterwards continues the run."""
        if self._experiment is not None:
            with redirect_stdout(io.StringIO()):
                self._experiment.finish()
            self._experiment = None
