"""Ends the processes that Lightning starts for further devices together with the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_LAUNCHER, _LAST = "REMAX_LAUNCHER", "REMAX_LAST_CHECKPOINT"
_PAUSE = 0.5


def is_launched() -> bool:
    """Whether Lightning started this process, as opposed to the user."""
    return _LAUNCHER in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def mark_launcher() -> None:
    """Pass the id of this process on to processes that Lightning will start."""
    os.environ[_LAUNCHER] = str(os.getpid())


def tell_last_checkpoint(path: Path | None) -> None:
    """Pass the path of `ckpt_path: last` on to processes that Lightning will start, so that all load the same one."""
    os.environ[_LAST] = str(path or "")


def last_checkpoint() -> str | None:
    """Return the checkpoint that the launching process passed on; None if it found none."""
    return os.environ.get(_LAST) or None


def exit_with_launcher() -> None:
    """End this process as soon as the process that started it has ended.

    Lightning's watchdog runs in the launching process, which may be killed itself. This process would then wait for
    rank 0 until a timeout.
    """
    # A daemon thread, so that it does not keep a finished process alive.
    launcher = int(os.environ[_LAUNCHER])
    threading.Thread(target=_exit_when_launcher_ends, args=(launcher,), daemon=True, name="launcher-watch").start()


class ChildProcesses:
    """The processes that Lightning starts beside this one, if any.

    Args:
        trainer: the trainer that starts them when it begins to run.
    """

    def __init__(self, trainer: Any) -> None:
        self._launcher = trainer.strategy.launcher

    def exit_codes(self, seconds: float | None = None) -> list[int | None]:
        """Wait at most `seconds` for each process, and return the exit codes; None for a process that still runs."""
        codes: list[int | None] = []
        for process in getattr(self._launcher, "procs", ()):
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            codes.append(process.poll())
        return codes

    def describe_killed_process(self) -> str | None:
        """Return a message about a killed process, which explains an error in this one; None if none was killed.

        A process that Lightning started waits first: if its launcher has ended, it ends here.
        """
        # Time for the watch on the launcher to end this process, in the place of an error that only follows from it.
        if is_launched():
            time.sleep(2 * _PAUSE)
        for rank, code in enumerate(self.exit_codes(seconds=0.5), start=1):
            if code is not None and code < 0:  # minus the number of the signal, as `subprocess` has it
                return f"rank {rank} of this machine was killed ({signal.Signals(-code).name}), which ended the run"
        return None


def _exit_when_launcher_ends(launcher: int) -> None:
    # A process without its parent gets another one.
    while os.getppid() == launcher:
        time.sleep(_PAUSE)
    sys.stderr.write(f"remax: process {launcher}, which started rank {os.environ['LOCAL_RANK']}, has ended; exiting\n")
    os._exit(1)  # even while the process waits in a collective
