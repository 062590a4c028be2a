"""Time and memory of a chat template's run: a template is a program of whoever published the tokenizer.

Jinja's sandbox keeps a template from files and code, not from loops without an end or texts without a bound. Its
documentation leaves that to the operating system, so that is what limits a run here: an alarm signal, which also ends
loops inside of C code such as powers of large numbers, and the limit on the address space, under which an allocation
fails at once. Both hold for one call only, since the process has other work.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

_signal: Any = None
resource: Any = None
with suppress(ImportError):  # POSIX has both
    # `signal` looks every name up in an enumeration, which takes 1 us; `_signal` has the calls beneath.
    _signal, resource = import_module("_signal"), import_module("resource")

MAX_SECONDS = 10.0
"""Time for one conversation; the templates of published models take below a millisecond."""
MAX_MEMORY = 4 * 2**30
"""Bytes that one run may add to the address space of the process, where the last batch is tokenized meanwhile."""
MAX_CHARACTERS = 50_000_000
"""Length of a text that a template writes."""


class TemplateLimitError(Exception):
    """A chat template was stopped: it ran too long, or took too much memory."""


class _Alarm(BaseException):
    """Raised by the alarm inside of the template; no `except Exception` on the way stops it."""


class _Limits:
    """The limits of this process: whether its main thread has set them, and whether a template runs right now."""

    def __init__(self) -> None:
        self.are_set = self.is_running = False

    @contextmanager
    def set(self) -> Iterator[None]:
        """Set alarm handler and memory limit inside, and restore those of the caller after it; only in the main thread.

        Between two templates the alarm does nothing.
        """
        if self.are_set:
            yield
            return
        started = time.monotonic()
        handler = _signal.signal(_signal.SIGALRM, self._ring)
        delay, interval = _signal.setitimer(_signal.ITIMER_REAL, 0.0)  # the user's own alarm, which goes on afterwards
        memory = _set_memory_limit()
        self.are_set = True
        try:
            yield
        finally:
            self.are_set = False
            if memory is not None:
                resource.setrlimit(resource.RLIMIT_AS, memory)
            _signal.setitimer(_signal.ITIMER_REAL, 0.0)
            _signal.signal(_signal.SIGALRM, _signal.SIG_DFL if handler is None else handler)
            if delay:
                _signal.setitimer(_signal.ITIMER_REAL, max(delay - (time.monotonic() - started), 1e-3), interval)

    def run(self, call: Callable[[], str]) -> str:
        """Run a call until the alarm rings, under limits that are set."""
        try:
            self.is_running = True
            # It rings again, in case that a destructor swallows the first one.
            _signal.setitimer(_signal.ITIMER_REAL, MAX_SECONDS, 1.0)
            return call()
        finally:
            self.is_running = False

    def _ring(self, signal_number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.is_running:
            raise _Alarm


_limits = _Limits()


@contextmanager
def template_limits() -> Iterator[None]:
    """Set the limits for many templates at once, which takes 20 us; each of them then costs 1 us.

    Time is limited for each template, memory for all of them together.
    """
    if _can_be_set():
        with _limits.set():
            yield
    else:
        yield


def run_template(call: Callable[[], str]) -> str:
    """Return the text that a call writes with a template.

    In a thread beside the main one, where no signal arrives, a timer interrupts the call: this costs 100 us, waits
    until a C function returns, and leaves memory alone. Rows are rendered in the main thread.

    Raises:
        TemplateLimitError: if it takes longer than `MAX_SECONDS` or more than `MAX_MEMORY`, or writes more than
            `MAX_CHARACTERS`.
    """
    try:
        if _can_be_set():
            if _limits.are_set:
                text = _limits.run(call)
            else:
                with _limits.set():
                    text = _limits.run(call)
        else:
            text = _until_interrupted(call)
    except _Alarm:
        raise TemplateLimitError(f"it runs for more than {MAX_SECONDS:g} seconds, perhaps without an end") from None
    except MemoryError:
        raise TemplateLimitError(f"it takes more memory than {MAX_MEMORY / 2**30:g} GiB") from None
    if len(text) > MAX_CHARACTERS:
        raise TemplateLimitError(f"it writes {len(text):,} characters, more than {MAX_CHARACTERS:,}")
    return text


def _can_be_set() -> bool:
    return _signal is not None and threading.get_ident() == threading.main_thread().ident


def _until_interrupted(call: Callable[[], str]) -> str:
    # The lock keeps the exception from arriving after the call: it would interrupt whatever the thread does then.
    thread, lock, done = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Alarm))

    timer = threading.Timer(MAX_SECONDS, interrupt)
    timer.daemon = True
    timer.start()
    try:
        return call()
    finally:
        with lock:
            done = True
        timer.cancel()


def _set_memory_limit() -> tuple[int, int] | None:
    """Limit the address space to what it is now and `MAX_MEMORY`; return the limits before, None if nothing is set."""
    try:
        # "size resident shared ...", in pages; the first is the address space
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    except (OSError, ValueError):  # no Linux
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MAX_MEMORY
    if any(value != resource.RLIM_INFINITY and value <= limit for value in (soft, hard)):  # the user's own is lower
        return None
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    return soft, hard
