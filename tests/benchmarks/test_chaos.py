"""The chaos suite notices what it looks for, a few trials of each kind pass, and the README shows its totals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import totals, warm

ROOT = Path(__file__).parents[2]

FAULTS = """
import sys, time, threading
from pathlib import Path

from benchmarks.chaos import totals, warm

sys.path.insert(0, str(warm.ROOT / "tests"))
import remax_lightning.cli as cli

def is_right(): pass
def is_clear(): print("remax: error: model.kl_coef: expected a number", file=sys.stderr); sys.exit(2)
def shows_a_traceback(): raise RuntimeError("boom")
def is_a_bug(): print("remax: error: this looks like a bug of remax-lightning", file=sys.stderr); sys.exit(1)
def says_nothing(): sys.exit(2)
def says_it_twice(): print("remax: error: a\\nremax: error: b", file=sys.stderr); sys.exit(2)
def shows_usage(): print("usage: remax\\nremax: error: a", file=sys.stderr); sys.exit(2)
def crashes(): import os; os.kill(os.getpid(), 11)
def hangs(): time.sleep(60)
def hangs_at_its_end(): threading.Thread(target=time.sleep, args=(60,)).start()
def leaves_a_process(): import subprocess; subprocess.Popen(["sleep", "60"])

for fault in (is_right, is_clear, shows_a_traceback, is_a_bug, says_nothing, says_it_twice, shows_usage, crashes, hangs,
              hangs_at_its_end, leaves_a_process):
    cli.main = fault
    warm.LEFT_OVER = 1
    ended = warm.command(Path(sys.argv[1]) / fault.__name__, "fit", deadline=3)
    print(fault.__name__, "=", warm.judge(ended).outcome)
"""


def run(*arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run Python in the root of the project, in a process without the threads of pytest."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.slow(7)
def test_the_suite_sees_each_kind_of_fault(tmp_path: Path) -> None:
    done = run("-c", FAULTS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    outcomes = dict(line.split(" = ") for line in done.stdout.splitlines() if " = " in line)
    assert outcomes == {
        "is_right": "right",
        "is_clear": "clear",
        "shows_a_traceback": "traceback",
        "is_a_bug": "traceback",
        "says_nothing": "unclear",
        "says_it_twice": "unclear",
        "shows_usage": "unclear",
        "crashes": "crash",
        "hangs": "hang",
        "hangs_at_its_end": "hang",
        "leaves_a_process": "hang",
    }


def chaos(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Run a part of the suite and return its totals by kind."""
    results = folder / "results.jsonl"
    files = ("--folder", str(folder / "trials"), "--log", str(folder / "log.jsonl"), "--results", str(results))
    done = run("-m", "benchmarks.chaos", *arguments, *files)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return {line["kind"]: line for line in map(json.loads, results.read_text().splitlines())}


@pytest.mark.slow(150)
def test_a_few_trials_of_every_kind_pass_and_are_not_run_twice(tmp_path: Path) -> None:
    from benchmarks.chaos.__main__ import KINDS, QUICK

    lines = chaos(tmp_path, "--quick", "--seed", "1")
    assert set(lines) == set(KINDS)
    assert {kind: lines[kind]["trials"] for kind in QUICK if kind != "endurance"} == {
        kind: count for kind, count in QUICK.items() if kind != "endurance"
    }
    if os.environ.get("CI") and os.geteuid() == 0:  # elsewhere nothing may be mounted
        assert not any("skipped" in line["outcomes"] for line in lines.values())
    # ---- One trial more than there are in the log ----
    log = tmp_path / "log.jsonl"
    entries = [json.loads(text) for text in log.read_text().splitlines()]
    assert all(entry["outcome"] in (warm.RIGHT, warm.CLEAR, warm.SKIPPED) for entry in entries)
    more = chaos(tmp_path, "yaml", "--seed", "1", "--count", str(QUICK["yaml"] + 1))
    assert more["yaml"]["trials"] == QUICK["yaml"] + 1
    assert len(log.read_text().splitlines()) == len(entries) + 1


def test_the_readme_shows_the_totals_and_there_is_no_problem() -> None:
    text = totals.README.read_text()
    shown = text.partition(totals.BEGIN)[2].partition(totals.END)[0].strip()
    assert shown == totals.table()
    lines = [json.loads(line) for line in totals.RESULTS.read_text().splitlines()]
    assert {line["kind"] for line in lines} == {*totals.WORDS, "endurance"}
    for line in lines:
        assert sum(line["outcomes"].values()) == line["trials"] > 0
        assert not set(line["outcomes"]) & set(warm.PROBLEMS), line["problems"]
