"""Backward passes within a training step, before the one that Lightning makes at its end."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor


def accumulate_gradients(trainer: Trainer, loss: Tensor) -> None:
    """Add the gradient of a micro-batch to those of the optimizer step; call it within `training_step`.

    Lightning makes the backward pass of the loss that `training_step` returns, and the step. Every rank has to call
    this as often as the others: under ZeRO and FSDP2 each backward pass reduces over ranks. Under DDP the ranks
    exchange gradients in the last one only, because DDP waits for it from the end of the forward pass on.

    Args:
        trainer: of the run.
        loss: scalar, a term of the step's loss.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DeepSpeedStrategy):
        strategy.backward(loss, None)
        return
    # ---- DeepSpeed counts backward passes by the forward passes of its engine, of which this is a part ----
    from deepspeed.runtime.utils import register_output_backward_hooks

    engine = cast(Any, strategy.deepspeed_engine)
    register_output_backward_hooks(
        loss,
        preprocess_once_fn=engine._backward_prologue,
        preprocess_per_tensor_fn=engine._backward_prologue_per_tensor,
    )
    # The optimizer does not take part in a step before its last backward pass.
    engine.set_gradient_accumulation_boundary(is_boundary=False)
    strategy.backward(loss, None)
    # As at the start of a forward pass: the next backward pass adds to this one.
    if hasattr(engine.optimizer, "clear_backward_seen_flag"):  # not in stage 0
        engine.optimizer.clear_backward_seen_flag()
    engine._is_gradient_accumulation_boundary = None
