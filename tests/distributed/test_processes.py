"""A test on two processes fails where there are not two: it never goes on with one."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from distributed.processes import launch


@pytest.mark.slow
def test_a_rank_that_fails_at_its_start_fails_the_test_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] failed or did not end"):
        launch("distributed.absent", "3", timeout=60)
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_a_rank_that_never_joins_fails_the_test() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0\] failed or did not end"):
        launch("distributed.absent", "0", timeout=5)


def test_a_process_that_cannot_be_started_fails_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FileNotFoundError):
        launch("distributed.absent", "0")
