"""Comparing formulas with math-verify, in processes of their own that are killed when they take too long.

math-verify's own time limits are signals, which only the main thread gets, and SymPy may spend hours or gigabytes on a
few characters such as 9^{9^{9}}. This file is both sides: `compare` asks, and run as a program it answers. That program
imports nothing of this package, so that it starts quickly.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any, Literal, TypeAlias, cast

Verdict: TypeAlias = Literal["equal", "different", "unreadable", "timeout"]
"""`unreadable`: the right answer is no formula. `timeout`: killed for its time or its memory."""
MAX_WORKERS = 4
START_SECONDS = 120.0
"""To import SymPy, on a machine that is busy."""
MEMORY_BYTES = 4 * 2**30
_idle: dict[int, LifoQueue[_Worker]] = {}


def compare(pairs: Sequence[tuple[str, str | None]], time_limit: float) -> list[Verdict]:
    """Return whether formulas are equal to the right ones.

    Args:
        pairs: right answer and answer, LaTeX without dollar signs; None asks only whether the right one can be read.
        time_limit: seconds for one pair.

    Raises:
        RuntimeError: if the program cannot be started.
    """
    different = list(dict.fromkeys(pairs))
    workers = max(1, min(MAX_WORKERS, len(different), len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(workers) as pool:
        verdicts = dict(zip(different, pool.map(lambda pair: _ask(pair, time_limit), different), strict=True))
    return [verdicts[pair] for pair in pairs]


def _ask(pair: tuple[str, str | None], time_limit: float) -> Verdict:
    idle = _idle.setdefault(os.getpid(), LifoQueue())  # a forked process must not use its parent's pipes
    try:
        worker = idle.get_nowait()
    except Empty:
        worker = _Worker()
    verdict = worker.ask(pair, time_limit)
    if worker.process.poll() is None:
        idle.put(worker)
    return verdict


class _Worker:
    """One process that compares, and the pipes to it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C ends it by closing its pipe
        )
        if self._read_line(START_SECONDS) is None:
            self._kill()
            raise RuntimeError(f"math-verify does not start; try `{sys.executable} -c 'import math_verify'`")

    def ask(self, pair: tuple[str, str | None], time_limit: float) -> Verdict:
        """Return the verdict; kills the process where there is none in time."""
        assert self.process.stdin is not None
        answer = None
        try:
            with suppress(OSError):  # it has died, which shows when it is read
                self.process.stdin.write(json.dumps([*pair, time_limit]).encode() + b"\n")
                self.process.stdin.flush()
                answer = self._read_line(time_limit)
        finally:  # also where a signal ends the waiting: its answer would be taken for the next one's
            if answer is None:
                self._kill()
        return "timeout" if answer is None else cast(Verdict, answer)

    def _read_line(self, seconds: float) -> str | None:
        """Return the next line, or None if there is none in time or the process has ended."""
        assert self.process.stdout is not None
        file, deadline, line = self.process.stdout.fileno(), time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            if not select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            if not (part := os.read(file, 4096)):
                return None
            line += part
        return line.decode().strip()

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


# The program


def _serve() -> None:
    """Answer questions from stdin until it is closed."""
    import logging
    import resource
    import signal

    import math_verify

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    out = os.dup(1)
    os.dup2(2, 1)  # whatever is printed is no answer
    os.write(out, b"ready\n")
    for line in sys.stdin:
        gold, answer, time_limit = json.loads(line)
        # Ends the process in the kernel even if SymPy never returns to Python and the one who asks has died.
        signal.alarm(int(time_limit) + 5)
        os.write(out, _verdict(math_verify, gold, answer).encode() + b"\n")
        signal.alarm(0)


def _verdict(math_verify: Any, gold: str, answer: str | None) -> Verdict:
    def parsed(text: str) -> list[Any]:
        config = [math_verify.LatexExtractionConfig()]
        formulas: list[Any] = math_verify.parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
        return formulas

    if not (expected := parsed(gold)):
        return "unreadable"
    if answer is None:
        return "equal"
    # Six digits, math-verify's default, would pay 0.333333 for 1/3.
    is_equal = math_verify.verify(expected, parsed(answer), float_rounding=12, timeout_seconds=None)
    return "equal" if is_equal else "different"


if __name__ == "__main__":
    _serve()
