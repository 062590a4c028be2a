"""Where the random numbers of rollouts come from, and those of everything else."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

TRAINING, EVALUATION, REFERENCE = 0, 1, 2
"""What rollouts are made for; the reference's responses in an evaluation have random numbers of their own, because a
comparison is between independent ones."""


def rollout_generator(seed: int, rank: int, stage: int, count: int, device: torch.device) -> torch.Generator:
    """Return a generator for one rollout, its seed made from run, rank, stage and number.

    Nothing of it has to be saved but the count, on no rank, and evaluation draws nothing from training.

    Args:
        seed: that of the run.
        rank: of this process.
        stage: `TRAINING`, `EVALUATION` or `REFERENCE`.
        count: how many rollouts the stage has made before.
        device: where the numbers are drawn.
    """
    entropy = [seed, rank, stage, count]
    own = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(own)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of this process's generators: torch's, Python's and, on a GPU, the device's."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators where `random_state` found them."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
