from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import estimates

from remax_lightning.functional import kl_estimate

ESTIMATORS = ["k1", "k2", "k3"]


@pytest.mark.parametrize("clamp", [None, 10.0, 0.5])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimate_is_that_of_the_oracle(estimator: Any, clamp: float | None) -> None:
    log_ratio = 3 * torch.randn(6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [[estimates.kl_estimate(x, estimator, clamp) for x in row] for row in log_ratio.tolist()]
    torch.testing.assert_close(kl_estimate(log_ratio, estimator, clamp), torch.tensor(expected, dtype=torch.float64))
    single = kl_estimate(log_ratio.float(), estimator, clamp)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_k3_keeps_its_digits_near_zero() -> None:
    # In float32, exp(-x) - 1 + x is 0 or 6e-8 here; the true value is x^2 / 2 = 5e-9.
    assert kl_estimate(torch.tensor(1e-4), "k3").item() == pytest.approx(5e-9, rel=1e-2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("log_ratio", [-1e4, 1e4, float("-inf"), float("inf")])
def test_clamped_estimates_stay_finite_with_their_gradient(estimator: Any, log_ratio: float) -> None:
    value = torch.tensor(log_ratio, requires_grad=True)
    estimate = kl_estimate(value, estimator, clamp=10.0)
    assert estimate.item() == (10.0 if estimator != "k1" or log_ratio > 0 else -10.0)
    (gradient,) = torch.autograd.grad(estimate, value)
    # k2 of an infinite ratio has the gradient 0 * inf whatever is done; finite ratios are what a policy can give.
    if torch.isfinite(value):
        assert gradient.item() == 0.0


def test_without_a_clamp_nothing_is_bounded() -> None:
    assert kl_estimate(torch.tensor(-50.0), "k3").item() == pytest.approx(5.184706e21, rel=1e-5)
    assert kl_estimate(torch.tensor(-100.0), "k1").item() == -100.0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_is_numerical_gradient(estimator: Any) -> None:
    log_ratio = torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, estimator), log_ratio)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bfloat16_is_computed_in_float32(estimator: Any) -> None:
    log_ratio = torch.randn(50, generator=torch.Generator().manual_seed(3)).bfloat16()
    estimate = kl_estimate(log_ratio, estimator)
    assert estimate.dtype == torch.float32
    assert torch.equal(estimate, kl_estimate(log_ratio.float(), estimator))


def test_unknown_estimator_and_clamp_are_refused() -> None:
    with pytest.raises(ValueError, match=r"estimator must be one of k1, k2, k3, got 'k4'"):
        kl_estimate(torch.zeros(1), "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"clamp must be above 0 or None, got 0"):
        kl_estimate(torch.zeros(1), "k1", clamp=0.0)
