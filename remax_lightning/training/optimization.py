"""What the optimizer works with: parameter groups, schedules, and steps that are skipped without a finite gradient."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from remax_lightning.distributed import broadcast, max_over_ranks, raise_on_all_ranks
from remax_lightning.errors import UserError, at_least, check_ranges
from remax_lightning.sharding import full_shape, nonfinite_name
from remax_lightning.strategies import nonfinite_in_model

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
    """Let torch's Adam and AdamW update in one fused kernel on CUDA and CPUs, unless their arguments choose another.

    torch chooses `foreach` on CUDA, whose temporary copy of all weights (5.3 GB for 1.3 B in float32) is the peak of a
    step, and on a CPU an operator after the other, a sixth as fast. The update is the same up to rounding.

    Args:
        optimizer: before its first step; changed in place.
        device: where the run trains.
    """
    # This mark lets a fused optimizer undo the loss scale of float16 itself: Lightning then refuses to clip, in
    # bfloat16 too, and the norm that is logged and checked would be a scaled one.
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    if device.type not in ("cuda", "cpu") or type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
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
        warmup_steps: Annotated[int, at_least(0)] = 0,
        total_steps: Annotated[int | None, at_least(1)] = None,
        min_ratio: Annotated[float, at_least(0, at_most=1)] = 0.0,
    ) -> None:
        check_ranges(_WarmupSchedule.__init__, locals(), "model.lr_scheduler.init_args")
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


# ---- Steps without a finite gradient are skipped on all ranks, counted and explained ----


MaxSkippedSteps: TypeAlias = Annotated[int, at_least(1, note="optimizer steps in a row")]
"""`model.max_skipped_steps` of every module."""


class SkippedSteps:
    """Skips optimizer steps whose gradient is not finite: weights, optimizer state and schedules stay as they are.

    Every rank calls `check` between backward pass and optimizer step, and all decide alike. With float16 the loss
    scale is adapted and overflows are expected: such steps are counted and warned about, but end the run only once the
    scale cannot be lowered any more.

    Args:
        maximum: the run ends after this many skipped steps in a row.
    """

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.total, self.in_a_row = 0, 0
        self.is_skipped = False

    def check(self, module: LightningModule, optimizer: Optimizer, norm: Tensor) -> None:
        """Skip the coming optimizer step if the gradient is not finite on any rank.

        Args:
            module: of the run.
            optimizer: whose step comes; under DeepSpeed its wrapper.
            norm: of the whole gradient, before clipping.

        Raises:
            UserError: if this is the last of `maximum` steps in a row, on every rank.
        """
        trainer, value = module.trainer, float(norm)
        # The square has to fit into float32, too: clipping and Adam's second moment compute it.
        finite = math.isfinite(value) and value < math.sqrt(torch.finfo(torch.float32).max)
        # The highest rank that has met it, or -1. One number tells all of them whether, and who explains it.
        rank = int(max_over_ranks(trainer, [0 if finite else trainer.global_rank + 1])[0]) - 1
        self.is_skipped = rank >= 0
        if not self.is_skipped:
            self.in_a_row = 0
            return
        # ---- What to tell, before the gradients are gone ----
        step, loss_scale = trainer.global_step + 1, _loss_scale(trainer)
        loss = float(trainer.callback_metrics.get("train/loss", math.nan))
        rate = learning_rates(optimizer)["train/lr"]
        facts = f"loss {loss:.4g}, norm of the gradient {value:.4g}, learning rate {rate:.4g}"
        cause = _likely_cause(module, optimizer, loss, loss_scale)
        if trainer.world_size > 1:  # what a rank says that has met it
            facts, cause = broadcast(trainer.strategy, (facts, cause), src=rank)
        _drop_gradients(trainer, optimizer)
        # ---- Count it; lowering a loss scale is no failure ----
        self.total += 1
        searching = loss_scale is not None and loss_scale.can_fall
        self.in_a_row += not searching
        if searching or (self.in_a_row < self.maximum and not (loss_scale and loss_scale.is_final)):
            rank_zero_warn(f"Optimizer step {step} is skipped: its gradient is not finite ({facts}). {cause}.")
            return
        with raise_on_all_ranks(trainer):
            raise UserError(
                f"optimizer step {step}: its gradient is not finite, as in every one of the last {self.in_a_row}"
                f" optimizer steps (model.max_skipped_steps: {self.maximum}; {facts}). {cause}. These steps have not"
                " changed the weights"
            )

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the counts."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]


class _LossScale(NamedTuple):
    """A loss scale that is adapted to the gradients, as float16 needs it.

    Args:
        value: of the loss scale now.
        can_fall: whether this overflow lowers it.
        is_final: whether DeepSpeed ends the run at the next overflow, with an error of its own.
    """

    value: float
    can_fall: bool
    is_final: bool


def _loss_scale(trainer: Trainer) -> _LossScale | None:
    scaler: Any
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        scaler = getattr(trainer.strategy.deepspeed_engine.optimizer, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return None
        value = float(scaler.cur_scale)
        # Hysteresis lets some overflows pass before the scale is lowered.
        can_fall = value > scaler.min_scale or min(scaler.cur_hysteresis, scaler.delayed_shift) > 1
        return _LossScale(value, can_fall, is_final=not can_fall and scaler.raise_error_at_min_scale)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return None
    value = float(scaler.get_scale())
    return _LossScale(value, can_fall=value > 1, is_final=False)


def _drop_gradients(trainer: Trainer, optimizer: Optimizer) -> None:
    """Leave the optimizer step nothing to do."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        wrapped = trainer.strategy.deepspeed_engine.optimizer
        if not isinstance(wrapped, Optimizer):
            # DeepSpeed skips such a step itself and in silence, and clears its buffers, also in bfloat16 with this.
            wrapped.check_grad_overflow = True
            return
        optimizer = wrapped
    elif getattr(trainer.precision_plugin, "scaler", None) and getattr(optimizer, "_step_supports_amp_scaling", False):
        return  # a fused optimizer is skipped by the scaler, which looks for the overflow in the gradients
    optimizer.zero_grad(set_to_none=True)


def _likely_cause(module: LightningModule, optimizer: Optimizer, loss: float, loss_scale: _LossScale | None) -> str:
    """Return a sentence, without its full stop, about where the numbers overflow and what to do. A collective."""
    trainer = module.trainer
    if loss_scale is not None and loss_scale.can_fall:
        return f"float16 overflows at the loss scale {loss_scale.value:g}, which is lowered; nothing is to be done"
    smaller = "lower model.optimizer.init_args.lr or set trainer.gradient_clip_val"
    # Ranks may differ in what they see, but all of them have to ask.
    damaged = nonfinite_in_model(trainer, module)
    if damaged is not None:
        return f"The weights themselves are not finite ({damaged}): start from an earlier checkpoint, and {smaller}"
    half = "16" in str(trainer.precision) and "bf16" not in str(trainer.precision)
    precision = f", or set trainer.precision: bf16-mixed (now {trainer.precision})" if half else ""
    if not math.isfinite(loss):
        figures = sorted(
            name
            for name, figure in trainer.callback_metrics.items()
            if name.startswith("train/") and name not in ("train/loss", "train/grad_norm") and not figure.isfinite()
        )
        also = f", as {', '.join(figures)}" if figures else ""
        return f"The loss is not finite already{also}: earlier steps were too large; {smaller}{precision}"
    # ---- Weights and loss are finite, so the backward pass overflows: where? ----
    names = {parameter: name for name, parameter in module.named_parameters()}
    gradients = (
        (names.get(parameter, "a parameter"), parameter.grad)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    )
    first = nonfinite_name(gradients)
    where = f", first at {first}" if first else ""
    return f"The loss is finite, and the backward pass overflows{where}: {smaller}{precision}"
