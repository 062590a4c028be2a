from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import estimates
from torch import Tensor

from remax_lightning.functional import clipped_surrogate_loss, kl_loss, reinforce_loss

NAN = float("nan")


def make(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages and a ragged mask with one empty row, all `[5, 8]`."""
    generator = torch.Generator().manual_seed(seed)
    log_probs, noise, advantages = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([8, 3, 0, 1, 6])
    mask = torch.arange(8) < lengths[:, None]
    return log_probs.to(dtype), (log_probs + 0.7 * noise).to(dtype), advantages.to(dtype), mask


def test_reinforce_is_that_of_the_oracle() -> None:
    log_probs, _, advantages, mask = make()
    expected = estimates.reinforce_loss(log_probs.tolist(), advantages.tolist(), mask.tolist(), 7.0)
    assert reinforce_loss(log_probs, advantages, mask, 7.0).item() == pytest.approx(expected, rel=1e-12)
    assert reinforce_loss(log_probs, advantages, mask, torch.tensor(7)).item() == pytest.approx(expected)


@pytest.mark.parametrize("dual_clip", [None, 1.1, 3.0])
@pytest.mark.parametrize("clip_range", [0.2, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_surrogate_is_that_of_the_oracle(seed: int, clip_range: float, dual_clip: float | None) -> None:
    log_probs, old, advantages, mask = make(seed=seed)
    loss, clip_fraction = clipped_surrogate_loss(log_probs, old, advantages, mask, 7.0, clip_range, dual_clip)
    expected, expected_fraction = estimates.clipped_surrogate(
        log_probs.tolist(), old.tolist(), advantages.tolist(), mask.tolist(), 7.0, clip_range, dual_clip
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert clip_fraction.item() == pytest.approx(expected_fraction)
    assert 0 < expected_fraction < 1


def test_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    old = torch.zeros(1, 1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    far = torch.full((1, 1), 5.0)
    assert clipped_surrogate_loss(far, old, -2 * mask.float(), mask, 1.0, dual_clip=3.0).loss.item() == 6.0
    assert clipped_surrogate_loss(far, old, -2 * mask.float(), mask, 1.0).loss.item() > 290
    assert clipped_surrogate_loss(far, old, 2 * mask.float(), mask, 1.0, dual_clip=3.0).loss.item() == (
        pytest.approx(-2.4)
    )


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("clamp", [None, 0.3])
def test_kl_loss_is_that_of_the_oracle(estimator: Any, clamp: float | None) -> None:
    log_ratio, _, _, mask = make()
    expected = sum(estimates.kl_estimate(log_ratio[i, t].item(), estimator, clamp) for i, t in mask.nonzero().tolist())
    assert kl_loss(log_ratio, mask, 7.0, estimator, clamp).item() == pytest.approx(expected / 7, rel=1e-12)


def losses(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "reinforce": reinforce_loss(log_probs, advantages, mask, 7.0),
        "surrogate": clipped_surrogate_loss(log_probs, old, advantages, mask, 7.0, 0.2, 3.0).loss,
        "k2": kl_loss(log_probs - old, mask, 7.0, "k2"),
        "k3": kl_loss(log_probs - old, mask, 7.0, "k3", clamp=10.0),
    }


NAMES = ["reinforce", "surrogate", "k2", "k3"]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_numerical_gradient(name: str) -> None:
    log_probs, old, advantages, mask = make()
    log_probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses(x, old, advantages, mask)[name], log_probs)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_passes_through_advantages_and_old_log_probs(name: str) -> None:
    log_probs, old, advantages, mask = make()
    old, advantages = old.requires_grad_(), advantages.requires_grad_()
    if name in ("k2", "k3"):
        old = old.detach()
    loss = losses(log_probs.requires_grad_(), old, advantages, mask)[name]
    loss.backward()
    assert advantages.grad is None
    assert old.grad is None
    assert log_probs.grad is not None
    assert log_probs.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [NAN, float("inf"), float("-inf")])
def test_what_is_masked_reaches_neither_loss_nor_gradient(name: str, garbage: float) -> None:
    log_probs, old, advantages, mask = make()
    clean = log_probs.clone().requires_grad_()
    losses(clean, old, advantages, mask)[name].backward()
    dirty = torch.where(mask, log_probs, garbage).requires_grad_()
    loss = losses(dirty, torch.where(mask, old, garbage), torch.where(mask, advantages, garbage), mask)[name]
    loss.backward()
    assert loss.item() == losses(log_probs, old, advantages, mask)[name].item()
    assert dirty.grad is not None
    assert clean.grad is not None
    assert torch.equal(dirty.grad, clean.grad)


@pytest.mark.parametrize("name", NAMES)
def test_empty_mask_gives_zero(name: str) -> None:
    garbage = torch.full((2, 3), NAN, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for normalizer in (0.0, torch.tensor(0), 5.0):
        garbage.grad = None
        loss = {
            "reinforce": lambda n: reinforce_loss(garbage, garbage, mask, n),
            "surrogate": lambda n: clipped_surrogate_loss(garbage, garbage, garbage, mask, n).loss,
            "k2": lambda n: kl_loss(garbage, mask, n, "k2"),
            "k3": lambda n: kl_loss(garbage, mask, n, "k3"),
        }[name](normalizer)
        loss.backward()
        assert loss.item() == 0.0
        assert garbage.grad is not None
        assert garbage.grad.abs().sum().item() == 0.0
    assert clipped_surrogate_loss(garbage, garbage, garbage, mask, 0.0).clip_fraction.item() == 0.0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_a_ratio_beyond_float32_leaves_loss_and_gradient_finite(advantage: float, log_ratio: float) -> None:
    log_probs = torch.full((1, 1), log_ratio, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = clipped_surrogate_loss(log_probs, torch.zeros(1, 1), torch.full((1, 1), advantage), mask, 1.0).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert log_probs.grad is not None
    assert torch.isfinite(log_probs.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_computed_in_float32(name: str) -> None:
    log_probs, _, advantages, mask = make(torch.bfloat16)
    # Old log-probs of 0: the difference that the KL losses take is then exact in bfloat16.
    old = torch.zeros_like(log_probs)
    half = losses(log_probs, old, advantages, mask)[name]
    single = losses(log_probs.float(), old.float(), advantages.float(), mask)[name]
    assert half.dtype == torch.float32
    assert half.item() == single.item() != 0.0


def test_wrong_shapes_are_refused() -> None:
    log_probs, old, advantages, mask = make()
    with pytest.raises(ValueError, match=r"log_probs must have shape \[S, R\] = \[any, any\], got \[8\]"):
        reinforce_loss(log_probs[0], advantages[0], mask[0], 1.0)
    with pytest.raises(ValueError, match=r"advantages must have shape \[S, R\] = \[5, 8\], got \[5, 7\]"):
        reinforce_loss(log_probs, advantages[:, :7], mask, 1.0)
    with pytest.raises(ValueError, match=r"old_log_probs must have shape \[S, R\] = \[5, 8\], got \[5, 1\]"):
        clipped_surrogate_loss(log_probs, old[:, :1], advantages, mask, 1.0)
    with pytest.raises(ValueError, match=r"mask must have shape \[S, R\] = \[5, 8\], got \[4, 8\]"):
        kl_loss(log_probs, mask[:4], 1.0, "k2")
    with pytest.raises(ValueError, match=r"mask must be of dtype torch.bool, got torch.float32"):
        reinforce_loss(log_probs, advantages, mask.float(), 1.0)


@pytest.mark.parametrize("clip_range", [0.0, 1.0, -0.2])
def test_wrong_clip_range_is_refused(clip_range: float) -> None:
    log_probs, old, advantages, mask = make()
    with pytest.raises(ValueError, match=r"clip_range must be above 0 and below 1, got"):
        clipped_surrogate_loss(log_probs, old, advantages, mask, 1.0, clip_range)


def test_wrong_dual_clip_and_estimator_are_refused() -> None:
    log_probs, old, advantages, mask = make()
    with pytest.raises(ValueError, match=r"dual_clip must be above 1 or None, got 1.0"):
        clipped_surrogate_loss(log_probs, old, advantages, mask, 1.0, dual_clip=1.0)
    with pytest.raises(ValueError, match=r"estimator must be k2 or k3 for a loss .* got k1"):
        kl_loss(log_probs, mask, 1.0, "k1")
    with pytest.raises(ValueError, match=r"estimator must be one of k1, k2, k3, got 'k4'"):
        kl_loss(log_probs, mask, 1.0, "k4")  # type: ignore[arg-type]
