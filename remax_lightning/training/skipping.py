"""Optimizer steps without a finite gradient: they are skipped on all ranks, counted and explained."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from remax_lightning.distributed import broadcast, max_over_ranks, raise_on_all_ranks
from remax_lightning.errors import UserError
from remax_lightning.sharding import nonfinite_name
from remax_lightning.strategies import nonfinite_in_model
from remax_lightning.training.schedules import learning_rates


class SkippedSteps:
    """Skips optimizer steps whose gradient is not finite: weights, optimizer state and schedules stay as they are.

    Every rank calls `check` between backward pass and optimizer step, and all decide alike. With float16 the loss
    scale is adapted and overflows are expected: such steps are counted and warned about, but end the run only once the
    scale cannot be lowered any more.

    Args:
        maximum: the run ends after this many skipped steps in a row.

    Raises:
        UserError: if `maximum` is below 1.
    """

    def __init__(self, maximum: int) -> None:
        if maximum < 1:
            raise UserError(f"model.max_skipped_steps must be at least 1 (optimizer steps in a row), got {maximum}")
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
