"""Kills a run of two processes at several places, goes on from what is left; `python benchmarks/kill_resume.py`.

Every run is the real `remax fit` with Lightning's launcher, `devices: 2` and a checkpoint after each of four steps, on
CPU processes over gloo. One process gets SIGKILL; how long it takes until no process is left is `seconds_to_end`. Then
`remax fit --ckpt_path last` runs. Under `lost` stands what the run that goes on does otherwise than one that nothing
happened to: its losses are compared bit by bit, those of steps that are taken twice both times.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, description

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from distributed.killing import PLACES, STEPS, STRATEGIES, hit, losses, remax, write_run
from helpers.training import save_policy

KILLED_AFTER = 2
"""Optimizer steps that are done, and saved, when the signal comes in the third."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill and go on under every strategy, at every place, and write a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--results", type=Path, default=RESULTS / "kill_resume.jsonl", help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as name:
        policy = save_policy(Path(name) / "policy")
        for strategy in options.strategies:
            whole = run_uninterrupted(Path(name) / strategy / "whole", policy, strategy)
            for place in options.places:
                for rank in ranks_at(strategy, place):
                    folder = Path(name) / strategy / f"{place}-{rank}"
                    line = {"strategy": strategy, **kill_and_resume(folder, policy, strategy, place, rank, whole)}
                    lines.append(json.dumps({"benchmark": "kill_resume", **line, **description()}))
                    print(*line.values(), flush=True)
    options.results.write_text("\n".join(lines) + "\n")


def ranks_at(strategy: str, place: str) -> list[int]:
    """Return the ranks worth killing there: under DDP only rank 0 writes a file."""
    return [0] if place == "saving" and strategy == "ddp" else [0, 1]


def run_uninterrupted(folder: Path, policy: str, strategy: str) -> list[float]:
    """Return the losses of a run that nothing happens to."""
    ended = remax(folder, *write_run(folder, policy, strategy, []))
    if ended.code != 0:
        raise RuntimeError(ended.out)
    resumed_losses = losses(folder)
    return [resumed_losses[step][0] for step in range(1, STEPS + 1)]


def kill_and_resume(
    folder: Path, policy: str, strategy: str, place: str, rank: int, whole: list[float]
) -> dict[str, Any]:
    """Kill the run, go on, and return what became of it."""
    first = remax(folder, *write_run(folder, policy, strategy, [hit(folder, place, rank, step=KILLED_AFTER)]))
    if first.seconds is None:
        raise RuntimeError(f"nothing was killed\n{first.out}")
    reached = max(losses(folder))
    left = sorted(path.stem for path in folder.glob("runs/*/*/checkpoints/*.ckpt"))
    second = remax(folder, *write_run(folder, policy, strategy, []), "--ckpt_path", "last")
    resumed_losses = losses(folder)
    repeated = sum(len(times) - 1 for times in resumed_losses.values())
    return {
        "place": place,
        "killed_rank": rank,
        "seconds_to_end": round(first.seconds, 1),
        "step_reached": reached,
        "checkpoints_left": left,
        "steps_repeated": repeated,
        "lost": describe_difference(second.code, resumed_losses, whole),
    }


def describe_difference(code: int, resumed_losses: dict[int, list[float]], whole: list[float]) -> str:
    """Say what the run that went on lacks or does otherwise."""
    if code != 0:
        return f"it did not go on: exit code {code}"
    if sorted(resumed_losses) != list(range(1, STEPS + 1)):
        return f"steps: it took {sorted(resumed_losses)}"
    largest = max(abs(loss - whole[step - 1]) for step, times in resumed_losses.items() for loss in times)
    return "nothing" if largest == 0 else f"losses differ by up to {largest:.1e}"


if __name__ == "__main__":
    main()
