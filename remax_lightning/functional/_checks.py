"""Entry checks and the choice of precision, shared by the functions of this folder."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any of `tensors` is float64, else float32: half precision is never computed in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_shape(name: str, tensor: Tensor, letters: str, expected: Iterable[int | None]) -> None:
    """Refuse `tensor` unless its shape is `expected`, None for any size; `letters` is the shape in words.

    Raises:
        ValueError: naming the argument, the expected shape and the shape it has.
    """
    sizes = tuple(expected)
    shape = tuple(tensor.shape)
    if len(shape) == len(sizes) and all(want in (None, have) for want, have in zip(sizes, shape, strict=True)):
        return
    known = ", ".join("any" if size is None else str(size) for size in sizes)
    raise ValueError(f"{name} must have shape {letters} = [{known}], got {list(shape)}")


def check_mask(name: str, mask: Tensor, letters: str, expected: Iterable[int | None]) -> None:
    """Refuse `mask` unless it is boolean and of shape `expected`.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
    """
    check_shape(name, mask, letters, expected)
    # An integer mask would select rows instead of masking them in some torch functions.
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be of dtype torch.bool, got {mask.dtype}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse `value` unless it is one of `choices`.

    Raises:
        ValueError: naming the argument, the choices and the value.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_argument(holds: bool, name: str, expected: str, got: object) -> None:
    """Refuse the argument `name` unless `holds`.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
    """
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got}")
