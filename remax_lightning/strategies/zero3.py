"""Everything of DeepSpeed that is not its public interface, in one place: ZeRO-3's hooks and its record of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from remax_lightning.errors import UserError

_offloads: WeakKeyDictionary[nn.Module, ref[Any]] = WeakKeyDictionary()
"""What partitions a module's parameters; weakly, because it holds the module."""


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has spread the model's parameters over the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def remember(root: nn.Module, engine: Any) -> None:
    """Note what partitions the modules under `root`, so that `whole` finds it from any of them.

    Args:
        root: what the engine was made of.
        engine: the DeepSpeed engine. Without an optimizer, as in validation alone, its optimizer is the offload itself.
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    for module in root.modules():
        _offloads[module] = ref(offload)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gather the model's parameters once, and take ZeRO-3's hooks off the whole module tree inside.

    With its hooks on, every forward pass is a collective even on gathered parameters, and a rank whose responses end
    early would leave the others waiting in it.

    Raises:
        UserError: if the parameters are partitioned by an engine that is not ours.
    """
    import deepspeed

    known = _offloads.get(model)
    offload = known() if known is not None else None
    if offload is None:
        raise UserError(
            "trainer.strategy partitions the policy (ZeRO-3) in a way that rollouts cannot gather; take"
            " remax_lightning.strategies.ReMaxDeepSpeedStrategy, which has the arguments of Lightning's"
        )
    # Gathering passes by a parameter that a hook has begun to fetch ahead, and would leave it empty.
    offload.partition_all_parameters()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        _take_hooks_off(offload)
        try:
            yield
        finally:
            _put_hooks_on(offload)


def _take_hooks_off(offload: Any) -> None:
    for hook in [*offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def _put_hooks_on(offload: Any) -> None:
    # The order of modules that was recorded for prefetching numbers them as the old hooks did.
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    offload._register_deepspeed_module(offload.module)


@contextmanager
def not_partitioning() -> Iterator[None]:
    """Build plain modules inside, although a `zero.Init` is open around."""
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()
