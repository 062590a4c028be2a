"""How far a step of two processes under each strategy is from that of one process; `python benchmarks/invariance.py`.

Both train on the same global batch with the same responses, in float32 on CPU processes over gloo. `largest_difference`
is that of a weight's change, as a share of the largest change; `figures` that of the logged figures, the
loss among them. In the case `budget` two processes cut their rollouts by a budget of tokens, and one does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import RESULTS, description

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from distributed.invariance import OPTIMIZERS, STRATEGIES, change, run
from distributed.invariance import main as train
from helpers.ranks import launch
from helpers.training import distance, save_policy


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the step under every strategy and write a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["llama", "qwen2", "gpt2", "opt"], default="llama")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--cases", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--results", type=Path, default=RESULTS / "invariance.jsonl", help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = save_policy(folder / "policy", options.family)
        reference = save_policy(folder / "reference", options.family, noise=0.02)
        lines = [
            json.dumps({"benchmark": "invariance", "family": options.family, **line, **description()})
            for case in options.cases
            for line in compare_strategies(case, options.strategies, policy, reference, folder)
        ]
    options.results.write_text("\n".join(lines) + "\n")


def compare_strategies(
    case: str, strategies: Sequence[str], policy: str, reference: str, folder: Path
) -> list[dict[str, str | float]]:
    """Return a line for each strategy."""
    one = run("auto", case, policy, reference, folder / "one", ranks=1)
    lines: list[dict[str, str | float]] = []
    for strategy in strategies:
        launch(train, strategy, case, folder)
        two = torch.load(folder / f"{strategy}-{case}-0.pt", weights_only=True)
        largest = distance(change(two["weights"]), change(one["weights"]))
        figures = max(abs(two["logged"][name] - value) for name, value in one["logged"].items())
        print(f"{case:8} {strategy:6} {largest:.1e} {figures:.1e}", flush=True)
        lines.append(
            {"case": case, "strategy": strategy, "ranks": 2, "largest_difference": largest, "figures": figures}
        )
    return lines


if __name__ == "__main__":
    main()
