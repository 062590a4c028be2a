"""The pipeline on several seeds: `python benchmarks/pipeline.py`; a JSON line per seed in results/pipeline.jsonl."""

from __future__ import annotations

import argparse
from pathlib import Path

from demo_seeds import figures
from machine import RESULTS
from timing import save


def main() -> None:
    """Run the pipeline once per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS / "pipeline.jsonl", help="default: %(default)s")
    options = parser.parse_args()
    for seed in options.seeds:
        line = {"benchmark": "pipeline", "variant": f"seed {seed}", "device": "cpu", **figures("pipeline", seed)}
        save(options.results, [line])


if __name__ == "__main__":
    main()
