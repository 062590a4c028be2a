"""The demo on several seeds: `python benchmarks/demo_seeds.py`; writes one JSON line per seed to results/demo.jsonl."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

from machine import RESULTS, description

SCRIPT = """
import json, sys
from remax_lightning.tools.demo import main
print("FIGURES", json.dumps(main(["--seed", sys.argv[1]])))
"""


def main() -> None:
    """Run the demo once per seed, each in a folder and a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    lines = []
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", SCRIPT, str(seed)]
            output = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=True)
        [found] = [line for line in output.stdout.splitlines() if line.startswith("FIGURES")]
        figures = {name: round(value, 4) for name, value in json.loads(found.removeprefix("FIGURES")).items()}
        lines.append(json.dumps({"benchmark": "demo", "seed": seed, **figures, **description()}))
        print(lines[-1], flush=True)
    (RESULTS / "demo.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
