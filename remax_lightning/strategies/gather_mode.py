"""Gathering a sharded policy for rollouts, once or layer by layer: by configuration or by free memory.

Layer by layer, ranks may run different numbers of forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from remax_lightning.distributed import reduce_over_ranks
from remax_lightning.errors import UserError
from remax_lightning.sharding import decoder_layers, full_numel


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
        for number, layer in enumerate(layers, 1)  # from 1, since 0 stands for no layer
    ]
    try:
        yield
    # The others are in their forward passes; without this rank they would wait in a collective.
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


Gather = Literal["auto", "once", "layerwise"]
KEY = "trainer.strategy.init_args.gather"
MAX_MEMORY_SHARE = 0.7
"""Maximum share of the free memory of a device that `auto` gives to the gathered policy. The rest is for keys and
values: for 32 rows of 512 tokens they take two thirds of the bytes of a 7B policy in 16 bits, one third in 32 bits."""

_gather_modes: WeakKeyDictionary[nn.Module, Gather] = WeakKeyDictionary()


def check_gather(gather: Gather) -> Gather:
    """Return the gather mode.

    Raises:
        UserError: if it is not one of `Gather`.
    """
    if gather not in get_args(Gather):
        raise UserError(f"{KEY} must be auto, once or layerwise, got {gather!r}")
    return gather


def register_gather_mode(root: nn.Module, gather: Gather) -> None:
    """Record how the modules under `root` are gathered for a rollout; `uses_layerwise_gather` reads it."""
    _gather_modes.update(dict.fromkeys(root.modules(), gather))


def uses_layerwise_gather(model: nn.Module) -> bool:
    """Whether the next rollout gathers the model layer by layer. All ranks have to call this and get the same answer.

    Raises:
        UserError: if `gather` is `layerwise` and the model does not name its layers.
    """
    # A model that no strategy has registered is gathered by its free memory.
    mode, has_layers = _gather_modes.get(model, "auto"), bool(decoder_layers(model))
    if mode == "layerwise" and not has_layers:
        raise UserError(
            f"{KEY} must be once for a {type(model).__name__}, got layerwise: it does not name its layers"
            " (_no_split_modules)"
        )
    return mode == "layerwise" or (mode == "auto" and has_layers and not fits_on_every_rank(model))


def fits_on_every_rank(model: nn.Module) -> bool:
    """Whether the device of every rank has memory for the unsharded model now.

    Checked before each rollout, because free memory changes: the first step allocates the optimizer state.
    """
    device = next(model.parameters()).device
    # All ranks decide the same, by the one with the least memory.
    free = free_bytes(device)
    needed = sum(full_bytes(parameter) for parameter in model.parameters()) + _cast_bytes(model, device)
    enough = free is None or needed <= MAX_MEMORY_SHARE * free
    return bool(reduce_over_ranks(torch.tensor(int(enough), device=device), "min"))


def full_bytes(parameter: Tensor) -> int:
    """Return the bytes of the unsharded parameter."""
    return full_numel(parameter) * parameter.element_size()


def _cast_bytes(model: nn.Module, device: torch.device) -> int:
    """Return the bytes of the 16-bit copies that a rollout makes of gathered weights under autocast."""
    if not torch.is_autocast_enabled(device.type):
        return 0
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    return sum(full_bytes(weight) // 2 for weight in weights if weight.dtype == torch.float32)


def free_bytes(device: torch.device) -> int | None:
    """Return the free bytes of a CUDA device, the allocator's unused blocks included; None on any other device."""
    if device.type != "cuda":
        return None
    # Blocks that torch has reserved but does not use count as free.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
