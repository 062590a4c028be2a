"""Processes that begin with all that a run imports: forks of one that has imported it, once a worker of pytest.

A process of Python's own spends 8 seconds of a core on imports, and each search for garbage in it, as DeepSpeed makes
them, a third of a second on what was imported.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest.mock import patch


def warm_context() -> ForkServerContext:
    """Return a context whose `Process` is a fork with the imports done, and without a thread or a device of CUDA."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.all_imports"])
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # it finds the same modules as this process
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with patch.dict(os.environ, variables):
        forkserver.ensure_running()
    return context


def start_code(code: str, *arguments: str, log: Path) -> ForkServerProcess:
    """Start what `python -c code *arguments` does, in a fork; what it prints is added to `log`."""
    process = warm_context().Process(target=_run_code, args=(code, arguments, log), daemon=True)
    process.start()
    return process


def _run_code(code: str, arguments: tuple[str, ...], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
