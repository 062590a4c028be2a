"""Linear layers with weights laid out or cast for a decoding step, while a rollout runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

MOST_BYTES = 2**31
"""Laid out weights are a second copy for the length of a rollout; a model larger than this keeps its own layout."""
LEAST_FOR_ONEDNN = 2**21
"""Weights of a layer from which oneDNN's own work around a product is worth its quicker product."""


@contextmanager
def packed_linears(model: nn.Module, num_rows: int, before: Sequence[Packed] = ()) -> Iterator[list[Packed]]:
    """Run the model's float32 linear layers on weights that are prepared for a decoding step inside.

    Such a step multiplies a few dozen rows with every weight of the model. On a CPU a general product takes up to half
    its time at such shapes to arrange the weights, at every token anew. Laid out once per rollout, they are ready: of
    large layers in oneDNN's own format, of small ones transposed. In mixed precision, autocast would make 16 bits of
    all weights at every token; they are cast once per rollout, on every device. Weights are shared among devices to
    save memory, so those are not copied. Either copy is made from the weights as they are now, so it is never out of
    date. Anything but plain float32 layers is left alone.

    Args:
        model: whose layers are packed.
        num_rows: rows of a decoding step, which the layout is chosen for.
        before: what an earlier call yielded. In mixed precision its memory is used again where it fits, so that CUDA
            graphs go on reading it.

    Yields:
        What runs in the place of the layers' own forward pass.
    """
    layers: list[Any] = [module for module in model.modules() if _can_pack(module)]
    device = layers[0].weight.device.type if layers else "cpu"
    if not torch.is_autocast_enabled(device):
        packed = _laid_out(layers, num_rows)
    else:
        packed = [] if is_shared(model) else _cast(layers, torch.get_autocast_dtype(device), before)
    for layer, instead in zip(layers, packed, strict=False):
        layer.forward = instead
    try:
        yield packed
    finally:
        for layer, _ in zip(layers, packed, strict=False):
            del layer.forward


def _can_pack(module: nn.Module) -> bool:
    # A subclass may compute something else, and a placeholder of a sharded weight is empty.
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and module.weight.device.type in ("cpu", "cuda")
        and module.weight.dtype == torch.float32
        and module.weight.numel() > 0
    )


def _laid_out(layers: Sequence[nn.Linear], num_rows: int) -> list[Packed]:
    """Return what stands in for each layer on a CPU, or nothing if all run themselves."""
    if any(layer.weight.device.type != "cpu" for layer in layers):
        return []
    if sum(layer.weight.nbytes for layer in layers) > MOST_BYTES:
        return []
    return [PackedLinear(layer.weight, layer.bias, num_rows) for layer in layers]


def is_shared(model: nn.Module) -> bool:
    """Return whether ZeRO-3 or FSDP2 shares the weights among devices, also while they are gathered for a rollout."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _cast(layers: Sequence[nn.Linear], dtype: torch.dtype, before: Sequence[Packed]) -> list[Packed]:
    """Return what stands in for each layer in mixed precision, in the memory of `before` where that fits."""
    if [_kind(each.weight, each.weight.dtype) for each in before] != [_kind(each.weight, dtype) for each in layers]:
        return [CastLinear(layer, dtype) for layer in layers]
    for each, layer in zip(before, layers, strict=True):
        each.weight.copy_(layer.weight)
        each.bias = layer.bias
    return [*before]


def _kind(weight: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    return weight.shape, weight.device, dtype


class CastLinear:
    """The forward pass of one linear layer in mixed precision, with its weights in 16 bits."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.weight, self.bias = layer.weight.detach().to(dtype), layer.bias

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return what the layer would: autocast makes 16 bits of inputs and bias."""
        # As rows: of weights without gradients, torch would make a copy per row rather than fold some of the inputs.
        rows = nn.functional.linear(inputs.reshape(-1, inputs.shape[-1]), self.weight, self.bias)
        return rows.view(*inputs.shape[:-1], -1)


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


Packed: TypeAlias = PackedLinear | CastLinear
"""Has the copy of the weights as `weight`."""
