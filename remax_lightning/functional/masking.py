"""Which tokens of a response count, means over them, and the checks of arguments that this folder shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    # None stands for a size that the function does not know beforehand.
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


def response_mask(response_ids: Tensor, eos_ids: Sequence[int], stopped_at: Tensor | None = None) -> Tensor:
    """Return True through the first end-of-sequence token, that one included, or through the end of a stop string.

    The mask asks where the first EOS stands and not where the padding is, so that EOS is trained also when
    the tokenizer pads with it.

    Args:
        response_ids: `[M, R]` token ids, padded on the right.
        eos_ids: token ids that end a response; with none, every token counts.
        stopped_at: `[M]` tokens of a response that something else has ended, 0 of the others; None for no such end.

    Returns:
        `[M, R]` bool; all True in a row without an end, which is one that the length limit cut.

    Raises:
        ValueError: if `response_ids` is not two-dimensional, or `stopped_at` not as long.
    """
    check_shape("response_ids", response_ids, "[M, R]", (None, None))
    # True on every EOS, [M, R].
    ends = torch.isin(response_ids, torch.tensor(list(eos_ids), dtype=response_ids.dtype, device=response_ids.device))
    ends_before = ends.cumsum(dim=1) - ends.long()  # [M, R], ends before each token
    if stopped_at is None:
        return ends_before == 0
    check_shape("stopped_at", stopped_at, "[M]", response_ids.shape[:1])
    # What stands after a stop string is padding, whose id may be that of an end.
    place = torch.arange(response_ids.shape[1], device=response_ids.device)
    length = stopped_at.where(stopped_at > 0, response_ids.shape[1])  # [M]
    return (ends_before == 0) & (place < length[:, None])


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Return the sum of `values` where `mask` is True, in float32 (float64 for float64).

    Args:
        values: any shape; what stands outside the mask may be infinite or NaN and reaches neither sum nor
            gradient.
        mask: bool of the same shape.
        dim: dimension to sum over; all of them by default.

    Raises:
        ValueError: if the shapes differ or `mask` is not boolean.
    """
    check_mask("mask", mask, "values.shape", values.shape)
    # Not `values * mask`: 0 * NaN is NaN, in the sum and in the gradient.
    masked_values = torch.where(mask, values.to(compute_dtype(values)), 0.0)
    return masked_values.sum() if dim is None else masked_values.sum(dim=dim)


def safe_divide(total: Tensor, normalizer: Tensor | float) -> Tensor:
    """Return `total / normalizer`; a normalizer of 0 (no token counted, so `total` is 0) divides by 1."""
    # The divisor is replaced, not the result: a quotient of 0 / 0 would leave NaN in the gradient.
    divisor = torch.as_tensor(normalizer, dtype=total.dtype, device=total.device)
    return total / torch.where(divisor == 0, 1.0, divisor)


def masked_mean(
    values: Tensor, mask: Tensor, normalizer: Tensor | float | None = None, dim: int | None = None
) -> Tensor:
    """Return the mean of `values` where `mask` is True, in float32 (float64 for float64); 0 if nothing is.

    Args:
        values: any shape.
        mask: bool of the same shape.
        normalizer: what the sum is divided by, instead of the number of True entries: a scalar, or of the
            shape of the result.
        dim: dimension to average over; all of them by default.

    Raises:
        ValueError: if the shapes differ or `mask` is not boolean.
    """
    total = masked_sum(values, mask, dim)
    if normalizer is None:
        normalizer = mask.sum() if dim is None else mask.sum(dim=dim)
    return safe_divide(total, normalizer)
