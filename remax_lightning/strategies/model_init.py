"""Contexts in which models are built: the policy sharded by its strategy, frozen models unsharded on every rank."""

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
        strategy: the trainer's.
        from_scratch: whether there are no weights to load.
        key: the configuration key of the model, for messages.

    Raises:
        UserError: if ZeRO-3 were to start from random weights, which would differ from those of one process.
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

    # Transformers finds it through a weak reference. Once it is gone, models load unsharded.
    alive = HfDeepSpeedConfig(strategy.config)
    try:
        with strategy.precision_plugin.tensor_init_context():  # Lightning leaves it out under ZeRO-3
            yield
    finally:
        del alive


@contextmanager
def unsharded_init(strategy: Strategy) -> Iterator[None]:
    """Build models that ZeRO-3 does not shard: full on every rank, in the run's precision.

    Every forward pass of a sharded model is a collective, which a frozen model has no need for.
    """
    if not _is_zero3(strategy):
        yield
        return
    with zero3.zero_init_disabled(), strategy.precision_plugin.tensor_init_context():
        yield


def _is_zero3(strategy: Strategy) -> bool:
    return isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
