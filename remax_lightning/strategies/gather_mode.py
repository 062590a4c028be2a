"""Once or layer by layer: what the configuration wants for a rollout, and what the devices have room for."""

from __future__ import annotations

from typing import Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from remax_lightning.distributed import all_reduce
from remax_lightning.errors import UserError
from remax_lightning.strategies.layerwise import layers_of

Gather = Literal["auto", "once", "layerwise"]
KEY = "trainer.strategy.init_args.gather"
SHARE = 0.7
"""The most of a device's free memory that the gathered policy may take by `auto`. The rest is for keys and values: with
32 rows of 512 tokens these are two thirds of a 7B policy's weights in 16 bits, a third in 32."""

_wanted: WeakKeyDictionary[nn.Module, Gather] = WeakKeyDictionary()


def checked_gather(gather: Gather) -> Gather:
    """Return the choice.

    Raises:
        UserError: if there is no such choice.
    """
    if gather not in get_args(Gather):
        raise UserError(f"{KEY} must be auto, once or layerwise, got {gather!r}")
    return gather


def remember(root: nn.Module, gather: Gather) -> None:
    """Note how the modules under `root` are gathered for a rollout, so that `layer_by_layer` finds it for any."""
    _wanted.update(dict.fromkeys(root.modules(), gather))


def layer_by_layer(model: nn.Module) -> bool:
    """Whether a rollout of now gathers the model's layers one at a time. The same on all ranks, which all have to ask.

    Raises:
        UserError: if that is wanted of a model that does not say what its layers are.
    """
    wanted, possible = _wanted.get(model, "auto"), bool(layers_of(model))
    if wanted == "layerwise" and not possible:
        raise UserError(
            f"{KEY} must be once for a {type(model).__name__}, got layerwise: it does not say which of its modules are"
            " layers (_no_split_modules)"
        )
    return wanted == "layerwise" or (wanted == "auto" and possible and not fits(model))


def fits(model: nn.Module) -> bool:
    """Whether every rank's device has room for the whole model now.

    Asked before each rollout: the optimizer's state, for one, may come into being at the first step.
    """
    device = next(model.parameters()).device
    free = free_bytes(device)
    enough = free is None or sum(whole_bytes(each) for each in model.parameters()) <= SHARE * free
    return bool(all_reduce(torch.tensor(int(enough), device=device), "min"))


def whole_bytes(parameter: Tensor) -> int:
    """Return the size of a parameter once it is gathered."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def free_bytes(device: torch.device) -> int | None:
    """Return what is free on a CUDA device, the allocator's unused blocks included; None on any other device."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
