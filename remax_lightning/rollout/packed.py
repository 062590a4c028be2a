"""Linear layers with weights laid out for a decoding step, while a rollout runs on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOST_BYTES = 2**31
"""Laid out weights are a second copy for the length of a rollout; a model larger than this keeps its own layout."""
LEAST_FOR_ONEDNN = 2**21
"""Weights of a layer from which oneDNN's own work around a product is worth its quicker product."""


@contextmanager
def packed_linears(model: nn.Module, num_rows: int) -> Iterator[list[PackedLinear]]:
    """Run the model's float32 linear layers on weights that are laid out for a decoding step inside.

    Such a step multiplies a few dozen rows with every weight of the model, and at such shapes a general product takes
    up to half its time to arrange the weights, at every token anew. Laid out once per rollout, they are ready: of large
    layers in oneDNN's own format, of small ones transposed. The copy is made from the weights as they are now and
    dropped at the end, so it is never out of date. Anything but plain float32 layers on a CPU is left alone, and so is
    mixed precision, which multiplies in bfloat16.

    Args:
        model: whose layers are packed.
        num_rows: rows of a decoding step, which the layout is chosen for.

    Yields:
        What runs in the place of the layers' own forward pass.
    """
    layers: list[Any] = [module for module in model.modules() if _can_pack(module)]
    if torch.is_autocast_enabled("cpu") or sum(layer.weight.nbytes for layer in layers) > MOST_BYTES:
        layers = []
    packed = [PackedLinear(layer.weight, layer.bias, num_rows) for layer in layers]
    for layer, instead in zip(layers, packed, strict=True):
        layer.forward = instead
    try:
        yield packed
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
    )


class PackedLinear:
    """The forward pass of one linear layer, with its weights laid out for `num_rows` rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, num_rows: int) -> None:
        operators: Any = torch.ops.mkldnn
        self.bias = bias
        self.is_onednn = weight.numel() >= LEAST_FOR_ONEDNN and torch.backends.mkldnn.is_available()
        self.weight: Tensor = (
            operators._reorder_linear_weight(weight.detach(), num_rows)
            if self.is_onednn
            else weight.detach().t().contiguous()
        )

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return what the layer would."""
        operators: Any = torch.ops.mkldnn
        if self.is_onednn:
            output: Tensor = operators._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
            return output
        rows = inputs.reshape(-1, inputs.shape[-1])
        product = rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        return product.view(*inputs.shape[:-1], -1)
