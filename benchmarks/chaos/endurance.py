"""A long run of a tiny policy: memory, descriptors and threads must not grow with the steps."""

from __future__ import annotations

import ctypes
import gc
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from benchmarks.chaos.runs import Fixtures, configuration, write
from benchmarks.chaos.warm import RIGHT, WRONG, Outcome, Trial, command, judge

EVERY = 20
"""Optimizer steps between two measurements."""
WARM_UP = 0.5
"""Share of the steps before the slopes are taken: caches and buffers fill first."""
WINDOW = 20
"""Rollouts that the comparison of baselines keeps: its default of 200 would still be filling, 20 kB per rollout."""
MOST_KB_PER_STEP = 1.0
"""A leak of one tensor of the smallest size, of a record of a step, or of a file's buffer is more."""


class Measure(Callback):
    """Writes resident memory, open descriptors and threads of this process every few steps."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "measured.jsonl"

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Append step, kB, descriptors and threads."""
        if trainer.global_step % EVERY:
            return
        # What is garbage, and what the allocator keeps for later, is no leak.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        status = Path("/proc/self/status").read_text()
        kilobytes = int(status.partition("VmRSS:")[2].split()[0])
        counts = [len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("fd", "task")]
        with self.path.open("a") as file:
            file.write(json.dumps([trainer.global_step, kilobytes, *counts]) + "\n")


def trials(fixtures: Fixtures, seed: int, steps: int) -> Iterator[Trial]:
    """Yield the one trial."""
    yield Trial("endurance", 0, seed, partial(endure, fixtures, steps))


def endure(fixtures: Fixtures, steps: int, folder: Path, _: random.Random) -> Outcome:
    """Run so many steps with checkpoints, validations, samples and histograms, and look at the slopes."""
    config = configuration(fixtures, folder)
    config["trainer"] |= {
        "max_steps": steps,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 100,
    }
    measure = {"class_path": "benchmarks.chaos.endurance.Measure", "init_args": {"folder": str(folder)}}
    config["trainer"]["callbacks"][1]["init_args"]["every_n_train_steps"] = 50
    config["trainer"]["callbacks"].append(measure)
    config["samples"]["every_n_steps"] = 10
    config["gradient_variance"] = {"window": WINDOW}
    ended = command(folder, "fit", "--config", write(folder / "run.yaml", config), deadline=540)
    outcome = judge(ended)
    if outcome.outcome != RIGHT:
        return outcome
    rows = [json.loads(text) for text in (folder / "measured.jsonl").read_text().splitlines()]
    late = [row for row in rows if row[0] > WARM_UP * steps]
    memory, descriptors, threads = (slope([(row[0], row[i]) for row in late]) for i in (1, 2, 3))
    megabytes = f"{rows[0][1] / 1024:.0f} to {rows[-1][1] / 1024:.0f} MB"
    detail = (
        f"{rows[-1][0]} steps in {ended.seconds:.0f} s: {memory:+.3f} kB per step ({megabytes}),"
        f" {rows[-1][2]} descriptors, {rows[-1][3]} threads"
    )
    grew = memory > MOST_KB_PER_STEP or descriptors * steps > 2 or threads * steps > 2
    return Outcome(WRONG if grew else RIGHT, detail, f"{steps} steps")


def slope(points: list[tuple[float, float]]) -> float:
    """Return the slope of a straight line through points, by least squares."""
    middle = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    spread = sum((x - middle[0]) ** 2 for x, _ in points)
    return sum((x - middle[0]) * (y - middle[1]) for x, y in points) / spread if spread else 0.0
