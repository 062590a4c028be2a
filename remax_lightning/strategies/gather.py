"""Reading a policy whole, whatever the strategy has done with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from remax_lightning.strategies import fsdp2, zero3


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
    if zero3.is_partitioned(model):
        with zero3.whole(model):
            yield
    elif fsdp2.is_sharded(model):
        with fsdp2.whole(model):
            yield
    else:
        yield


def passes_meet(model: nn.Module) -> bool:
    """Whether every pass of the model is a meeting of all ranks, because its parameters are spread over them."""
    return zero3.is_partitioned(model) or fsdp2.is_sharded(model)
