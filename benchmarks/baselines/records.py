"""The results as JSON lines: appended while runs compute, read by key, the last line of a key counts."""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import RESULTS, description, resident

RUNS = RESULTS / "baselines_runs.jsonl"
"""An evaluation of a run per line."""
SECONDS = RESULTS / "baselines_seconds.jsonl"
"""Seconds of a step, by task, samples per prompt, and whether it has greedy responses."""
ROOT = Path(__file__).parents[2]


class Cell(NamedTuple):
    """A run of the study."""

    task: str
    arm: str
    rate: float
    seed: int


class Evaluation(NamedTuple):
    """What was measured at a step of a run.

    Args:
        step: optimizer steps so far.
        samples: responses trained on so far.
        greedy_steps: steps so far whose rollout had greedy responses.
        figures: of the held-out prompts, by name without `val/`.
        variance: second moment of the gradient with each baseline, divided by that of the run's own.
        rollouts: prompts that responses were generated for so far, relative to those trained on.
    """

    step: int
    samples: int
    greedy_steps: int
    figures: dict[str, float]
    variance: dict[str, float]
    rollouts: float = 1.0


Curves = dict[Cell, list[Evaluation]]


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line; a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def replace(path: Path, lines: Sequence[dict[str, Any]], key: Sequence[str]) -> None:
    """Write lines in the place of older ones with the same values of `key`."""
    new = {tuple(line.get(name) for name in key) for line in lines}
    old = [line for line in read_lines(path) if tuple(line.get(name) for name in key) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in [*old, *lines]), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, none where it does not exist; half a line at its end, of a kill, is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def read_curves(paths: Iterable[Path]) -> Curves:
    """Return the evaluations of each run by step; of a step that was evaluated twice, the later one."""
    steps: dict[Cell, dict[int, Evaluation]] = defaultdict(dict)
    for path in paths:
        for line in read_lines(path):
            cell = Cell(line["task"], line["arm"], line["rate"], line["seed"])
            steps[cell][line["step"]] = Evaluation(**{name: line[name] for name in Evaluation._fields if name in line})
    return {cell: [evaluations[step] for step in sorted(evaluations)] for cell, evaluations in steps.items()}


class PeakMemory:
    """The most that this process holds from now on, over what it holds now: of steps, above the models themselves."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # from here on the peak counts anew
        self._base = resident("VmRSS")

    def gigabytes(self) -> float:
        """Return it, as of now, and not less than 0: the kernel counts some pages late."""
        return max(0.0, round((resident("VmHWM") - self._base) / 1e9, 4))


def machine() -> dict[str, Any]:
    """Return machine, versions, date and commit."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return description() | {"commit": commit}
