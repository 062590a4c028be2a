"""The processes that tests on several ranks share: they stay while all goes well, and a failure fails the test."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from distributed.absent import ends, fails, forgets, stays_away, writes
from helpers import ranks
from helpers.forks import start_code
from helpers.ranks import launch
from helpers.waiting import LONG

pytestmark = pytest.mark.slow


def processes(folder: Path) -> list[str]:
    """The ids of the two processes that ran a function which writes them to `folder`."""
    return [(folder / rank).read_text().split()[0] for rank in "01"]


def test_a_function_finds_the_processes_of_the_one_before(tmp_path: Path) -> None:
    printed = launch(writes, tmp_path)
    first = processes(tmp_path)
    assert "a word of rank 0" in printed
    assert "a word of rank 1" in printed
    assert launch(writes, tmp_path).count("a word of rank 0") == 1
    assert processes(tmp_path) == first
    launch(writes, tmp_path, fresh="other processes are what is tested")
    assert not set(processes(tmp_path)) & set(first)
    launch(writes, tmp_path)
    assert processes(tmp_path) == first


def test_a_fork_has_imported_all_and_is_a_process_of_its_own(tmp_path: Path) -> None:
    """What it preloads may fail without a word, and every process would import for itself."""
    code = "import os, sys; print(all(name in sys.modules for name in sys.argv[1:]), os.getpid())"
    process = start_code(code, "deepspeed", "peft", "datasets", "remax_lightning.cli_run", log=tmp_path / "log")
    process.join(LONG)
    assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == f"True {process.pid}\n"


def test_what_a_function_leaves_behind_reaches_no_other(tmp_path: Path) -> None:
    launch(forgets, tmp_path)
    first = processes(tmp_path)
    launch(writes, tmp_path)
    assert not set(processes(tmp_path)) & set(first)
    assert (tmp_path / "0").read_text().endswith("float32")


def test_a_rank_that_fails_fails_the_test_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] failed or did not end"):
        launch(fails, timeout=600)
    assert time.monotonic() - start < 300
    launch(writes, tmp_path)  # in new processes


def test_a_rank_that_never_joins_fails_the_test() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0\] failed or did not end"):
        launch(stays_away, timeout=3)


def test_processes_that_end_at_their_start_fail_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "serve", ends)
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] failed or did not end"):
        launch(writes, tmp_path, fresh="those of the session are started")
