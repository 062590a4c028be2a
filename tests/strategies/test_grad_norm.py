"""The norm of the gradient on one process; tests/distributed/test_invariance.py has those of several."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch

from remax_lightning.strategies import global_grad_norm


class Alone:
    """What `global_grad_norm` reads of a trainer of one process."""

    class strategy:  # noqa: N801
        root_device = torch.device("cpu")


def norm_of(*gradients: list[float] | None, dtype: torch.dtype = torch.float32) -> float:
    parameters = [torch.nn.Parameter(torch.zeros(len(gradient or [0]), dtype=dtype)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient, dtype=dtype)
    half = len(parameters) // 2
    optimizer = torch.optim.SGD([{"params": parameters[:half]}, {"params": parameters[half:], "lr": 0.2}], lr=0.1)
    return float(cast(Any, global_grad_norm(cast(Any, Alone()), optimizer)))


def test_it_is_that_of_all_groups_together() -> None:
    assert norm_of([3.0, 0.0], [4.0], None, [12.0, 0.0]) == pytest.approx(13.0)
    assert norm_of(None, None) == 0.0


def test_it_neither_rounds_nor_overflows_in_16_bits() -> None:
    values = [1.0] * 1000
    assert norm_of(values, values, dtype=torch.bfloat16) == pytest.approx(math.sqrt(2000), rel=1e-6)
    assert norm_of([60000.0] * 4, [0.0], dtype=torch.float16) == pytest.approx(120000.0, rel=1e-3)
    assert norm_of([1e30], [1e30]) == pytest.approx(math.sqrt(2) * 1e30, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_entry_that_is_not_finite_shows(bad: float) -> None:
    assert not math.isfinite(norm_of([1.0, 2.0], [bad]))
