"""Estimates of KL(policy || reference) from the log-probs of the sampled tokens alone."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from remax_lightning.functional._checks import check_argument, check_choice, compute_dtype

KLEstimator: TypeAlias = Literal["k1", "k2", "k3"]
"""How KL is estimated: the log-ratio, half its square, or the unbiased estimate that is never negative."""


def kl_estimate(log_ratio: Tensor, estimator: KLEstimator, clamp: float | None = None) -> Tensor:
    """Return an estimate of KL(policy || reference) per token, in nats.

    `k1 = log_ratio`, `k2 = log_ratio² / 2`, `k3 = exp(-log_ratio) - 1 + log_ratio`. Over tokens sampled from
    the policy, k1 and k3 are unbiased, k2 is not but has the least variance (Schulman 2020, "Approximating KL
    Divergence").

    Args:
        log_ratio: any shape, log-prob under the policy minus log-prob under the reference, in nats.
        estimator: which of the three.
        clamp: the estimate is kept between `-clamp` and `clamp`; None leaves it as it is, and so unbiased.

    Returns:
        float32 of the same shape (float64 for float64); differentiable.

    Raises:
        ValueError: if `estimator` is unknown or `clamp` is not above 0.
    """
    check_choice("estimator", estimator, get_args(KLEstimator))
    check_argument(clamp is None or clamp > 0, "clamp", "above 0 or None", clamp)
    log_ratio = log_ratio.to(compute_dtype(log_ratio))
    if estimator == "k1":
        estimate = log_ratio
    elif estimator == "k2":
        estimate = 0.5 * log_ratio.square()
    else:
        if clamp is not None:
            # The clamp below hides an overflow of exp from the value, not from the gradient, which would be 0
            # * inf = NaN. So the log-ratio stops where exp is still finite, far beyond any clamp of the
            # estimate.
            log_ratio = log_ratio.clamp(min=-math.floor(math.log(torch.finfo(log_ratio.dtype).max)))
        # expm1 keeps the digits that exp(x) - 1 loses near 0, where a policy close to its reference lives.
        estimate = torch.expm1(-log_ratio) + log_ratio
    return estimate if clamp is None else estimate.clamp(-clamp, clamp)
