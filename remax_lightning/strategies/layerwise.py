"""Layer by layer: forward passes that gather each layer for itself, on ranks that each need another number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from remax_lightning.distributed import all_reduce


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that the model's family says must stay in one piece: its layers."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    # FSDP2 puts a class of its own before the layer's.
    found = [module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}]
    inner = {each for module in found for each in module.modules() if each is not module}
    return [module for module in found if module not in inner]


@contextmanager
def in_step(layers: Sequence[nn.Module], take_part: Callable[[nn.Module], None]) -> Iterator[None]:
    """Keep the ranks together inside, where running a layer gathers it from all of them.

    Before a layer gathers, its rank announces it to the others. A rank that is done at the end of the block goes on
    listening, and takes part in gathering what the others announce, until none of them needs a layer any more. So
    does one that fails, before it lets its exception out: whatever tells the others of it must find them there.

    Args:
        layers: the same on every rank, in the same order.
        take_part: gathers a layer with the other ranks and gives it up again, without running it.
    """
    device = next(parameter.device for layer in layers for parameter in layer.parameters())
    hooks = [
        layer.register_forward_pre_hook(partial(_announce_before, number, device), prepend=True)
        for number, layer in enumerate(layers, 1)
    ]
    try:
        yield
    except Exception:
        _answer(layers, take_part, device)
        raise
    else:
        _answer(layers, take_part, device)
    finally:
        for hook in hooks:
            hook.remove()


def _answer(layers: Sequence[nn.Module], take_part: Callable[[nn.Module], None], device: torch.device) -> None:
    while number := int(_announced(0, device)):  # 0: this rank needs none
        take_part(layers[number - 1])


def _announce_before(number: int, device: torch.device, *_: Any) -> None:
    _announced(number, device)  # not read: on CUDA that would make the host wait for the device, at every layer


def _announced(number: int, device: torch.device) -> torch.Tensor:
    """Announce a layer by its number, and return what a rank announces; those that do announce the same."""
    announced = torch.full((), number, device=device)
    return all_reduce(announced, "max")
