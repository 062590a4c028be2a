"""The study of baselines: `python -m benchmarks.baselines {run,seconds,table,gradients,norms}`.

`run` computes runs in pieces and goes on where it was stopped; `seconds` measures a step of each kind on an idle
machine; `table` writes docs/baselines.md and its pictures from all; `gradients` measures baselines without training;
`norms` compares cheap norms of gradients with true ones.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.baselines import gradients, norms
from benchmarks.baselines.page import write_page
from benchmarks.baselines.records import RUNS, SECONDS, machine, replace
from benchmarks.baselines.runs import Limits, compute, load_average, time_steps
from benchmarks.baselines.tasks import ARMS, DEFAULT_ARMS, FOLDER, TASKS, Arm, Task

MEASURING = {
    "gradients": (gradients.main, "measure baselines on a task without training"),
    "norms": (norms.main, "compare cheap norms of gradients with true ones"),
}
"""Commands that leave all but the task to `remax baselines`."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the commands."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.baselines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="compute runs until the time is over or nothing is left")
    run.add_argument("--seconds", type=float, default=float("inf"), help="stop after this many (default: never)")
    run.add_argument("--piece", type=float, default=180.0, help="seconds of a piece (default: %(default)s)")
    run.add_argument("--results", type=Path, default=RUNS, help="default: %(default)s")
    timing = commands.add_parser("seconds", help="measure a step of each kind; the machine has to be idle")
    timing.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    timing.add_argument("--steps", type=int, default=10, help="steps that count in a round (default: %(default)s)")
    timing.add_argument(
        "--kind",
        nargs="+",
        choices=list(KINDS),
        default=list(KINDS),
        dest="kinds",
        help="which (default: all); one alone with the memory of its steps, for which the process must take no others",
    )
    timing.add_argument("--results", type=Path, default=SECONDS, help="default: %(default)s")
    for command in (run, timing):
        command.add_argument("--task", nargs="+", default=list(TASKS), choices=list(TASKS), dest="tasks")
        command.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    run.add_argument("--seeds", type=int, help="how many of a task's seeds (default: all)")
    run.add_argument("--arm", nargs="+", default=list(DEFAULT_ARMS), choices=list(ARMS), dest="arms")
    commands.add_parser("table", help="write docs/baselines.md and its pictures from the results")
    for name, (_, text) in MEASURING.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in MEASURING:
        MEASURING[arguments[0]][0](arguments[1:])
        return 0
    options = make_parser().parse_args(arguments)
    if options.command == "run":
        limits = Limits(time.monotonic() + options.seconds, options.piece)
        chosen = [ARMS[name] for name in options.arms]
        results, folder = options.results.resolve(), options.folder.resolve()
        named = [TASKS[name] for name in options.tasks]
        chosen_tasks = [task._replace(seeds=task.seeds[: options.seeds]) for task in named]
        compute(chosen_tasks, chosen, results, folder, limits)
    elif options.command == "seconds":
        folder, results = options.folder.resolve(), options.results.resolve()
        for name in options.tasks:
            if len(options.kinds) > 1:
                measure_seconds(TASKS[name], options.kinds, folder, results, options.rounds, options.steps)
            else:
                measure_alone(TASKS[name], options.kinds[0], folder, results, options.steps)
    else:
        write_page()
    return 0


KINDS = {
    "greedy": Arm("greedy", "greedy"),
    "plain": Arm("plain", "batch_mean"),
    "plain, n = 2": Arm("plain, n = 2", "leave_one_out", 2),
    "plain, n = 4": Arm("plain, n = 4", "group_mean", 4),
    "optimal_per_token": ARMS["optimal_per_token"],
}
"""A step costs what its responses cost: a row of `seconds` for each kind of rollout."""


def measure_seconds(task: Task, kinds: Sequence[str], folder: Path, results: Path, rounds: int, steps: int) -> None:
    """Measure kinds of steps in turn, A B C A B C, and write their medians."""
    values: dict[str, list[tuple[float, float, float]]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name in kinds:
            values[name] += time_steps(task, KINDS[name], folder, steps, warmup=3).steps
    lines = [_seconds_line(task, name, triples) for name, triples in values.items()]
    replace(results, lines, ("task", "kind", "greedy"))


def measure_alone(task: Task, name: str, folder: Path, results: Path, steps: int) -> None:
    """Measure seconds and memory of one kind of step, as the first that this process takes."""
    clock = time_steps(task, KINDS[name], folder, steps, warmup=3)
    line = _seconds_line(task, name, clock.steps) | {"peak_over_base_gb": clock.peak_over_base_gb}
    print(f"{clock.peak_over_base_gb} GB over the models")
    replace(results, [line], ("task", "kind", "greedy"))


def _seconds_line(task: Task, name: str, triples: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """Return the medians of steps."""
    wall, processor, share = (statistics.median(column) for column in zip(*triples, strict=True))
    figures = {"seconds": round(wall, 5), "processor_seconds": round(processor, 5), "rollout_share": round(share, 3)}
    print(task.name, name, f"{wall:.4f} s, of the processor {processor:.4f} s", flush=True)
    kind = {"task": task.name, "kind": KINDS[name].kind, "greedy": name == "greedy"}
    return kind | figures | {"steps": len(triples), "load": load_average()} | machine()


if __name__ == "__main__":
    sys.exit(main())
