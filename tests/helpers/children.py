"""The child processes of rewards as forks of one that has imported all that they need, which takes each seconds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from helpers.forks import warm_context

from remax_lightning.rewards import child_process


@contextmanager
def forked_children() -> Iterator[None]:
    """Inside, a child of a reward is a fork of a process with the imports of all of them."""
    replaced = SimpleNamespace(**{**vars(subprocess), "Popen": ForkedPopen})
    with patch.object(child_process, "subprocess", replaced):
        yield


class ForkedPopen:
    """What `Child` uses of `subprocess.Popen`. Only the imports are left out: the process is the child's own."""

    def __init__(self, command: Sequence[str], *, pass_fds: tuple[int, int], stdout: int | None, **_: Any) -> None:
        ends = [Connection(os.dup(descriptor)) for descriptor in pass_fds]
        arguments = (command[2], dict(os.environ), *ends, stdout == subprocess.DEVNULL)
        self._process = warm_context().Process(target=become_child, args=arguments, daemon=True)
        self._process.start()
        for end in ends:
            end.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a child of a reward", timeout or 0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def become_child(
    program: str, variables: dict[str, str], channel: Connection, watched: Connection, is_quiet: bool
) -> None:
    """Do in a fork what Python does when it is told to run `program`."""
    assert program == child_process.__file__  # not that of another checkout
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2) if is_quiet else (0,):
        os.dup2(null, descriptor)
    child_process._serve(channel.fileno(), watched.fileno())
