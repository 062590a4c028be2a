"""Estimates of the KL, losses with an explicit normalizer, and weights for responses that another engine drew.

The normalizer of a loss is given, not taken from the mask, so that it can be the number of response tokens of the whole
optimizer step over all ranks: the gradient then does not depend on how the step was split.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from remax_lightning.functional.masking import (
    check_argument,
    check_choice,
    check_mask,
    check_shape,
    compute_dtype,
    masked_mean,
    safe_divide,
)

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
    # With x = log pi - log pi_ref of a sampled token: E[x] = KL, so k1 is unbiased; k3 = e^-x - 1 + x adds e^-x - 1,
    # which has the mean 0.
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


MAX_LOG_RATIO = 20.0
"""Where the log of a probability ratio stops, in nats. Without it exp overflows, and the gradient of a token
that the clip rejects is 0 * inf = NaN; a ratio of e^20 is far outside any clip range."""


MismatchKind: TypeAlias = Literal["none", "tis", "mis"]
"""What becomes of the ratio of trained to drawn probability: nothing, or truncated or masked importance sampling."""
MismatchLevel: TypeAlias = Literal["token", "response"]
"""What a ratio is taken of: the probability of a token, or of a whole response."""


class Mismatch(NamedTuple):
    """The ratio of trained to drawn probability, and the weight of the gradient that is made of it; all detached.

    Args:
        weights: `[S, R]` what the gradient of each token is multiplied by; 1 outside the mask.
        ratio: `[S, R]` the ratio before it was truncated or masked: of the token or of its whole response; 1 outside
            the mask.
        cut: `[S, R]` bool, True on the tokens whose weight is not their ratio.
    """

    weights: Tensor
    ratio: Tensor
    cut: Tensor


def mismatch_weights(
    log_probs: Tensor,
    engine_log_probs: Tensor,
    mask: Tensor,
    kind: MismatchKind,
    level: MismatchLevel = "token",
    cap: float | None = 2.0,
    band: tuple[float, float] = (0.5, 5.0),
) -> Mismatch:
    """Return importance weights for responses that were drawn from other probabilities than those that are trained.

    A rollout engine with kernels of its own rounds otherwise than the trainer, and draws from `mu` instead of `pi`. For
    whole responses, `E_mu[pi(y) / mu(y) · f(y)] = E_pi[f(y)]`: untruncated, this weight gives the exact gradient. Its
    variance grows with the length of a response. The ratio of a token varies less, and leaves out that its prefix was
    drawn from `mu`, too. Truncation (`min(ratio, cap)`, Ionides 2008) and masking (0 outside of `band`, arXiv
    2510.18855) bound the variance and bias the gradient.

    Args:
        log_probs: `[S, R]` log-probs of the drawn tokens as the trainer computes them, before the first update on them.
        engine_log_probs: `[S, R]` log-probs of them under the engine that drew.
        mask: `[S, R]` bool, True on response tokens.
        kind: `tis` truncates the ratio at `cap`, `mis` drops what lies outside of `band`; `none` weighs with 1.
        level: the ratio of each `token`, or of the whole `response`.
        cap: largest weight of `tis`; None for no bound.
        band: smallest and largest ratio that `mis` keeps.

    Raises:
        ValueError: if the shapes differ, `mask` is not boolean, or a choice is unknown.
    """
    check_choice("kind", kind, get_args(MismatchKind))
    check_choice("level", level, get_args(MismatchLevel))
    ours, theirs = _zero_outside_mask(mask, log_probs=log_probs, engine_log_probs=engine_log_probs)
    log_ratio = (ours - theirs).detach()  # log pi / mu, [S, R]
    if level == "response":
        log_ratio = torch.where(mask, log_ratio.sum(-1, keepdim=True), 0.0)  # of all its tokens
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if kind == "tis" and cap is not None:
        weights = ratio.clamp(max=cap)
    elif kind == "mis":
        weights = torch.where((ratio >= band[0]) & (ratio <= band[1]), ratio, 0.0)
    else:
        weights = ratio if kind == "tis" else torch.ones_like(ratio)
    # Outside the mask the weight is 1, whatever the band: nothing is cut there.
    weights = torch.where(mask, weights, 1.0)
    return Mismatch(weights, ratio, mask & (weights != ratio) & (kind != "none"))


class SurrogateLoss(NamedTuple):
    """The clipped surrogate and how often it clipped.

    Args:
        loss: scalar, differentiable.
        clip_fraction: scalar between 0 and 1, share of the masked tokens whose gradient one of the clips cut;
            detached.
    """

    loss: Tensor
    clip_fraction: Tensor


def reinforce_loss(log_probs: Tensor, advantages: Tensor, mask: Tensor, normalizer: Tensor | float) -> Tensor:
    """Return `-Σ A · log π / normalizer` over the masked tokens: ReMax (Li et al. 2023, arXiv 2310.10505).

    Args:
        log_probs: `[S, R]` log-probs of the sampled tokens under the policy.
        advantages: `[S, R]`; no gradient passes through them.
        mask: `[S, R]` bool, True on response tokens; anything outside it, NaN too, has no effect.
        normalizer: what the sum is divided by, such as the response tokens in the optimizer step over all
            ranks.

    Returns:
        scalar float32 (float64 if an input is); 0 for an empty mask.

    Raises:
        ValueError: if the shapes differ or `mask` is not boolean.
    """
    # Selected, not multiplied by the mask: 0 * NaN is NaN, in the loss and in its gradient.
    log_probs, advantages = _zero_outside_mask(mask, log_probs=log_probs, advantages=advantages)
    return safe_divide(-(advantages.detach() * log_probs).sum(), normalizer)


def clipped_surrogate_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    normalizer: Tensor | float,
    clip_range: float = 0.2,
    dual_clip: float | None = None,
) -> SurrogateLoss:
    """Return the clipped surrogate of PPO, for several updates per rollout (Schulman 2017, arXiv 1707.06347).

    With a ratio of 1 its gradient is that of `reinforce_loss`.

    Args:
        log_probs: `[S, R]` log-probs of the sampled tokens under the policy.
        old_log_probs: `[S, R]` log-probs of them under the policy that sampled; no gradient passes through
            them.
        advantages: `[S, R]`; no gradient passes through them.
        mask: `[S, R]` bool, True on response tokens; anything outside it, NaN too, has no effect.
        normalizer: what the sum is divided by, such as the response tokens in the optimizer step over all
            ranks.
        clip_range: the ratio earns nothing beyond `1 ± clip_range`; 0.2 is the paper's value.
        dual_clip: bounds the loss of a token with a negative advantage by `-dual_clip · A` (Ye et al. 2020,
            arXiv 1912.09729), where the plain clip leaves it unbounded; None for no bound.

    Raises:
        ValueError: if the shapes differ, `mask` is not boolean, `clip_range` is not in (0, 1) or `dual_clip`
            is not above 1.
    """
    check_argument(0 < clip_range < 1, "clip_range", "above 0 and below 1", clip_range)
    check_argument(dual_clip is None or dual_clip > 1, "dual_clip", "above 1 or None", dual_clip)
    log_probs, old_log_probs, advantages = _zero_outside_mask(
        mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages
    )
    advantages = advantages.detach()
    ratio = (log_probs - old_log_probs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # pi / pi_old [S, R]
    plain = -advantages * ratio  # [S, R]
    # The larger loss of the two: moving the ratio out of the range gains nothing, but moving back is rewarded.
    loss = torch.maximum(plain, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    if dual_clip is not None:
        # With A < 0 the maximum grows with the ratio without bound.
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    # Where the loss is not the plain one, one of the clips has cut the gradient.
    return SurrogateLoss(safe_divide(loss.sum(), normalizer), masked_mean((loss != plain).detach(), mask))


def kl_loss(
    log_ratio: Tensor,
    mask: Tensor,
    normalizer: Tensor | float,
    estimator: KLEstimator,
    clamp: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return `Σ kl / normalizer` over the masked tokens, to be added to the loss with the KL coefficient.

    On-policy and in expectation, the gradient of k2 is that of each token's KL(policy || reference), and the
    gradient of k3 that of KL(reference || policy).

    Args:
        log_ratio: `[S, R]` log-probs under the policy minus log-probs under the reference, differentiable.
        mask: `[S, R]` bool, True on response tokens; anything outside it, NaN too, has no effect.
        normalizer: what the sum is divided by, such as the response tokens in the optimizer step over all
            ranks.
        estimator: `"k2"` or `"k3"`.
        clamp: as in `kl_estimate`; a clamped token has no gradient.
        weights: `[S, R]` what each token's KL counts, for responses that another policy drew; None for 1.

    Returns:
        scalar float32 (float64 for float64); 0 for an empty mask.

    Raises:
        ValueError: if the shapes differ, `mask` is not boolean, or `estimator` is `"k1"`, whose gradient is 0
            in expectation: it would only add noise.
    """
    check_argument(
        estimator != "k1",
        "estimator",
        "k2 or k3 for a loss (the expected gradient of k1 is 0 on-policy)",
        estimator,
    )
    (log_ratio,) = _zero_outside_mask(mask, log_ratio=log_ratio)
    kl = kl_estimate(log_ratio, estimator, clamp)  # [S, R]
    return safe_divide((kl if weights is None else weights.detach() * kl).sum(), normalizer)


def _zero_outside_mask(mask: Tensor, **tensors: Tensor) -> list[Tensor]:
    """Return `tensors` in one precision and 0 outside `mask`, before a gradient could become NaN there."""
    first, *_ = tensors.values()
    check_shape(next(iter(tensors)), first, "[S, R]", (None, None))
    for name, tensor in tensors.items():
        check_shape(name, tensor, "[S, R]", first.shape)
    check_mask("mask", mask, "[S, R]", first.shape)
    # Half precision rounds log-probs of -10 to 1/16; sums over thousands of tokens need float32.
    dtype = compute_dtype(*tensors.values())
    return [torch.where(mask, tensor.to(dtype), 0.0) for tensor in tensors.values()]


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    normalizer: Tensor | float,
    margin: Tensor | float = 0.0,
    centering_coef: float = 0.0,
) -> Tensor:
    """Return `Σ [-logsigmoid(chosen - rejected - margin) + centering_coef · (chosen + rejected)²] / normalizer`.

    The first term is the negative log-likelihood of the preferences under the model of Bradley and Terry (1952), as
    Ouyang et al. (2022, arXiv 2203.02155, equation 1) train on one pair; the margin is that of Llama 2 (Touvron et al.
    2023, arXiv 2307.09288, equation 2). The likelihood does not see a constant added to all scores; the second term
    (Eisenstein et al. 2023, arXiv 2312.09244, section 2) holds them around 0.

    Args:
        chosen: `[B]` scores of the chosen responses.
        rejected: `[B]` scores of the rejected responses.
        normalizer: what the sum is divided by, such as the number of pairs.
        margin: `[B]` or one number, what a chosen response has to be ahead by; in units of the score.
        centering_coef: weight of the second term, 0 or more.

    Returns:
        scalar float32 (float64 if an input is), differentiable.

    Raises:
        ValueError: if the shapes differ or `centering_coef` is below 0.
    """
    check_shape("chosen", chosen, "[B]", (None,))
    check_shape("rejected", rejected, "[B]", chosen.shape)
    if isinstance(margin, Tensor):
        check_shape("margin", margin, "[B]", chosen.shape)
    check_argument(centering_coef >= 0, "centering_coef", "0 or more", centering_coef)
    dtype = compute_dtype(chosen, rejected)
    chosen, rejected = chosen.to(dtype), rejected.to(dtype)
    margin = torch.as_tensor(margin, dtype=dtype, device=chosen.device)
    # [B]; not log(sigmoid(x)), which underflows
    losses = -F.logsigmoid(chosen - rejected - margin) + centering_coef * (chosen + rejected) ** 2
    return safe_divide(losses.sum(), normalizer)
