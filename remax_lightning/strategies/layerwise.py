"""Forward passes that gather layer by layer, with a different number of passes on each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from remax_lightning.distributed import reduce_over_ranks


@contextmanager
def lockstep(layers: Sequence[nn.Module], gather_and_reshard: Callable[[nn.Module], None]) -> Iterator[None]:
    """Keep ranks in lockstep inside, where running a layer gathers it from all ranks.

    Before a rank runs a layer, it announces the layer to the others. A rank that reaches the end of the block takes
    part in gathering the layers that others announce, until no rank needs a layer. A rank that fails does the same
    before it raises, because the others learn of the failure only after the block.

    Args:
        layers: the same on every rank, in the same order.
        gather_and_reshard: gathers a layer with the other ranks and reshards it, without running it.
    """
    device = next(parameter.device for layer in layers for parameter in layer.parameters())
    hooks = [
        layer.register_forward_pre_hook(partial(_announce_layer, number, device), prepend=True)
        for number, layer in enumerate(layers, 1)
    ]
    try:
        yield
    except Exception:
        _serve_others(layers, gather_and_reshard, device)
        raise
    else:
        _serve_others(layers, gather_and_reshard, device)
    finally:
        for hook in hooks:
            hook.remove()


def _serve_others(
    layers: Sequence[nn.Module], gather_and_reshard: Callable[[nn.Module], None], device: torch.device
) -> None:
    while number := int(_exchange(0, device)):  # 0: this rank needs no layer
        gather_and_reshard(layers[number - 1])


def _announce_layer(number: int, device: torch.device, *_: Any) -> None:
    _exchange(number, device)  # the result is not read, or the host would wait for the device at every layer


def _exchange(number: int, device: torch.device) -> torch.Tensor:
    """Announce a layer by its number (0 for none), and return the number that some rank announced, 0 if none did.

    The maximum is enough because all ranks that need a layer need the same one: they run in lockstep.
    """
    announced = torch.full((), number, device=device)
    return reduce_over_ranks(announced, "max")
