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
from typing import Any, cast

_LAUNCHER, _LAST = "REMAX_LAUNCHER", "REMAX_LAST_CHECKPOINT"
_PAUSE = 0.5
_GRACE = 15.0
"""Seconds from the end of a rank until the command ends: for rank 0 to find a broken connection and tell the error."""


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

    They are watched in Lightning's place, which kills this process, and what it was about to say, within seconds.

    Args:
        trainer: the trainer that starts them when it begins to run.
    """

    def __init__(self, trainer: Any) -> None:
        from lightning.pytorch.strategies.launchers import subprocess_script

        self._launcher = trainer.strategy.launcher
        cast(Any, subprocess_script)._launch_process_observer = _end_with_ranks

    def exit_codes(self, seconds: float | None = None) -> list[int | None]:
        """Wait at most `seconds` for each process, and return the exit codes; None for a process that still runs."""
        codes: list[int | None] = []
        for process in getattr(self._launcher, "procs", ()):
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            codes.append(process.poll())
        return codes

    def end_of_another(self) -> SystemExit | None:
        """Return the exit of a run that another process has ended, which explains an error in this one; None if not.

        A process that Lightning started waits first: if its launcher has ended, it ends here.
        """
        # Time for the watch on the launcher to end this process, in the place of an error that only follows from it.
        if is_launched():
            time.sleep(2 * _PAUSE)
        for rank, code in enumerate(self.exit_codes(seconds=0.5), start=1):
            if code:
                return _end_of_rank(rank, code)
        return None


def _end_of_rank(rank: int, code: int) -> SystemExit:
    """Return how the command ends with a rank: a killed one has said nothing, another one has told its error."""
    if code > 0:
        return SystemExit(code)
    name = signal.Signals(-code).name  # minus the number of the signal, as `subprocess` has it
    return SystemExit(f"remax: error: rank {rank} of this machine was killed ({name}), which ended the run")


def _end_with_ranks(processes: list[subprocess.Popen[Any]]) -> None:
    """Start to watch the processes of the ranks from 1 on."""
    threading.Thread(target=_watch_ranks, args=(processes,), daemon=True, name="rank-watch").start()


def _watch_ranks(processes: list[subprocess.Popen[Any]]) -> None:
    """End this process and the others when one of them has failed, even if this one waits in a collective."""
    # ---- Until all have ended well, or one has not ----
    while not any(codes := [process.poll() for process in processes]):
        if all(code == 0 for code in codes):
            return
        time.sleep(_PAUSE)
    # ---- This process has time to end by itself: with it this thread ends, too ----
    time.sleep(_GRACE)
    rank, code = next((rank, code) for rank, code in enumerate(codes, start=1) if code)
    end = _end_of_rank(rank, code)
    if isinstance(end.code, str):
        with suppress(OSError, ValueError):  # standard error may be closed
            sys.stderr.write(f"{end.code}\n")
            sys.stderr.flush()
    for process in processes:
        process.kill()
    os._exit(1 if isinstance(end.code, str) else code)


def _exit_when_launcher_ends(launcher: int) -> None:
    # A process without its parent gets another one.
    while os.getppid() == launcher:
        time.sleep(_PAUSE)
    sys.stderr.write(f"remax: process {launcher}, which started rank {os.environ['LOCAL_RANK']}, has ended; exiting\n")
    os._exit(1)  # even while the process waits in a collective
