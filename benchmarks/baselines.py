"""What each baseline costs on a task: `python benchmarks/baselines.py TASK`; writes results/baselines.jsonl.

TASK is the name of the lines; the other arguments are those of `remax baselines`. The demo's task after its supervised
stage (`remax demo --max_steps 1` makes it) is

    python benchmarks/baselines.py demo --config demo --num_prompts 512
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from machine import RESULTS
from timing import save

from remax_lightning.tools.baselines import main as measure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one task and write the lines down, in the place of older ones of the same task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="name of the lines in the results")
    parser.add_argument("--results", type=Path, default=RESULTS / "baselines.jsonl")
    options, rest = parser.parse_known_args(arguments)
    lines = []
    for figure in measure(rest):
        line = {"benchmark": "baselines", "size": options.task, "variant": figure.name, "seconds": figure.seconds}
        for name in ("variance", "cost"):
            value, low, high = getattr(figure, name)
            line |= {name: value, f"{name}_low": low, f"{name}_high": high}
        lines.append(line)
    save(options.results, lines)


if __name__ == "__main__":
    main()
