"""The totals of the suite: a line for each kind in `results/chaos.jsonl`, and the README's table made of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos.warm import CLEAR, CODE, CRASH, HANG, OUTCOMES, RIGHT, ROOT, TRACEBACK, UNCLEAR, WRONG

RESULTS = ROOT / "benchmarks" / "results" / "chaos.jsonl"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by python -m benchmarks.chaos --table -->", "<!-- end of what is made -->"
WORDS = {
    "kill": "SIGKILL or SIGTERM at a phase of a run of one or two processes, then resumed",
    "disk": "disks of 64 kB to 20 MB, then mended and resumed",
    "readonly": "disks that become read-only in the middle of a run, then mended and resumed",
    "server": "reward servers that are slow, broken or hostile",
    "flip": "flipped bits in checkpoints",
    "truncate": "truncated files of checkpoints",
    "yaml": "mutated configurations",
    "jsonl": "mutated data files",
    "payload": "files with code: checkpoints, models, data, YAML",
}
"""What the table calls each kind."""
COLUMNS = ("right", "clear", "tracebacks", "hangs", "silently wrong", "code executed")


def write_totals(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write a line for each kind and seed, in the place of an older one."""
    description = _machine().description() | {"commit": _commit()}
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["kind"], entry["seed"]), []).append(entry)
    new = []
    for (kind, seed), group in groups.items():
        outcomes = [entry["outcome"] for entry in group]
        problems = [entry for entry in group if entry["outcome"] not in (RIGHT, CLEAR, "skipped")]
        line = {
            "benchmark": "chaos",
            "kind": kind,
            "seed": seed,
            "trials": len(group),
            "outcomes": {name: outcomes.count(name) for name in OUTCOMES if name in outcomes},
            "seconds": round(sum(entry["seconds"] for entry in group)),
            "problems": [f"{entry['key']} {entry['outcome']}: {entry['case']}" for entry in problems][:20],
        }
        if kind == "endurance":
            line["detail"] = group[0]["detail"]
        new.append(line | description)
    old = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    others = [line for line in old if (line["kind"], line["seed"]) not in groups]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in [*others, *new]))


def _commit() -> str:
    """Return the commit of the working copy; empty outside of one."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _machine() -> Any:
    """Return `benchmarks/machine.py`, which other benchmarks import from their own folder."""
    spec = importlib.util.spec_from_file_location("machine", ROOT / "benchmarks" / "machine.py")
    if spec is None or spec.loader is None:
        raise ImportError("benchmarks/machine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(path: Path = RESULTS) -> str:
    """Return the table of the README, from the totals."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    rows = [f"| what is done to a run | trials | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 2)}"]
    for kind, words in WORDS.items():
        group = [line for line in lines if line["kind"] == kind]
        if not group:
            continue
        counts = {name: sum(line["outcomes"].get(name, 0) for line in group) for name in OUTCOMES}
        bad = counts[TRACEBACK] + counts[UNCLEAR] + counts[CRASH]
        values = (counts[RIGHT], counts[CLEAR], bad, counts[HANG], counts[WRONG], counts[CODE])
        rows.append(f"| {words} | {sum(line['trials'] for line in group)} | {' | '.join(map(str, values))} |")
    rows += [f"\nA long run: {line['detail']}." for line in lines if line["kind"] == "endurance"]
    return "\n".join(rows)


def write_table(path: Path = RESULTS, readme: Path = README) -> None:
    """Write the table into the README."""
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n\n{table(path)}\n\n{END}{after}")
