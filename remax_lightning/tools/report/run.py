"""Reads the folder of a run: configuration, samples, evaluation, and curves from TensorBoard, CSV or offline W&B."""

from __future__ import annotations

import csv
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from remax_lightning.errors import UserError
from remax_lightning.files import load_json, logger_files
from remax_lightning.yaml_files import load_yaml

# ---- Curves: TensorBoard's event files, `metrics.csv`, or the file of an offline W&B run ----


MARKS = ("events.out.tfevents.*", "metrics.csv", "run-*.wandb")
"""Files with curves in the folder of a run, or, W&B's, in the folder that its logger has beside it."""

_STEP = "trainer/global_step"
_BLOCK = 32768
_HEADER = 7
"""Bytes at the start of a W&B file, and before every piece of a record: its checksum, length and kind."""


class Curve(NamedTuple):
    """One logged scalar.

    Args:
        steps: optimizer steps, increasing.
        values: finite values only.
    """

    steps: list[int]
    values: list[float]


def curve_files(folder: Path) -> list[Path]:
    """Return the files with curves of a run, in the order in which they were begun."""
    name = folder.name
    beside = folder.parent.parent / "wandb"  # where W&B writes under the same save_dir
    segments = {*beside.glob(f"*-{name}/run-{name}.wandb")} if beside.is_dir() else set()
    for files in logger_files(folder):
        segments |= {*files.glob("run-*.wandb")}
    return [file for mark in MARKS for file in sorted(folder.glob(mark), key=_begun)] + sorted(segments)


def _begun(file: Path) -> list[int]:
    """Return the numbers in a name, time and count of TensorBoard's files: of one second, the 10th follows the 9th."""
    return [int(number) for number in re.findall(r"\d+", file.name)]


def read_curves(folder: Path, notes: list[str]) -> tuple[dict[str, Curve], list[float]]:
    """Return the scalars, and the times at which they were logged, where the logger stores them.

    Raises:
        UserError: if the only curves are W&B's, and its package is not installed.
    """
    points: dict[str, dict[int, float]] = {}  # log key -> step -> value; of a repeated step, the later file's
    times: list[float] = []
    for file in curve_files(folder):  # one by one: a run that was resumed in its folder has some more
        try:
            rows = list(_READERS[file.suffix](file)) if file.suffix in _READERS else list(_read_events(file))
        except (OSError, ValueError, struct.error) as error:
            if isinstance(error, UserError):
                raise
            notes.append(f"{file.name} could not be read: {error}.")
            continue
        for key, step, value, seconds in rows:
            if math.isfinite(value):
                points.setdefault(key, {})[step] = value
            if seconds is not None:
                times.append(seconds)
    curves = {key: Curve(sorted(values), [values[step] for step in sorted(values)]) for key, values in points.items()}
    return curves, times


Row = tuple[str, int, float, float | None]
"""Log key, optimizer step, value, and seconds since 1970."""


def _read_events(file: Path) -> Iterator[Row]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()  # 0: every value, no sample
    events_by_key = {key: accumulator.Scalars(key) for key in accumulator.Tags()["scalars"]}
    shift = _shift(events_by_key)
    for key, events in events_by_key.items():
        yield from ((key, event.step + shift, event.value, event.wall_time) for event in events)


def _shift(events: Mapping[str, Sequence[Any]]) -> int:
    """Return what turns the steps of an event file into optimizer steps done: 1 for version 0.2.0 and before, else 0.

    They logged as Lightning does: a step, and the validation after it, under the number of steps before it. They logged
    no norm of the gradient, and a training step 0, which there is none of any more.
    """
    training = [event.step for key, values in events.items() if key.startswith("train/") for event in values]
    return int(bool(training) and ("train/grad_norm" not in events or min(training) == 0))


def _read_csv(file: Path) -> Iterator[Row]:
    with file.open(newline="", encoding="utf-8", errors="replace") as stream:
        for row in csv.DictReader(stream):
            step = row.get("step") or ""
            if not step.isdecimal():  # the last row of a killed run
                continue
            for key, text in row.items():
                if key not in (None, "step", "epoch") and isinstance(text, str) and text:
                    yield key, int(step), float(text), None


def _read_wandb(file: Path) -> Iterator[Row]:
    try:
        from wandb.proto.wandb_internal_pb2 import Record
    except ImportError:
        raise UserError(f"RUN: {file} needs wandb to be read; pip install 'remax-lightning[loggers]'") from None
    for data in _wandb_records(file):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") != "history":
            continue
        items = {item.key or ".".join(item.nested_key): load_json(item.value_json) for item in record.history.item}
        step = items.get(_STEP)
        if not isinstance(step, int | float):
            continue
        seconds = items.get("_timestamp")
        for key, value in items.items():  # tables and histograms are dictionaries
            if isinstance(value, int | float) and not key.startswith("_") and key not in (_STEP, "epoch"):
                yield key, int(step), float(value), seconds


def _wandb_records(file: Path) -> Iterator[bytes]:
    """Yield the records of a W&B file, which is a log in the format of LevelDB: pieces in blocks of 32 KiB.

    A run that was killed has cut the last record; it is left out.
    """
    data = file.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError("it is no file of W&B")
    position, parts = _HEADER, b""
    while position + _HEADER <= len(data):
        rest = _BLOCK - position % _BLOCK
        if rest < _HEADER:  # the end of a block is padding
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + _HEADER : position + _HEADER + length]
        if kind == 0 or len(piece) < length:
            return
        position += _HEADER + length
        parts = piece if kind in (1, 2) else parts + piece  # whole, first, middle, last
        if kind in (1, 4):
            yield parts


_READERS = {".csv": _read_csv, ".wandb": _read_wandb}


# ---- The folder ----


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
    if evaluation is not None and not figures:
        raise UserError(f"--evaluation: {evaluation} holds no figures; give the evaluation.json that remax test wrote")
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
