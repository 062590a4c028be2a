"""The norm of a gradient that strategies spread over ranks in their own ways."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from remax_lightning.distributed import sum_tensor_over_ranks
from remax_lightning.sharding import is_sharded


def global_grad_norm(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """Return the Euclidean norm of the whole gradient, over all parameters and ranks, before clipping.

    Call it between the backward pass and the optimizer step (`on_before_optimizer_step`), on every rank: where
    parameters are sharded, it reduces over ranks. Under DDP each rank has the whole gradient already. Loss scaling has
    been undone in it. It is not finite exactly where an entry of the gradient, on any rank, is not; under DeepSpeed it
    is then infinite, NaN included.

    Args:
        trainer: of the run.
        optimizer: whose parameters are counted; under DeepSpeed its wrapper.

    Returns:
        A scalar, the same on every rank; None where DeepSpeed only accumulates and takes no step.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return _deepspeed_norm(trainer.strategy.deepspeed_engine)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # FSDP2 marks parameters; the flat ones of FSDP are plain tensors, of which each rank has its own.
    flat = isinstance(trainer.strategy, FSDPStrategy)
    sharded = [parameter for parameter in parameters if flat or is_sharded(parameter)]
    whole = [parameter for parameter in parameters if not (flat or is_sharded(parameter))]
    device = trainer.strategy.root_device
    squares = _sum_of_squares(whole, device)
    if sharded:
        squares = squares + sum_tensor_over_ranks(trainer, _sum_of_squares(sharded, device))
    return squares.sqrt()


def _sum_of_squares(parameters: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the squares of the gradients that this rank has, in the widest dtype of the device."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # A norm in 16 bits has three digits, and overflows in float16.
    norms = [torch.linalg.vector_norm(_local(gradient), dtype=torch.float32).to(device) for gradient in gradients]
    return torch.stack(norms).to(wide).square().sum() if norms else torch.zeros((), dtype=wide, device=device)


def _local(gradient: Tensor) -> Tensor:
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local


def _deepspeed_norm(engine: Any) -> Tensor | None:
    """Return the norm as DeepSpeed itself computes it in its step, a moment before it."""
    if not engine.is_gradient_accumulation_boundary():
        return None
    optimizer, device = engine.optimizer, engine.device
    if hasattr(optimizer, "_get_norm_groups"):  # stage 3
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norm = combine_grad_norm_groups(optimizer._get_norm_groups())
    elif hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
        norm = optimizer.scaled_global_norm()
    else:  # stage 0 leaves the gradients, averaged over ranks, where they are
        norm = _sum_of_squares(engine.module.parameters(), device).sqrt()
    return torch.as_tensor(norm, device=device) / float(getattr(optimizer, "loss_scale", 1.0))
