"""A variant of a benchmark in a process of its own: for its memory, or for another environment.

The process reads lines `step <turn>` and answers each with a line of JSON; it ends when there are no more lines.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import resident
from timing import versions

ANSWER = "ANSWER "
"""How the lines begin that are answers, not what a library printed."""


class Worker:
    """Starts the process and waits until its models are loaded.

    Args:
        command: what runs `serve`.

    Attributes:
        versions: of the packages there.
    """

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions: dict[str, str] = self._answer()
        self.peak_over_base_gb = 0.0
        """The most that its steps so far held, over what it held when the first began."""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()  # closes its input

    def step(self, turn: int) -> dict[str, float]:
        """Take one step and return its seconds by phase."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"step {turn}\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.peak_over_base_gb = answer["peak_over_base_gb"]
        figures: dict[str, float] = answer["figures"]
        return figures

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError(f"ended with {self._process.wait()} before it answered: {self._process.args}")


def serve(make: Callable[[Callable[[], None]], Callable[[int], dict[str, float]]]) -> None:
    """Take steps as stdin says.

    Args:
        make: makes the step, given a function to call whenever a step begins.
    """
    bases: list[float] = []

    def begin() -> None:
        if not bases:
            Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
            bases.append(resident("VmRSS") / 1e9)

    step = make(begin)
    _send(versions())
    for line in sys.stdin:
        figures = step(int(line.removeprefix("step")))
        _send({"figures": figures, "peak_over_base_gb": resident("VmHWM") / 1e9 - bases[0]})


def _send(answer: Any) -> None:
    print(ANSWER + json.dumps(answer), flush=True)
