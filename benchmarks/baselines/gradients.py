"""What each baseline costs on a task, without training: `python -m benchmarks.baselines gradients TASK ...`.

TASK is the name of the lines in results/baselines.jsonl; the other arguments are those of `remax baselines`. The demo's
task after its supervised stage (`remax demo --max_steps 1` makes it) is

    python -m benchmarks.baselines gradients demo --config demo --num_prompts 512
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.baselines.records import machine, replace
from benchmarks.machine import RESULTS
from remax_lightning.tools.baselines import main as measure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one task and write the lines down, in the place of older ones of the same task."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.baselines gradients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", help="name of the lines in the results")
    parser.add_argument("--results", type=Path, default=RESULTS / "baselines.jsonl")
    options, rest = parser.parse_known_args(arguments)
    lines = []
    for figure in measure(rest):
        line = {
            "benchmark": "baselines",
            "size": options.task,
            "variant": figure.name,
            "seconds": _rounded(figure.seconds),
        }
        for name in ("variance", "cost"):
            value, low, high = (_rounded(number) for number in getattr(figure, name))
            line |= {name: value, f"{name}_low": low, f"{name}_high": high}
        lines.append(machine() | line)
    replace(options.results, lines, ("benchmark", "size", "variant"))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
