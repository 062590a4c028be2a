"""Ends a run that makes no progress, after the stacks of all its processes are written to the folder of the run.

A thread of the trainer could not do that: a library that computes for years, such as a regular expression, may never
let another thread run. So a small process beside each rank waits for news of progress. When none comes, it asks the
rank for its stacks by a signal that faulthandler answers wherever the rank is, and kills it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

_SIGNAL = signal.SIGRTMAX - 3 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR2
"""Used by nothing else; USR1 and USR2 are a scheduler's and Lightning's."""
_RANKS_SECONDS = 3.0
"""For the other ranks to write their stacks before this one ends, and the launcher with it."""
_current: StallWatchdog | None = None


# ---- In the rank ----


def report_progress(what: str) -> None:
    """Tell the watchdog of this process, if there is one, that something was reached.

    Args:
        what: what comes next, for the message about a run that gets no further.
    """
    if _current is not None:
        _current.report(what)


class StallWatchdog:
    """Watches one rank until `stop`. If a process has several, the one that started last receives its progress.

    Args:
        seconds: without progress, after which the run ends.
        folder: where `stall-rank0.txt` and so on are written.
        rank: of this process.
        num_ranks: how many there are; the others get time to write their stacks.
    """

    def __init__(self, seconds: float, folder: Path, rank: int = 0, num_ranks: int = 1) -> None:
        import faulthandler
        import tempfile

        global _current
        _stack_file(folder, rank).unlink(missing_ok=True)  # of an earlier run in this folder
        self._stacks: BinaryIO = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        # An open file without a name: the watching process reads it by its descriptor, whatever the rank does.
        faulthandler.register(_SIGNAL, self._stacks, all_threads=True)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(seconds), str(folder), str(rank),
             str(num_ranks), str(self._stacks.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=(self._stacks.fileno(),),
            start_new_session=True,  # Ctrl-C is for the rank
        )  # fmt: skip
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)
        _current = self

    def report(self, what: str) -> None:
        """Count the time from now on."""
        # A full pipe is news enough; a broken one means that somebody has killed the process that watches.
        with suppress(BlockingIOError, BrokenPipeError, ValueError):
            os.write(self._pipe.fileno(), " ".join(what.split())[:500].encode(errors="replace") + b"\n")

    def stop(self) -> None:
        """Watch no longer."""
        import faulthandler

        global _current
        if _current is self:
            _current = None
            faulthandler.unregister(_SIGNAL)
        with suppress(OSError):
            self._pipe.close()
        self._process.kill()
        self._process.wait()
        self._stacks.close()


def _stack_file(folder: Path, rank: int | str) -> Path:
    return folder / f"stall-rank{rank}.txt"


# ---- The process that watches ----


def _watch(pid: int, seconds: float, folder: Path, rank: int, num_ranks: int, stacks: int) -> None:
    """Wait for news until the rank ends; end it when there is none, or another rank has none."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a scheduler signals all processes; this one ends with the rank
    # ---- Wait: for news, for the end of the rank, or for another rank that stalls ----
    tick = max(0.02, min(1.0, seconds / 20))
    what, silent, began = "starting", 0.0, time.time()
    while silent < seconds and not _other_stalled(folder, rank, began):
        start = time.monotonic()
        news = _news(tick)
        if news == "" or os.getppid() != pid:
            return  # the run has ended
        if news is not None:
            what, silent = news, 0.0
        elif not _is_stopped(pid):
            silent += min(time.monotonic() - start, 2 * tick)  # a machine that slept counts as one tick
    # ---- Write the stacks of this rank ----
    is_first = silent >= seconds and not _other_stalled(folder, rank, began)
    title = f"rank {rank}: {silent:.0f} s after it began {what}"
    here = _write_stacks(pid, _stack_file(folder, rank), stacks, title)
    # ---- The others see the file, and write theirs before the launcher takes them along ----
    if num_ranks > 1:
        time.sleep(_RANKS_SECONDS if is_first else 2 * _RANKS_SECONDS)
    # ---- One rank tells, for all of them; two may have reached their limit in the same moment ----
    if is_first and _first_rank(folder, began) in (rank, None):
        others = [
            _first_line(path) for path in sorted(folder.glob("stall-rank*.txt")) if path != _stack_file(folder, rank)
        ]
        ranks = "; ".join([here, *(line for line in others if line)])
        with suppress(OSError, ValueError):
            sys.stderr.write(
                f"remax: error: no progress for {seconds:g} s (model.stall_timeout), the run ends. {ranks}. Stacks are"
                f" in {_stack_file(folder, '*')}; a reward that may never return needs a timeout of its own, and a slow"
                " step a longer model.stall_timeout\n"
            )
            sys.stderr.flush()
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # a rank in a library may never handle a milder one


def _first_line(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace").partition("\n")[0]
    return ""


def _news(seconds: float) -> str | None:
    """Return the last line on stdin; None if none comes in time, an empty text at its end."""
    import select

    if not select.select([0], [], [], seconds)[0]:
        return None
    lines = os.read(0, 2**16).decode(errors="replace").split("\n")
    return lines[-2] or "running" if len(lines) > 1 else ""


def _other_stalled(folder: Path, rank: int, since: float) -> bool:
    """Whether another rank of this run has written its stacks."""
    with suppress(OSError):
        for path in folder.glob("stall-rank*.txt"):
            if path != _stack_file(folder, rank) and path.stat().st_mtime > since:
                return True
    return False


def _first_rank(folder: Path, since: float) -> int | None:
    """Return the rank of this run that has written its stacks first; None if none has, as on a full disk."""
    written: list[tuple[int, int]] = []  # time and rank
    with suppress(OSError):
        times = [(path.stat().st_mtime_ns, path.stem) for path in folder.glob("stall-rank*.txt")]
        written = [(at, int(stem.removeprefix("stall-rank"))) for at, stem in times if at > since * 1e9]
    return min(written)[1] if written else None


def _is_stopped(pid: int) -> bool:
    """Whether a process is suspended, by Ctrl-Z, a scheduler or a debugger."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _write_stacks(pid: int, path: Path, stacks: int, title: str) -> str:
    """Write the stacks of a rank to a file; return its first line, with the place in the user's code if it is there."""
    with suppress(ProcessLookupError):
        os.kill(pid, _SIGNAL)  # answered by faulthandler in C, wherever the rank is
    size = -1
    for _ in range(50):  # until faulthandler has written all of it
        time.sleep(0.1)
        if size == (size := os.fstat(stacks).st_size) and size > 0:
            break
    # `pread`, since both processes share the position in the file.
    text = os.pread(stacks, size, 0).decode(errors="replace")
    place = _innermost(re.findall(r'File "(.+)", line (\d+) in (.+)', text.rpartition("Current thread")[2]))
    title = title if place is None else f"{title}, at {place}"
    with suppress(OSError):
        path.write_text(f"{title}\n\n{text}")
    return title


def _innermost(frames: Sequence[tuple[str, str, str]]) -> str | None:
    """Return the innermost frame that is no library's, or the innermost."""
    library = re.compile(r"site-packages|dist-packages|/lib/python3|^<|/remax_lightning/")
    # faulthandler writes the innermost frame first.
    chosen: Any = next((frame for frame in frames if not library.search(frame[0])), next(iter(frames), None))
    return None if chosen is None else f"{chosen[0]}:{chosen[1]} in {chosen[2]}"


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:7]))
