"""Linear layers whose weights are cast to 16 bits once per rollout instead of once per token, in mixed precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remax_lightning.sharding import is_sharded


@contextmanager
def cast_linears(model: nn.Module, previous: Sequence[CastLinear] = ()) -> Iterator[list[CastLinear]]:
    """Under autocast, run the model's float32 linear layers on weights that are cast once, inside the context.

    Autocast would cast all weights at every token. The copies are made from the current weights, so they are never out
    of date. Without autocast nothing changes. Sharded weights are not copied, since they are sharded to save memory.

    Args:
        model: whose plain float32 `nn.Linear` layers to replace; all other layers stay as they are.
        previous: what an earlier call yielded. Its memory is reused where it fits, because CUDA graphs read it.

    Yields:
        What runs in place of the layers' own forward pass.
    """
    layers: list[Any] = [module for module in model.modules() if _can_cast(module)]
    device = layers[0].weight.device.type if layers else "cpu"
    casts: list[CastLinear] = []
    if layers and torch.is_autocast_enabled(device) and not is_sharded(model):
        casts = _cast(layers, torch.get_autocast_dtype(device), previous)
    for layer, cast in zip(layers, casts, strict=False):  # no casts where nothing changes
        layer.forward = cast
    try:
        yield casts
    finally:
        for layer, _ in zip(layers, casts, strict=False):
            del layer.forward


def _can_cast(module: nn.Module) -> bool:
    # A subclass may compute something else, and the placeholder of a sharded weight is empty.
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and module.weight.device.type in ("cpu", "cuda")
        and module.weight.dtype == torch.float32
        and module.weight.numel() > 0
    )


def _cast(layers: Sequence[nn.Linear], dtype: torch.dtype, previous: Sequence[CastLinear]) -> list[CastLinear]:
    """Return the replacement of each layer, in the memory of `previous` if shapes, dtype and device are the same."""
    if [_kind(cast.weight, cast.weight.dtype) for cast in previous] != [_kind(layer.weight, dtype) for layer in layers]:
        return [CastLinear(layer, dtype) for layer in layers]
    for cast, layer in zip(previous, layers, strict=True):
        cast.weight.copy_(layer.weight)
        cast.bias = layer.bias
    return [*previous]


def _kind(weight: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    return weight.shape, weight.device, dtype


class CastLinear:
    """The forward pass of a linear layer under autocast, with its weight cast beforehand."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.weight, self.bias = layer.weight.detach().to(dtype), layer.bias

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return what the layer would; autocast casts inputs and bias."""
        # In two dimensions: if the weight needs no gradient, torch would copy it for every row of a larger input.
        rows = nn.functional.linear(inputs.reshape(-1, inputs.shape[-1]), self.weight, self.bias)
        return rows.view(*inputs.shape[:-1], -1)
