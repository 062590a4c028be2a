"""Starts a script of this folder in several processes that find each other over gloo, and waits for all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]


def launch(module: str, *arguments: str, ranks: int = 2, timeout: float = 120, cuda: bool = False) -> None:
    """Run `python -m module` as `ranks` ranks; fail if one of them fails, or if they wait for each other for good.

    They see no CUDA device unless `cuda`.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(ranks)]
        common, processes = environment(ranks, cuda), []
        try:
            for rank, log in enumerate(logs):
                command = [sys.executable, "-m", module, *arguments]
                own = {**common, "LOCAL_RANK": str(rank)}
                with log.open("w") as stream:  # no pipe: a full one would stop its rank
                    processes.append(subprocess.Popen(command, env=own, stdout=stream, stderr=subprocess.STDOUT))
            wait(processes, timeout)
            failed = [rank for rank, process in enumerate(processes) if process.poll() != 0]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        told = "\n".join(f"rank {rank}:\n{logs[rank].read_text()[-4000:]}" for rank in failed)
    assert not failed, f"ranks {failed} failed or did not end\n{told}"


def wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> None:
    """Wait until all have ended, one has failed, or the time is over."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.05)


def environment(ranks: int, cuda: bool = False) -> dict[str, str]:
    """What the ranks find each other by."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        **({} if cuda else {"CUDA_VISIBLE_DEVICES": ""}),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "NODE_RANK": "0",
    }
