"""Where the random numbers of rollouts come from."""

from __future__ import annotations

import numpy as np
import torch

TRAINING, EVALUATION = 0, 1


def rollout_generator(seed: int, rank: int, stage: int, count: int, device: torch.device) -> torch.Generator:
    """Return a generator for one rollout, its seed made from run, rank, stage and number.

    Nothing of it has to be saved but the count, on no rank, and evaluation draws nothing from training.

    Args:
        seed: that of the run.
        rank: of this process.
        stage: `TRAINING` or `EVALUATION`.
        count: how many rollouts the stage has made before.
        device: where the numbers are drawn.
    """
    entropy = [seed, rank, stage, count]
    own = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(own)
