"""Parameter groups of the optimizer, and a check of the learning rate against the dtype of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from remax_lightning.errors import UserError
from remax_lightning.sharding import full_shape

LOST_SHARE = 0.5
"""Maximum share of the weights that may never change; above it the run is refused."""


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters in two groups; biases and norms, the second, take no weight decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if _num_dimensions(parameter) > 1]
    others = [parameter for parameter in trainable if _num_dimensions(parameter) <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return groups


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
        rate = group.get("initial_lr", group["lr"])
        for parameter in group["params"]:
            if parameter.dtype in (torch.bfloat16, torch.float16):
                weights = parameter.detach().flatten()[:100_000]
                unmoved = int((weights - rate == weights).sum())
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

    Groups that start with one rate go on with one: our two, with and without weight decay, are one curve.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    differ = len(set(rates)) > 1 or len({group.get("initial_lr") for group in optimizer.param_groups}) > 1
    return {"train/lr": rates[0]} | ({f"train/lr/{i}": rate for i, rate in enumerate(rates)} if differ else {})
