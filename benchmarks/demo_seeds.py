"""The demo on several seeds: `python benchmarks/demo_seeds.py`; writes one JSON line per seed to results/demo.jsonl."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from machine import RESULTS, description

SCRIPT = """
import importlib, json, sys
tool = importlib.import_module("remax_lightning.tools." + sys.argv[1])
print("FIGURES", json.dumps(tool.main(["--seed", sys.argv[2]])))
"""


def main() -> None:
    """Run the demo once per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    lines = []
    for seed in parser.parse_args().seeds:
        lines.append(json.dumps({"benchmark": "demo", "seed": seed, **figures("demo", seed), **description()}))
        print(lines[-1], flush=True)
    (RESULTS / "demo.jsonl").write_text("\n".join(lines) + "\n")


def figures(tool: str, seed: int) -> dict[str, Any]:
    """Run `remax demo` or `remax pipeline` in a folder and a process of its own, and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", SCRIPT, tool, str(seed)]
        output = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=True)
    [found] = [line for line in output.stdout.splitlines() if line.startswith("FIGURES")]
    rounded: dict[str, Any] = _rounded(json.loads(found.removeprefix("FIGURES")))
    return rounded


def _rounded(value: Any) -> Any:
    """Return numbers with four digits behind the point, those inside dictionaries too."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
