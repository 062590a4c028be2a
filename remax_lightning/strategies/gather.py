"""Create a policy as its strategy shards it, and gather it, to read its parameters or for rollouts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from remax_lightning.errors import UserError
from remax_lightning.sharding import is_fsdp2_root, is_zero3_sharded
from remax_lightning.strategies import fsdp2, zero3
from remax_lightning.strategies.gather_mode import uses_layerwise_gather

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

log = logging.getLogger(__name__)


@contextmanager
def sharded_init(strategy: Any, *, from_scratch: bool = False, key: str = "model.policy") -> Iterator[None]:
    """Let `from_pretrained` shard the weights as it loads them, where the strategy is ZeRO-3.

    Args:
        strategy: the strategy of the trainer.
        from_scratch: whether the weights are random instead of loaded.
        key: the configuration key of the model, for messages.

    Raises:
        UserError: if ZeRO-3 would start from random weights, which differ from those of one process.
    """
    if not _is_zero3(strategy):
        yield
        return
    if from_scratch:
        raise UserError(
            f"{key}.from_scratch must be false under ZeRO-3, got true: each rank would draw other weights than"
            " one process does; save a random model first, or train from scratch under DDP or ZeRO-2"
        )
    # ---- ZeRO-3 shards while it loads, so that no rank ever holds the whole model ----
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # transformers keeps a weak reference to this object, and shards models while the object lives.
    config = HfDeepSpeedConfig(strategy.config)
    try:
        with strategy.precision_plugin.tensor_init_context():  # Lightning does not enter it under ZeRO-3
            yield
    finally:
        del config


@contextmanager
def unsharded_init(strategy: Strategy) -> Iterator[None]:
    """Create models that ZeRO-3 does not shard: full on every rank, in the precision of the run.

    Every forward pass of a sharded model is a collective, which frozen models do not need.
    """
    if not _is_zero3(strategy):
        yield
        return
    # Lightning has an outer `zero.Init` active in `configure_model`; the dtype of the run is set anew.
    with zero3.zero_init_disabled(), strategy.precision_plugin.tensor_init_context():
        yield


def _is_zero3(strategy: Strategy) -> bool:
    return isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3


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


def full_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the full value of each parameter of the policy; every rank has to run to the end.

    No device holds more than one full parameter beside its shards.

    Raises:
        UserError: if Lightning's DeepSpeed strategy sharded it.
    """
    engine = _sharding_engine(model)
    if engine is not None:
        return engine.full_values(model)  # type: ignore[no-any-return]
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


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
    # Logged once, and again where the choice changes with the free memory.
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
