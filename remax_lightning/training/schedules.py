"""Learning-rate schedules that know the length of the run."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from remax_lightning.errors import UserError


class _WarmupSchedule(LRScheduler):
    """Linear warm-up, then a decay that a subclass shapes, down to `min_ratio` of the learning rate.

    Args:
        optimizer: whose learning rates are scheduled.
        warmup_steps: optimizer steps until the full learning rate; 0 starts there, as in the paper.
        total_steps: optimizer steps until the end of the decay; None takes the length of the run.
        min_ratio: final learning rate as a share of the full one.

    Raises:
        UserError: if a value is out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        min_ratio: float = 0.0,
    ) -> None:
        if warmup_steps < 0:
            raise UserError(f"model.lr_scheduler.init_args.warmup_steps must be 0 or more, got {warmup_steps}")
        if not 0 <= min_ratio <= 1:
            raise UserError(f"model.lr_scheduler.init_args.min_ratio must be between 0 and 1, got {min_ratio}")
        self.warmup_steps, self.total_steps, self.min_ratio = warmup_steps, total_steps, min_ratio
        super().__init__(optimizer)

    @abstractmethod
    def _decay(self, progress: float) -> float:
        """Return the share left, 1 at progress 0 and 0 at progress 1."""

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_ratio + (1 - self.min_ratio) * self._decay(min(1.0, progress))

    def state_dict(self) -> dict[str, Any]:
        """Return the position without the shape: a resumed run takes the shape from its configuration."""
        shape = ("warmup_steps", "total_steps", "min_ratio")
        return {name: value for name, value in super().state_dict().items() if name not in shape}

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group for the coming step."""
        return [base * self._factor(self.last_epoch) for base in self.base_lrs]


class WarmupCosine(_WarmupSchedule):
    """Linear warm-up, then half a cosine."""

    def _decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class WarmupLinear(_WarmupSchedule):
    """Linear warm-up, then a straight line."""

    def _decay(self, progress: float) -> float:
        return 1 - progress


def set_total_steps(scheduler: LRScheduler, total_steps: int | float) -> None:
    """Set the length of the run in a schedule of this package, if its configuration does not."""
    if isinstance(scheduler, _WarmupSchedule) and scheduler.total_steps is None and math.isfinite(total_steps):
        scheduler.total_steps = int(total_steps)
