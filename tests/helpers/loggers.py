"""Loggers without their services: what a tracking service would be sent, kept in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


class RecordingLogger(Logger):
    """A tracking service with tables, histograms and artifacts, by the names that this package calls them."""

    def __init__(self, save_dir: Path | str, name: str = "mine", version: str | None = "first") -> None:
        super().__init__()
        self._save_dir, self._name, self._version = str(save_dir), name, version
        self.metrics: dict[str, list[tuple[int, float]]] = {}
        self.tables: dict[str, list[tuple[int, list[str], list[list[Any]]]]] = {}
        self.histograms: dict[str, list[tuple[int, int]]] = {}
        self.artifacts: list[tuple[str, str, set[str]]] = []
        self.params: dict[str, Any] = {}

    save_dir = property(lambda self: self._save_dir)  # type: ignore[assignment]
    name = property(lambda self: self._name)  # type: ignore[assignment]
    version = property(lambda self: self._version)  # type: ignore[assignment]

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append((step, float(value)))

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.params.update(params)

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.tables.setdefault(key, []).append((step, columns, data))

    def log_histogram(self, key: str, values: Any, step: int) -> None:
        self.histograms.setdefault(key, []).append((step, len(values)))

    def log_artifact(self, folder: Path, name: str, alias: str) -> None:
        self.artifacts.append((name, alias, {path.name for path in folder.iterdir()}))
