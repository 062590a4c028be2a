"""Contexts for creating models: the policy sharded by its strategy, frozen models unsharded on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import DeepSpeedStrategy

from remax_lightning.errors import UserError
from remax_lightning.strategies import zero3

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


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
    with zero3.zero_init_disabled(), strategy.precision_plugin.tensor_init_context():
        yield


def _is_zero3(strategy: Strategy) -> bool:
    return isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
