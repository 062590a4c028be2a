"""What the optimizer works with: parameter groups, learning rates that the weights can follow, and their schedules."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from remax_lightning.errors import UserError
from remax_lightning.sharding import full_shape

LOST_SHARE = 0.5
"""Maximum share of the weights that may never change; above it the run is refused."""


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters in two groups; biases and norms, the second, take no weight decay."""
    # Frozen parameters get no state in the optimizer.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if _num_dimensions(parameter) > 1]
    others = [parameter for parameter in trainable if _num_dimensions(parameter) <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return groups


def choose_update_kernel(optimizer: Optimizer, device: torch.device) -> None:
    """Let torch's Adam and AdamW update in one fused kernel on CUDA, unless their arguments choose another.

    torch chooses `foreach` there, whose temporary copy of all weights (5.3 GB for 1.3 B in float32) is the peak of a
    step. The update is the same up to rounding.

    Args:
        optimizer: before its first step; changed in place.
        device: where the run trains.
    """
    # This mark lets a fused optimizer undo the loss scale of float16 itself: Lightning then refuses to clip, in
    # bfloat16 too, and the norm that is logged and checked would be a scaled one.
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    if device.type != "cuda" or type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        chosen = group["fused"] is not None or group["foreach"] is not None
        if not (chosen or group["capturable"] or group["differentiable"]):
            group["fused"] = True


def _num_dimensions(parameter: nn.Parameter) -> int:
    """Return the number of dimensions of the full parameter; a shard of ZeRO-3 has one."""
    return len(full_shape(parameter))


def check_learning_rate_precision(optimizer: Optimizer) -> None:
    """Refuse a learning rate whose updates the dtype of the weights would round away.

    An Adam-like step moves a weight by about the learning rate. A bfloat16 number has 8 significant bits, so 1e-6 added
    to 0.02 is 0.02 again: the loss looks normal but the model never changes. Optimizers that keep float32 copies of
    the weights (DeepSpeed, mixed precision) are not affected.

    Raises:
        UserError: if more than half of the 16-bit weights would not change by a step of the learning rate's size.
    """
    # ---- Weights in 16 bits that a step of the size of the learning rate would not change ----
    changed, lost = 0, 0
    for group in optimizer.param_groups:
        rate = group.get("initial_lr", group["lr"])  # the full rate: a warm-up starts near 0
        for parameter in group["params"]:
            if parameter.dtype in (torch.bfloat16, torch.float16):
                # A sample is enough for a share, and quick for a large embedding.
                weights = parameter.detach().flatten()[:100_000]
                unmoved = int((weights - rate == weights).sum())  # rounded away in the dtype of the weights
                lost, changed = lost + unmoved, changed + weights.numel() - unmoved
    if lost > LOST_SHARE * (lost + changed):
        rate = max(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
        raise UserError(
            f"model.optimizer.init_args.lr is {rate:g}, which {lost / (lost + changed):.0%} of the model's 16-bit"
            " weights would round away: it would not learn. Set trainer.precision to bf16-mixed (float32 weights),"
            " use a DeepSpeed strategy (float32 copies), or raise the learning rate"
        )


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return `train/lr`, the first parameter group's learning rate, and every group's where they differ.

    Groups that start with the same rate keep the same rate, so our two, with and without weight decay, make one curve.
    """
    # Groups that started with other rates are logged apart even while they are equal, such as 0 at the end.
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    differ = len(set(rates)) > 1 or len({group.get("initial_lr") for group in optimizer.param_groups}) > 1
    return {"train/lr": rates[0]} | ({f"train/lr/{i}": rate for i, rate in enumerate(rates)} if differ else {})


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
        # step + 1, so that the first step is not lost at a learning rate of 0.
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        # 0 at the end of the warm-up, 1 at the end of the run
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
        scheduler.total_steps = int(total_steps)  # infinite where a run is limited by time only
