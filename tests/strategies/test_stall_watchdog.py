"""A process that makes no progress is ended, and its stacks are there to read, wherever it is stuck."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.waiting import LONG, wait_until

from remax_lightning.strategies import stall_watchdog

pytestmark = pytest.mark.slow  # it starts processes

# The file alone, as the process that watches runs it: the package would take seconds to import.
SCRIPT = """
import importlib.util, re, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("watchdog", sys.argv[1])
watchdog = importlib.util.module_from_spec(spec)
spec.loader.exec_module(watchdog)

def works():
    for step in range(8):
        watchdog.report_progress(f"step {step}")
        time.sleep(0.1)

def waits():
    time.sleep(600)

def searches():
    re.search("(a+)+$", "a" * 60 + "b")

seconds = float(sys.argv[3])
ranks = [watchdog.StallWatchdog(seconds, Path(sys.argv[2]), int(sys.argv[4]), int(sys.argv[6]))]
works()
if sys.argv[5] == "stops":
    ranks[0].stop()
    time.sleep(1.5)
else:
    watchdog.report_progress("scoring with\\n'one'")
    globals()[sys.argv[5]]()
"""


def start(folder: Path, what: str, seconds: float = 1.0, rank: int = 0, num_ranks: int = 1) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(SCRIPT)
    arguments = [stall_watchdog.__file__, str(folder), str(seconds), str(rank), what, str(num_ranks)]
    command = [sys.executable, str(folder / "script.py"), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("what", ["waits", "searches"])
def test_a_stall_ends_with_one_line_and_the_stack(what: str, tmp_path: Path) -> None:
    """In a system call, and in a library that lets no other thread run."""
    process = start(tmp_path, what)
    _, said = process.communicate(timeout=LONG)
    assert process.returncode != 0
    assert said.count("\n") == 1
    assert said.startswith("remax: error: no progress for 1 s (model.stall_timeout), the run ends. rank 0: ")
    assert f" s after it began scoring with 'one', at {tmp_path / 'script.py'}:" in said
    stack = (tmp_path / "stall-rank0.txt").read_text()
    assert f"in {what}" in stack
    assert "in <module>" in stack


def test_a_run_with_progress_or_without_a_watchdog_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, "stops", 1.0)
    _, said = process.communicate(timeout=LONG)
    assert (process.returncode, said) == (0, "")
    assert not list(tmp_path.glob("stall-*"))


def test_a_stall_of_one_rank_ends_the_others_with_their_stacks(tmp_path: Path) -> None:
    processes = [start(tmp_path, "searches", 1.0, 0, 2), start(tmp_path, "waits", 600.0, 1, 2)]
    said = [process.communicate(timeout=LONG)[1] for process in processes]
    assert all(process.returncode != 0 for process in processes)
    assert re.search(r"rank 0: \d+ s after it began scoring", said[0])
    assert "; rank 1: " in said[0]
    assert said[1] == ""
    assert "in waits" in (tmp_path / "stall-rank1.txt").read_text()


def test_what_watches_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "waits", 600.0)
    assert wait_until(lambda: watchers(process.pid))
    [watching] = watchers(process.pid)
    process.kill()
    process.communicate()
    assert wait_until(lambda: not Path(f"/proc/{watching}").exists())


def watchers(process: int) -> list[int]:
    """The children of a process that already run the file of the watchdog."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(process) and stall_watchdog.__file__.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found
