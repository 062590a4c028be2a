"""Random rollouts as tensors, for comparison with the oracles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    reward: Tensor
    baseline_reward: Tensor
    log_ratio: Tensor
    mask: Tensor


def make(num_samples: int = 1, length: int = 13, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    """Six prompts; ragged responses, one of them empty; rewards wide enough for every clip to bite."""
    generator = torch.Generator().manual_seed(seed)
    size = 6 * num_samples
    lengths = torch.randint(1, length + 1, (size,), generator=generator)
    lengths[0], lengths[1] = length, 0
    return Case(
        (9 * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype),
        (3 * torch.randn(6, generator=generator, dtype=torch.float64)).to(dtype),
        (5 * torch.randn(size, length, generator=generator, dtype=torch.float64)).to(dtype),
        torch.arange(length) < lengths[:, None],
    )
