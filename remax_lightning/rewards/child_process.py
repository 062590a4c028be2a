"""Calls in child processes that are killed when they take too long, with all processes that they have started.

A signal reaches only the main thread and not the middle of a library, a thread cannot be ended at all: a process is
what can be stopped whatever it does. This file is both sides. `Child` calls, and run as a program it answers; that
program imports nothing of this package but what it is asked to, so that it starts quickly.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import traceback
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any, NamedTuple

START_SECONDS = 300.0
"""For the child to import what it calls, on a machine that is busy; a user's module may load a model."""
MAX_CHILDREN = 4
_PROCESS_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


class Target(NamedTuple):
    """What a child calls: `function(argument)` of a module returns a callable that gets every request.

    Args:
        module: dotted name, or path of a file that is imported by itself, without the package around it.
        function: name in the module.
        argument: anything that pickles.
    """

    module: str
    function: str
    argument: Any = None


class CallTimeoutError(RuntimeError):
    """A call took too long, and its process was killed."""


class CallEndedError(RuntimeError):
    """The process of a call ended during the call: an exit, a crash, or a kill for its memory."""


class CallFailedError(RuntimeError):
    """A call raised something that cannot be raised here as well; the text has its type."""


# ---- The side that calls ----


class Child:
    """A process that answers requests, one after the other. It starts at once and imports while nobody waits.

    Args:
        target: what it calls.
        is_quiet: whether what it prints is dropped.
    """

    def __init__(self, target: Target, *, is_quiet: bool = False) -> None:
        self._socket, theirs = socket.socketpair()
        # ---- A socket for messages, and a pipe that only shows whether this process lives ----
        watched, lifeline = os.pipe()  # closed by the kernel when this process ends, however it ends
        output = subprocess.DEVNULL if is_quiet else None
        try:
            self.process = subprocess.Popen(
                # -P keeps the folder of this file off the path: its modules would hide others of the same names.
                [sys.executable, "-P", __file__, str(theirs.fileno()), str(watched)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(), watched),
                start_new_session=True,  # a process group of its own: a kill reaches all of it, and Ctrl-C does not
            )
        finally:
            theirs.close()
            os.close(watched)
        # ---- This side's ends, closed with the child when nobody refers to this object any more ----
        self._connection = Connection(os.dup(self._socket.fileno()))
        self.close = weakref.finalize(self, _end, self.process, self._connection, self._socket, lifeline)
        self._is_ready = False
        self._set_timeout(START_SECONDS)
        with suppress(OSError):  # it has died, which shows when it is asked
            # By themselves: what the target names is to be found on this path, in this checkout of the package.
            self._connection.send_bytes(pickle.dumps(sys.path))
            self._connection.send_bytes(pickle.dumps(tuple(target)))

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return bool(self.close.alive) and self.process.poll() is None

    def call(self, request: Any, seconds: float) -> Any:
        """Return the answer to a request. The time that the child needs to import is not counted.

        Raises:
            CallTimeoutError: if there is none in time; the process is killed.
            CallEndedError: if the process has ended.
            Exception: what the call raises, with the user's file and line as `remote_place`.
        """
        is_done = False
        try:
            self.start()
            self._set_timeout(seconds)
            with suppress(BrokenPipeError, ConnectionResetError):  # it has died, which shows when it is read
                self._connection.send_bytes(pickle.dumps(request))
            answer = self._receive(seconds, "")
            is_done = True
        except _RaisedError as raised:
            is_done = True
            raise raised.error from None
        finally:  # also where a signal ends the waiting: its answer would be taken for the next one's
            if not is_done:
                self.close()
        return answer

    def start(self) -> None:
        """Wait until the child has imported what it calls.

        Raises:
            CallTimeoutError: if it takes minutes.
            Exception: what the import raises.
        """
        if not self._is_ready:
            self._receive(START_SECONDS, "to import")
            self._is_ready = True

    def _receive(self, seconds: float, what: str) -> Any:
        try:
            if not self._connection.poll(seconds):
                raise CallTimeoutError(f"took more than {seconds:g} s {what}".rstrip())
            # ("result", value), or ("error", pickled exception or None, its text, its file and line)
            kind, *content = pickle.loads(self._connection.recv_bytes())  # of our own child, running the user's code
        except BlockingIOError:
            raise CallTimeoutError(f"took more than {seconds:g} s {what}".rstrip()) from None
        except (EOFError, ConnectionResetError):
            raise CallEndedError(_how_it_ended(self.process)) from None
        if kind == "error":
            raise _RaisedError(_rebuilt(*content))
        return content[0]

    def _set_timeout(self, seconds: float) -> None:
        """Let a message of which the other side reads or writes only a part end in an error, too."""
        interval = struct.pack("@ll", int(seconds) + 1, 0)  # `struct timeval`: seconds, microseconds
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, interval)


class _RaisedError(Exception):
    """What the call has raised in the child, apart from what this side raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def _end(process: subprocess.Popen[bytes], connection: Connection, channel: socket.socket, lifeline: int) -> None:
    """Kill a child and whatever it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    connection.close()
    channel.close()
    with suppress(OSError):
        os.close(lifeline)


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    if code >= 0:
        return f"ended with exit code {code}"
    reason = "; the system may have been out of memory" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{reason}"


def _rebuilt(pickled: bytes | None, text: str, place: str | None) -> BaseException:
    error: BaseException = CallFailedError(text)
    if pickled is not None:
        with suppress(Exception):
            error = pickle.loads(pickled)
    error.remote_place = place  # type: ignore[attr-defined]
    return error


_idle: dict[tuple[int, Target], LifoQueue[Child]] = {}


def call_each(target: Target, requests: Sequence[Any], seconds: float) -> list[Any]:
    """Return the answers of shared children to several requests, `seconds` for each; they run at the same time.

    In place of an answer, a request whose child is killed or ends has `CallTimeoutError` or `CallEndedError`.

    Args:
        target: what to call; its argument is hashable. What it prints is dropped.
        requests: anything that pickles.
        seconds: for one request.
    """
    # ---- Children that wait for a request; a busy one is in no queue ----
    idle = _idle.setdefault((os.getpid(), target), LifoQueue())  # a forked process must not use its parent's pipes

    def ask(request: Any) -> Any:
        try:
            child = idle.get_nowait()
        except Empty:
            child = Child(target, is_quiet=True)
        try:
            return child.call(request, seconds)
        except (CallTimeoutError, CallEndedError) as error:
            return error
        finally:
            if child.is_alive:
                idle.put(child)

    # ---- As many at once as there are cores, four at most ----
    workers = max(1, min(MAX_CHILDREN, len(requests), len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(ask, requests))


def failing_line(error: BaseException) -> str | None:
    """Return `file:line` of the innermost code of a user's that an exception comes from; None if it is no user's."""
    if hasattr(error, "remote_place"):
        return error.remote_place  # type: ignore[no-any-return]
    # ---- Not the user's: this package, the standard library, installed packages ----
    folders = [Path(__file__).resolve().parents[1]]
    folders += [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = frame.f_code.co_filename
        if not name.startswith("<") and not any(Path(name).resolve().is_relative_to(folder) for folder in folders):
            return f"{name}:{number}"
    return None


# ---- The program ----


def _serve(channel: int, watched: int) -> None:
    """Answer requests until the connection is closed."""
    # ---- End with the parent, and before it if memory runs out ----
    connection = Connection(channel)
    _end_with_parent(watched)
    _be_killed_first()
    # A scheduler signals all processes of a job; the trainer decides what follows, and ends this process. A handler in
    # place of SIG_IGN, which the user's own subprocesses would inherit.
    for name in _PROCESS_SIGNALS:
        signal.signal(getattr(signal, name), lambda *_: None)
    # ---- Import ----
    sys.path[:] = pickle.loads(connection.recv_bytes())
    try:
        module, name, argument = pickle.loads(connection.recv_bytes())
        function = getattr(_imported(module), name)(argument)
    except BaseException as error:
        _reply_error(connection, error)
        return
    _reply(connection, None)
    # ---- Answer ----
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        try:
            _reply(connection, function(pickle.loads(request)))
        except BaseException as error:
            _reply_error(connection, error)


def _imported(name: str) -> Any:
    if not Path(name).is_absolute():
        return importlib.import_module(name)
    # By its path, so that the package around the file, which imports torch, is not imported.
    spec = importlib.util.spec_from_file_location("remax_target", name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reply(connection: Connection, value: Any) -> None:
    connection.send_bytes(pickle.dumps(("result", value)))


def _reply_error(connection: Connection, error: BaseException) -> None:
    """Send an exception, itself where the other side can build it again."""
    pickled = None
    if isinstance(error, Exception | SystemExit):
        with suppress(Exception):
            # Read back at once: an exception with arguments of its own may pickle and not be built again.
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
    text = f"{type(error).__name__}: {error}"
    with suppress(OSError):
        connection.send_bytes(pickle.dumps(("error", pickled, text, failing_line(error))))


def _end_with_parent(watched: int) -> None:
    """End this process group when the parent has ended.

    On Linux the kernel sends SIGIO, which ends a process, when the other end of the pipe is closed: that also ends a
    library that never returns to Python. Elsewhere a thread waits for it.
    """
    if sys.platform == "linux":
        import fcntl

        # The signal goes to the process group (the minus), so also to what the user's code has started.
        fcntl.fcntl(watched, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(watched, fcntl.F_SETFL, fcntl.fcntl(watched, fcntl.F_GETFL) | os.O_ASYNC)
        return

    def wait() -> None:
        os.read(watched, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _be_killed_first() -> None:
    """Let the kernel end this process, not the trainer, where memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
