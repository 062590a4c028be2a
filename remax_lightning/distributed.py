"""One rank's failure is everybody's: the others would wait for it for ever, or end with a message that says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from remax_lightning.errors import RankError, RankUserError, UserError


@contextmanager
def together(trainer: Trainer) -> Iterator[None]:
    """Raise on every rank what one of them raises inside, with its message.

    One number is exchanged at the end. Inside, a rank must not wait for others after a point where one may raise.
    Nothing happens on one process, nor outside of fit, where ranks need not take as many batches.

    Raises:
        RankUserError: if a rank has raised a `UserError`.
        RankError: if a rank has raised anything else.
    """
    if trainer.world_size == 1 or trainer.state.fn != TrainerFn.FITTING:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = max_over_ranks(trainer, [0 if failure is None else trainer.global_rank + 1])[0] - 1
    if failed < 0:
        return
    is_mistake, message = trainer.strategy.broadcast(_told(failure), src=failed)
    kind = RankUserError if is_mistake else RankError
    raise kind(f"rank {failed}: {message}") from failure


def max_over_ranks(trainer: Trainer, values: list[int]) -> list[int]:
    """Return the largest of each value over all ranks, the same list on every rank."""
    if trainer.world_size == 1:
        return values
    largest = trainer.strategy.reduce(torch.tensor(values, device=trainer.strategy.root_device), reduce_op="max")
    return [int(value) for value in largest]


def _told(failure: Exception | None) -> tuple[bool, str]:
    is_mistake = isinstance(failure, UserError | MisconfigurationException)
    return is_mistake, str(failure) if is_mistake else f"{type(failure).__name__}: {failure}"
