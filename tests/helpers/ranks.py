"""Runs a function in several processes that find each other over gloo: the ranks of a test.

The processes stay for the whole session and are handed one function after the other. They keep their process group,
too: DeepSpeed caches groups that belong to it. A function that fails, or that leaves the process otherwise than it was,
costs the processes: the next one gets new ones, forks with all imports done (`helpers/forks.py`).
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any
from unittest.mock import patch

from helpers.forks import warm_context

from benchmarks.chaos.warm import begin_anew

POOLS: dict[int, Ranks] = {}
"""By the number of ranks; each is started when a test first asks for it."""


def launch(
    function: Callable[..., None],
    *arguments: Any,
    ranks: int = 2,
    timeout: float = 600,
    fresh: str = "",
    cuda: bool = False,
) -> str:
    """Call `function(*arguments)` on every rank and return what they printed.

    Args:
        function: of a module, which finds its rank in `LOCAL_RANK` and their number in `WORLD_SIZE`.
        arguments: anything that pickles.
        ranks: how many processes.
        timeout: seconds after which ranks that wait for each other have failed; on a busy machine others take minutes.
        fresh: why the function needs processes of its own; by default it gets those of the session.
        cuda: whether the ranks see CUDA devices; they are fresh then.

    Raises:
        AssertionError: if a rank raised, ended or took too long, with the end of what it printed.
    """
    if fresh or cuda:
        processes = Ranks(ranks, cuda=cuda)
        try:
            return processes.call(function, arguments, timeout)
        finally:
            processes.close()
    if ranks not in POOLS:
        POOLS[ranks] = Ranks(ranks)
    try:
        printed = POOLS[ranks].call(function, arguments, timeout)
    except AssertionError:
        POOLS.pop(ranks).close()
        raise
    if POOLS[ranks].leftovers:
        POOLS.pop(ranks).close()
    return printed


def close_all() -> None:
    """End all processes of the session."""
    while POOLS:
        POOLS.popitem()[1].close()


atexit.register(close_all)


class Ranks:
    """Processes that wait for functions to call."""

    def __init__(self, ranks: int, *, cuda: bool = False) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.logs = [Path(self.folder.name) / f"rank{rank}.log" for rank in range(ranks)]
        self.leftovers: list[str] = []
        self.processes, self.connections = [], []
        # what is forked cannot use CUDA if its parent has looked for a device, as libraries do when they are imported
        context = multiprocessing.get_context("spawn") if cuda else warm_context()
        common = environment(ranks, cuda)
        for rank, log in enumerate(self.logs):
            log.touch()
            ours, theirs = context.Pipe()
            variables = {**common, "LOCAL_RANK": str(rank)}
            process = context.Process(target=serve, args=(theirs, variables, str(log)), name=f"rank {rank}")
            with patch.dict(os.environ, variables):  # what is read when torch is imported
                process.start()
            theirs.close()  # so that the end of the process is seen here
            self.processes.append(process)
            self.connections.append(ours)

    def call(self, function: Callable[..., None], arguments: tuple[Any, ...], timeout: float) -> str:
        """Hand the function to all ranks, and wait until all have answered, one has failed, or the time is over."""
        starts = [log.stat().st_size for log in self.logs]
        job = (function.__module__, function.__qualname__, arguments)
        failed = [rank for rank, connection in enumerate(self.connections) if not sent(connection, job)]
        waiting = dict(zip(self.connections, range(len(self.connections)), strict=True))
        end = time.monotonic() + timeout
        while waiting and not failed and (left := end - time.monotonic()) > 0:
            for connection in wait_for_any(list(waiting), left):
                rank = waiting.pop(connection)
                leftovers = answer(connection)
                if leftovers is None:
                    failed.append(rank)
                else:
                    self.leftovers += leftovers
        failed = sorted({*failed, *waiting.values()})
        printed = []
        for log, start in zip(self.logs, starts, strict=True):
            with log.open("rb") as file:
                file.seek(start)
                printed.append(file.read().decode(errors="replace"))
        told = "\n".join(f"rank {rank}:\n{printed[rank][-4000:]}" for rank in failed)
        assert not failed, f"ranks {failed} failed or did not end\n{told}"
        return "\n".join(printed)

    def close(self) -> None:
        """End the processes, whatever they do."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def sent(connection: Connection, job: Any) -> bool:
    """Whether the process at the other end is there to be given a job."""
    try:
        connection.send(job)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def answer(connection: Connection) -> list[str] | None:
    """What the job left behind on a rank; None if it failed, or the process has ended."""
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return None


def environment(ranks: int, cuda: bool = False) -> dict[str, str]:
    """What the ranks find each other by. They see no CUDA device unless `cuda`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "OMP_NUM_THREADS": "1",
        **({} if cuda else {"CUDA_VISIBLE_DEVICES": ""}),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "NODE_RANK": "0",
    }


# What runs in the processes


def serve(connection: Connection, variables: dict[str, str], log: str) -> None:
    """Call what is handed over, until the other end is closed or a call raises."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    folder = Path(log).with_suffix("")
    folder.mkdir()
    os.chdir(folder)
    os.environ.update(variables)
    begin_anew(int(variables["LOCAL_RANK"]))
    while True:
        try:
            module, name, arguments = connection.recv()
        except EOFError:
            os._exit(0)  # threads of gloo may be waiting for ranks that have ended
        os.environ.update(variables)  # Lightning takes WORLD_SIZE away after a run
        try:
            function = getattr(importlib.import_module(module), name)
            before = state()
            with warnings.catch_warnings():  # a warning is shown again by every job
                function(*arguments)
            after = state()
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send([name for name, value in after.items() if value != before[name]])


def state() -> dict[str, Any]:
    """What a job has to leave as it was."""
    import torch

    return {
        "current folder": Path.cwd(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "SIGTERM": signal.getsignal(signal.SIGTERM),
        "threads": sorted(thread.name for thread in threading.enumerate() if not thread.daemon),
        "torch.save": torch.save,
    }
