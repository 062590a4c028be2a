"""Linear layers with weights laid out for the processor's matrix unit, while a rollout runs on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOST_BYTES = 2**31
"""Packed weights are a second copy for the length of a rollout; a model larger than this keeps its own layout."""


@contextmanager
def packed_linears(model: nn.Module, num_rows: int) -> Iterator[None]:
    """Run the model's float32 linear layers through oneDNN with packed weights inside.

    A decoding step multiplies a few dozen rows with every weight of the model. At such shapes the general matrix
    product spends half its time arranging the weights, at every token anew; packed once per rollout, they are ready.
    The packed copy is made from the weights as they are now and dropped at the end, so it is never out of date.
    Anything but plain float32 layers on a CPU is left alone, and so is mixed precision, which multiplies in bfloat16.

    Args:
        model: whose layers are packed.
        num_rows: rows of a decoding step, which the layout is chosen for.
    """
    layers: list[Any] = [module for module in model.modules() if _can_pack(module)]
    if torch.is_autocast_enabled("cpu") or sum(layer.weight.nbytes for layer in layers) > MOST_BYTES:
        layers = []
    packed: Any = torch.ops.mkldnn
    for layer in layers:
        weight = packed._reorder_linear_weight(layer.weight.detach(), num_rows)
        layer.forward = _Packed(weight, layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _can_pack(module: nn.Module) -> bool:
    # A subclass may compute something else, and a placeholder of a sharded weight is empty.
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.weight.numel() > 0
        and torch.backends.mkldnn.is_available()
    )


class _Packed:
    """The forward pass of one linear layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, inputs: Tensor) -> Tensor:
        packed: Any = torch.ops.mkldnn
        output: Tensor = packed._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return output
