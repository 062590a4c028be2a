"""Reads the folder of a run: configuration, curves, samples and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from remax_lightning.errors import UserError
from remax_lightning.json_text import load_json
from remax_lightning.tools.report.curves import MARKS, Curve, read_curves
from remax_lightning.yaml_files import load_yaml

STAGES = ("train", "validation")
"""Stages with a file of sample dumps."""


class Run(NamedTuple):
    """The data of a run; missing parts are empty.

    Args:
        folder: folder of the run.
        config: the configuration as text.
        settings: the parsed configuration.
        curves: scalars by log key.
        samples: entries of the sample dumps, in the order of their steps.
        figures: figures of the evaluation by name: `value` and, if known, `low`, `high` and `n`.
        started: time of the first scalar in seconds since 1970; None without curves.
        seconds: time from the first scalar to the last.
        notes: messages about parts that could not be read.
    """

    folder: Path
    config: str
    settings: dict[str, Any]
    curves: dict[str, Curve]
    samples: list[dict[str, Any]]
    figures: dict[str, dict[str, float]]
    started: float | None
    seconds: float
    notes: list[str]


def read_run(folder: Path, evaluation: Path | None = None) -> Run:
    """Read the folder of a run.

    Args:
        folder: folder of the run.
        evaluation: file of the evaluation; None takes the latest `evaluation*.json` in the folder, if there is one.

    Raises:
        UserError: if it is not the folder of a run, or the evaluation does not exist.
    """
    # ---- The folder ----
    if not _is_run(folder):
        raise UserError(f"RUN: {_why_not_a_run(folder)}")
    if evaluation is not None and not evaluation.is_file():
        raise UserError(f"--evaluation: there is no file {evaluation}; give the evaluation.json that remax test wrote")
    notes: list[str] = []
    path = folder / "config.yaml"
    config = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    # ---- Logs, samples and evaluation; each may be missing ----
    curves, times = read_curves(folder, notes)
    samples = [
        sample for stage in STAGES for sample in _read_samples(folder / "samples" / f"{stage}.jsonl", stage, notes)
    ]
    samples.sort(key=lambda sample: sample["step"])
    figures = _read_figures(evaluation or _latest_evaluation(folder, notes), notes)
    # ---- First and last time that something was logged ----
    started, seconds = (min(times), max(times) - min(times)) if times else (None, 0.0)
    return Run(folder, config, _parse_settings(config, notes), curves, samples, figures, started, seconds, notes)


def _is_run(folder: Path) -> bool:
    marks = (*MARKS, "samples/*.jsonl", "evaluation*.json")
    return any(next(folder.glob(mark), None) is not None for mark in marks)


def _latest_evaluation(folder: Path, notes: list[str]) -> Path:
    """Return the latest evaluation; `remax test` numbers further ones in the same folder."""
    # by time: evaluation_10.json would come before evaluation_2.json by name
    files = sorted(folder.glob("evaluation*.json"), key=lambda path: path.stat().st_mtime)
    if len(files) > 1:
        others = ", ".join(path.name for path in files[:-1])
        notes.append(f"This is the latest evaluation, {files[-1].name}; --evaluation selects another one ({others}).")
    return files[-1] if files else folder / "evaluation.json"


def _why_not_a_run(folder: Path) -> str:
    expected = (
        "expected the folder of a run, with TensorBoard's events.out.tfevents.*, metrics.csv, W&B's run-*.wandb,"
        " samples/*.jsonl or evaluation.json in it, such as runs/remax/version_0"
    )
    if not folder.exists():
        return f"there is no {folder}; {expected}"
    if not folder.is_dir():
        return f"{folder} is a file; {expected}"
    # "runs" -> "runs/remax/version_0", up to three levels below
    runs = [path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth) if path.is_dir() and _is_run(path)]
    if not runs:
        return f"{folder} is not a run; {expected}"
    latest = max(runs, key=lambda path: path.stat().st_mtime)
    return f"{folder} is not a run but contains runs; give one of them, such as the latest, {latest}"


def _read_samples(path: Path, stage: str, notes: list[str]) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    broken = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                sample = load_json(line)
                sample = {**sample, "step": int(sample["step"]), "stage": stage, "response": str(sample["response"])}
            except (ValueError, KeyError, TypeError, OverflowError):  # 1e400 is infinite
                broken += 1
                continue
            yield sample
    if broken:
        notes.append(f"{broken} line{'s' if broken > 1 else ''} of {path.name} could not be read and are left out.")


def _read_figures(path: Path, notes: list[str]) -> dict[str, dict[str, float]]:
    if not path.is_file():
        return {}
    try:
        # {"figures": {"reward": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 64}}}, or {"reward": 0.5} in it
        named = load_json(path.read_text(encoding="utf-8"))["figures"]
        read = {str(name): figure if isinstance(figure, dict) else {"value": figure} for name, figure in named.items()}
        return {
            name: {key: float(figure[key]) for key in ("value", "low", "high", "n") if figure.get(key) is not None}
            for name, figure in read.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        notes.append(f"{path.name} could not be read: expected an object with figures, numbers by name.")
        return {}


def _parse_settings(config: str, notes: list[str]) -> dict[str, Any]:
    try:
        settings = load_yaml(config, "config.yaml")
    except yaml.YAMLError as error:
        notes.append(f"It is shown as text, since it cannot be read as YAML: {str(error).splitlines()[0]}")
        settings = None
    return settings if isinstance(settings, dict) else {}
