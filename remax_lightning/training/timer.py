"""Wall-clock seconds of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, get_args

import torch

Phase: TypeAlias = Literal["rollout", "reward"]
"""`rollout` makes responses; `reward` scores them and runs the passes that need no gradient."""


class PhaseTimer:
    """Adds up the seconds of each phase until the end of a step, the device's own work included."""

    def __init__(self) -> None:
        self._seconds = self._zeros()

    @contextmanager
    def measure(self, phase: Phase, device: torch.device) -> Iterator[None]:
        """Add the seconds spent inside to a phase.

        Args:
            phase: what the time is spent on.
            device: where the work runs; CUDA is waited for, because its kernels are only queued.
        """
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds[phase] += time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """Return the seconds by phase, 0.0 where a phase did not run, and start again from zero."""
        seconds, self._seconds = self._seconds, self._zeros()
        return seconds

    @staticmethod
    def _zeros() -> dict[str, float]:
        return dict.fromkeys(get_args(Phase), 0.0)
