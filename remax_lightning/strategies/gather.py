"""Reading a policy whole, and rolling out with it, whatever the strategy has done with its parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from remax_lightning.strategies import fsdp2, zero3
from remax_lightning.strategies.gather_mode import layer_by_layer

log = logging.getLogger(__name__)

_told: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Hold the model's parameters whole on every rank inside, and let its forward passes wait for no other rank.

    One gathering at the start is all the communication, so ranks may run as many forward passes as each of them needs.
    All ranks have to enter and leave. A device has to hold the whole model for that time. Nothing happens where the
    parameters are whole anyway (one process, DDP, ZeRO-1 and ZeRO-2). Parameters must not be changed inside.

    Args:
        model: the policy.

    Raises:
        UserError: if Lightning's own DeepSpeed strategy has partitioned it.
    """
    sharding = _sharding(model)
    if sharding is None:
        yield
        return
    with sharding.whole(model):
        yield


@contextmanager
def rollout_parameters(model: nn.Module) -> Iterator[None]:
    """Let every rank run as many forward passes of the model inside as it needs, gathered as the strategy says.

    Once, as `whole_parameters` does, or layer by layer: a device then holds one layer at a time, beside embeddings and
    head, and a rank that leaves early keeps answering those that still decode. All ranks have to enter and leave.
    Parameters must not be changed inside.

    Args:
        model: the policy, in eval mode and without gradients.

    Raises:
        UserError: if Lightning's own DeepSpeed strategy has partitioned it, or if it has to be gathered layer by layer
            and does not say what its layers are.
    """
    sharding = _sharding(model)
    if sharding is None:
        yield
        return
    layerwise = layer_by_layer(model)
    if _told.get(model) != layerwise:
        _told[model] = layerwise
        log.info("rollouts gather the policy %s", "layer by layer" if layerwise else "once")
    with sharding.layerwise(model) if layerwise else sharding.whole(model):
        yield


def _sharding(model: nn.Module) -> Any:
    """Return the module here that knows how the model's parameters are spread, or None where they are not."""
    if zero3.is_partitioned(model):
        return zero3
    return fsdp2 if fsdp2.is_sharded(model) else None


def passes_meet(model: nn.Module) -> bool:
    """Whether every pass of the model is a meeting of all ranks, because its parameters are spread over them."""
    return _sharding(model) is not None
