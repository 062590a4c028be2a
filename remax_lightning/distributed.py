"""Communication between ranks: sums, maxima, gathered objects, broadcasts, and errors that every rank raises.

This is the only file that calls a collective; a test looks for others. Every function also works on one process, with
and without a process group. Two families differ in what they go through:

- Functions of a trainer or a strategy go through Lightning's `Strategy`, which knows the device to communicate on.
- `reduce_over_ranks` and `gather_objects` go to the default process group, for code that runs below a trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from remax_lightning.errors import RankError, RankUserError, UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

T = TypeVar("T")


# ---- The process group ----


def has_process_group() -> bool:
    """Whether this process has joined a process group, be it alone in it."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def num_ranks() -> int:
    """Return the number of ranks in the process group, 1 without one."""
    return torch.distributed.get_world_size() if has_process_group() else 1


def rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return torch.distributed.get_rank() if has_process_group() else 0


def leave_process_group() -> None:
    """Destroy the process group, if there is one."""
    if has_process_group():
        torch.distributed.destroy_process_group()


def reduce_over_ranks(tensor: Tensor, operation: Literal["sum", "max", "min"]) -> Tensor:
    """Reduce a tensor over all ranks in place, and return it.

    The call is asynchronous on CUDA: only a reader of the value makes the host wait for the device.

    Args:
        tensor: of the same shape and dtype on every rank, on a device that the process group's backend supports.
        operation: how the values of the ranks are combined.
    """
    if has_process_group():
        operations = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX,
                      "min": torch.distributed.ReduceOp.MIN}  # fmt: skip
        torch.distributed.all_reduce(tensor, operations[operation])
    return tensor


def gather_objects(value: T) -> list[T]:
    """Return the value of every rank, by rank and the same list on each; values may be anything that pickles."""
    if not has_process_group():
        return [value]
    values: list[Any] = [None] * num_ranks()  # filled in by the collective
    torch.distributed.all_gather_object(values, value)
    return values


# ---- Through Lightning's strategy ----


def broadcast(strategy: Strategy, value: T, src: int = 0) -> T:
    """Return the value that rank `src` has, on every rank; it may be anything that pickles."""
    return strategy.broadcast(value, src=src)


def barrier(strategy: Strategy, name: str) -> None:
    """Wait until every rank has come here; `name` appears in error messages of some backends."""
    strategy.barrier(name)


def sum_tensor_over_ranks(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, the same on every rank."""
    return cast(Tensor, trainer.strategy.reduce(tensor, reduce_op="sum"))


def sum_over_ranks(trainer: Trainer, values: Sequence[float]) -> list[float]:
    """Return the sum of each value over all ranks, in float64; the same list on every rank."""
    return _reduce_numbers(trainer, values, "sum")


def max_over_ranks(trainer: Trainer, values: Sequence[float]) -> list[float]:
    """Return the largest of each value over all ranks, in float64; the same list on every rank."""
    return _reduce_numbers(trainer, values, "max")


def _reduce_numbers(trainer: Trainer, values: Sequence[float], operation: str) -> list[float]:
    if trainer.world_size == 1:
        return [float(value) for value in values]
    # NCCL reduces tensors on the accelerator only.
    local = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    reduced = trainer.strategy.reduce(local, reduce_op=operation)
    return cast("list[float]", cast("Tensor", reduced).tolist())


def gather_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """Return the values (`[M]`, finite, `M` may differ by rank) of all ranks in one CPU float64 tensor."""
    values = values.double()
    if trainer.world_size == 1:
        return values.cpu()
    # Ranks may have different numbers of values.
    longest = int(max_over_ranks(trainer, [values.numel()])[0])
    if longest == 0:
        return values.cpu()
    # Collectives need one length on all ranks: pad with NaN, and drop the NaNs afterwards.
    padded = torch.full((longest,), torch.nan, dtype=torch.float64, device=trainer.strategy.root_device)
    padded[: values.numel()] = values.to(padded.device)
    gathered = trainer.strategy.all_gather(padded).cpu().flatten()  # [ranks * longest]
    return gathered[~gathered.isnan()]


def rows_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """Return `[ranks * S, R]` the rows of all ranks, as wide as the widest, with 0 where a rank has fewer columns."""
    width = int(max_over_ranks(trainer, [values.shape[1]])[0])
    rows = torch.nn.functional.pad(values.double().cpu(), (0, width - values.shape[1]))
    return gather_over_ranks(trainer, rows.flatten()).view(-1, width)


# ---- Errors ----


@contextmanager
def raise_on_all_ranks(trainer: Trainer) -> Iterator[None]:
    """Raise an exception of one rank on every rank, with its message.

    Without this, the other ranks would wait for the failed one until a timeout, or end with an unrelated error. One
    number is exchanged at the end of the block. Inside, no rank may wait for others after a point where one may raise.
    Nothing happens on one process, nor outside of fit, where ranks may have different numbers of batches.

    Raises:
        RankUserError: if a rank has raised a `UserError`.
        RankError: if a rank has raised anything else.
    """
    from lightning.pytorch.trainer.states import TrainerFn  # late: importing rewards must not load Lightning

    if trainer.world_size == 1 or trainer.state.fn != TrainerFn.FITTING:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except (RankUserError, RankError):
        raise  # from `agree_on_errors`: every rank has it already
    except Exception as error:
        failure = error
    # 0 says that a rank is fine, so that the maximum over ranks finds one that is not.
    failed_rank = int(max_over_ranks(trainer, [0 if failure is None else trainer.global_rank + 1])[0]) - 1
    if failed_rank < 0:
        return
    # Text travels, not the exception: it may hold what cannot be pickled.
    is_user_error, message = broadcast(trainer.strategy, _describe(failure), src=failed_rank)
    error_type = RankUserError if is_user_error else RankError
    raise error_type(f"rank {failed_rank}: {message}") from failure


@contextmanager
def agree_on_errors() -> Iterator[None]:
    """Raise an exception of one rank on every rank of the process group, for code below a trainer.

    All ranks have to enter and leave. As in `raise_on_all_ranks`, no rank may wait for others inside after a point
    where one may raise: a block ends where ranks begin to wait for each other again.

    Raises:
        RankUserError: if a rank has raised a `UserError`.
        RankError: if a rank has raised anything else.
    """
    if num_ranks() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except (RankUserError, RankError):
        raise
    except Exception as error:
        failure = error
    descriptions = gather_objects(None if failure is None else _describe(failure))
    for failed_rank, description in enumerate(descriptions):
        if description is not None:
            is_user_error, message = description
            error_type = RankUserError if is_user_error else RankError
            raise error_type(f"rank {failed_rank}: {message}") from failure


def _describe(failure: Exception | None) -> tuple[bool, str]:
    """Return whether the failure is a mistake of the user, and its message."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    is_user_error = isinstance(failure, UserError | MisconfigurationException)
    return is_user_error, str(failure) if is_user_error else f"{type(failure).__name__}: {failure}"
