"""The loss over pairs against a float64 loop over them, and its gradient against the formula of a derivative."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from remax_lightning.functional import bradley_terry_loss

CHOSEN = [1.5, -0.25, 0.0, 3.0, -40.0, 600.0]
REJECTED = [0.5, 0.75, 0.0, -2.0, 40.0, -600.0]
MARGINS = [0.0, 1.0, 0.5, 0.25, 2.0, 0.0]


def by_hand(chosen: list[float], rejected: list[float], margins: list[float], coef: float, normalizer: float) -> float:
    """One pair after the other; the logarithm in the form that does not overflow."""
    total = 0.0
    for first, second, margin in zip(chosen, rejected, margins, strict=True):
        ahead = first - second - margin
        total += math.log1p(math.exp(-ahead)) if ahead > 0 else math.log1p(math.exp(ahead)) - ahead
        total += coef * (first + second) * (first + second)
    return total / normalizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalizer", [6, 2.5])
@pytest.mark.parametrize("coef", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("margin", ["none", "number", "pairs"])
def test_the_loss_is_the_sum_over_pairs(margin: str, coef: float, normalizer: float, dtype: torch.dtype) -> None:
    margins = {"none": [0.0] * 6, "number": [0.7] * 6, "pairs": MARGINS}[margin]
    given: Any = {"none": {}, "number": {"margin": 0.7}, "pairs": {"margin": torch.tensor(MARGINS)}}[margin]
    chosen, rejected = torch.tensor(CHOSEN, dtype=dtype), torch.tensor(REJECTED, dtype=dtype)
    loss = bradley_terry_loss(chosen, rejected, normalizer, centering_coef=coef, **given)
    expected = by_hand(CHOSEN, REJECTED, margins, coef, normalizer)
    assert loss.dtype == dtype
    assert float(loss) == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 and margin != "pairs" else 1e-6)


def test_the_gradient_is_the_derivative() -> None:
    chosen = torch.tensor(CHOSEN, dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor(REJECTED, dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(chosen, rejected, 4, torch.tensor(MARGINS, dtype=torch.float64), 0.1).backward()
    for i, (first, second, margin) in enumerate(zip(CHOSEN, REJECTED, MARGINS, strict=True)):
        ahead = first - second - margin
        wrong = 1 / (1 + math.exp(ahead)) if ahead < 500 else 0.0
        center = 2 * 0.1 * (first + second)
        assert chosen.grad is not None
        assert rejected.grad is not None
        assert float(chosen.grad[i]) == pytest.approx((center - wrong) / 4, abs=1e-12)
        assert float(rejected.grad[i]) == pytest.approx((center + wrong) / 4, abs=1e-12)


def test_a_constant_moves_the_centring_alone() -> None:
    chosen, rejected = torch.tensor(CHOSEN), torch.tensor(REJECTED)
    plain = bradley_terry_loss(chosen, rejected, 6)
    torch.testing.assert_close(bradley_terry_loss(chosen + 5, rejected + 5, 6), plain)
    assert bradley_terry_loss(chosen + 5, rejected + 5, 6, centering_coef=0.1) > plain + 1


def test_half_precision_is_computed_in_float32() -> None:
    chosen, rejected = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([0.5], dtype=torch.bfloat16)
    loss = bradley_terry_loss(chosen, rejected, 1)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(by_hand([1.0], [0.5], [0.0], 0.0, 1), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rejected": torch.zeros(3)}, r"rejected must have shape \[B\] = \[2\], got \[3\]"),
        ({"chosen": torch.zeros(2, 1)}, r"chosen must have shape \[B\] = \[any\], got \[2, 1\]"),
        ({"margin": torch.zeros(1)}, r"margin must have shape \[B\] = \[2\], got \[1\]"),
        ({"centering_coef": -0.1}, "centering_coef must be 0 or more, got -0.1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Tensor | float] = {"chosen": torch.zeros(2), "rejected": torch.zeros(2), "normalizer": 2}
    with pytest.raises(ValueError, match=message):
        bradley_terry_loss(**(given | arguments))
