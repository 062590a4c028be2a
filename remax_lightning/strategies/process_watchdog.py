"""Processes that Lightning starts for further devices: none of them outlives the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

_LAUNCHER = "REMAX_LAUNCHER"
_PAUSE = 0.5


def is_launched() -> bool:
    """Whether Lightning has started this process beside a command's own."""
    return _LAUNCHER in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def mark_launcher() -> None:
    """Let the processes that Lightning starts from here know this one."""
    os.environ[_LAUNCHER] = str(os.getpid())


def exit_with_launcher() -> None:
    """End this process as soon as the one that started it is gone.

    Lightning's watchdog runs in the process that may be killed; without it this one would wait for rank 0 until a
    timeout.
    """
    launcher = int(os.environ[_LAUNCHER])
    threading.Thread(target=_exit_when_launcher_ends, args=(launcher,), daemon=True, name="launcher-watch").start()


class ChildProcesses:
    """The processes that Lightning starts beside this one, if any.

    Args:
        trainer: whose they are; it starts them when it begins to run.
    """

    def __init__(self, trainer: Any) -> None:
        self._launcher = trainer.strategy.launcher

    def exit_codes(self, seconds: float | None = None) -> list[int | None]:
        """Wait for all of them to end, or so long, and return how they have ended; None where one has not."""
        codes: list[int | None] = []
        for process in getattr(self._launcher, "procs", ()):
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            codes.append(process.poll())
        return codes

    def describe_killed_process(self) -> str | None:
        """Say which of them has been killed, so that this one's own error is but the echo; None if none was.

        In a process that was started itself, the other way round: if its launcher is gone, this one ends here.
        """
        if is_launched():
            time.sleep(2 * _PAUSE)
        for rank, code in enumerate(self.exit_codes(seconds=0.5), start=1):
            if code is not None and code < 0:
                return f"rank {rank} of this machine was killed ({signal.Signals(-code).name}), and the run with it"
        return None


def _exit_when_launcher_ends(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_PAUSE)
    sys.stderr.write(f"remax: process {launcher}, which started rank {os.environ['LOCAL_RANK']}, is gone; ending\n")
    os._exit(1)  # whatever the process is doing or waiting for
