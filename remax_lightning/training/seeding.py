"""The state of the global random number generators."""

from __future__ import annotations

import random
from typing import Any

import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of this process's generators: torch's, Python's and, on a GPU, the device's."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the generators to a state of `random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
