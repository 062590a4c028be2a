"""Reads the curves of a run: TensorBoard's event files, `metrics.csv`, or the file of an offline W&B run."""

from __future__ import annotations

import csv
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from remax_lightning.errors import UserError
from remax_lightning.json_text import load_json
from remax_lightning.records import logger_files

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
