"""Gather a sharded policy, to read its parameters or for rollouts, under any strategy."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from remax_lightning.sharding import is_fsdp2_root, is_zero3_sharded
from remax_lightning.strategies import fsdp2, zero3
from remax_lightning.strategies.gather_mode import uses_layerwise_gather

log = logging.getLogger(__name__)

_logged_modes: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def full_parameters(model: nn.Module) -> Iterator[None]:
    """Unshard the parameters of the model on every rank inside, so that forward passes need no communication.

    Parameters are gathered once, at the start, so each rank may run as many forward passes as it needs. All ranks have
    to enter and leave. Every device needs memory for the full model. Nothing happens if parameters are not sharded
    (one process, DDP, ZeRO-1 and ZeRO-2). Parameters must not be changed inside.

    Args:
        model: the policy.

    Raises:
        UserError: if Lightning's DeepSpeed strategy sharded it.
    """
    engine = _sharding_engine(model)
    if engine is None:
        yield
        return
    with engine.unsharded(model):
        yield


@contextmanager
def rollout_parameters(model: nn.Module) -> Iterator[None]:
    """Let every rank run as many forward passes of the model as it needs, gathered as the strategy's `gather` says.

    The model is gathered once, as in `full_parameters`, or layer by layer. In the second case a device holds one layer
    at a time, besides embeddings and head, and a rank that finishes early keeps gathering layers for ranks that still
    decode. All ranks have to enter and leave. Parameters must not be changed inside.

    Args:
        model: the policy, in eval mode and without gradients.

    Raises:
        UserError: if Lightning's DeepSpeed strategy sharded it, or if `gather` is `layerwise` and the model
            does not name its layers.
    """
    engine = _sharding_engine(model)
    if engine is None:
        yield
        return
    layerwise = uses_layerwise_gather(model)
    if _logged_modes.get(model) != layerwise:
        _logged_modes[model] = layerwise
        log.info("rollouts gather the policy %s", "layer by layer" if layerwise else "once")
    with engine.layerwise(model) if layerwise else engine.unsharded(model):
        yield


def forward_is_collective(model: nn.Module) -> bool:
    """Whether every forward pass of the model communicates with all ranks, because its parameters are sharded."""
    return _sharding_engine(model) is not None


def _sharding_engine(model: nn.Module) -> Any:
    """Return the module `zero3` or `fsdp2` for a sharded model; None if it is not sharded."""
    if is_zero3_sharded(model):
        return zero3
    # A frozen model may contain FSDP2 groups without being one; `FrozenModel` gathers those.
    return fsdp2 if is_fsdp2_root(model) else None
