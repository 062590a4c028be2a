"""Advantages of response tokens: reward against a baseline, KL, discount, clip and whitening."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from remax_lightning.functional.masking import (
    check_argument,
    check_choice,
    check_mask,
    check_shape,
    compute_dtype,
    masked_sum,
)

BaselineKind: TypeAlias = Literal["greedy", "leave_one_out", "group_mean", "none"]
"""What the reward is compared with: that of the greedy response, the mean of the others, of all, or 0. These need
nothing but the samples of one prompt; `remax_lightning.baselines` has the others."""

KLCredit: TypeAlias = Literal["to_go", "one_step", "none"]
"""Which KL a token pays for: its own and all that follow, its own only, or none."""

RewardClipAt: TypeAlias = Literal["before_baseline", "after_baseline"]
"""Whether the reward is clipped, or what is left of it after the baseline."""


def baseline_values(
    reward: Tensor, num_samples: int, kind: BaselineKind | Tensor, baseline_reward: Tensor | None = None
) -> Tensor:
    """Return what the reward of each sampled response is compared with.

    Args:
        reward: `[S]` rewards; the `num_samples` samples of one prompt stand next to each other.
        num_samples: sampled responses per prompt, `n`.
        kind: `[S]` values, or `[S, R]` of tokens, which are returned; or `"greedy"` the reward of the prompt's greedy
            response (ReMax, arXiv 2310.10505); `"leave_one_out"` the mean of the prompt's other samples (RLOO, arXiv
            2402.14740); `"group_mean"` the mean of all of the prompt's samples, its own included, which scales the
            expected gradient by `(n - 1) / n`; `"none"` 0.
        baseline_reward: `[B]` rewards of the greedy responses; needed by `"greedy"` only.

    Returns:
        `[S]` float32 (float64 if an input is), or `[S, R]` where the values are of tokens.

    Raises:
        ValueError: if a shape does not fit, `kind` is unknown, `"greedy"` has no `baseline_reward`, or a
            group has one sample.
    """
    check_shape("reward", reward, "[S]", (None,))
    size = reward.shape[0]
    if isinstance(kind, Tensor):
        letters, shape = ("[S]", (size,)) if kind.dim() == 1 else ("[S, R]", (size, None))
        check_shape("baseline", kind, letters, shape)
        return kind.detach().to(compute_dtype(reward, kind))
    check_choice("baseline", kind, get_args(BaselineKind))
    check_argument(num_samples >= 1, "num_samples", "at least 1", num_samples)
    check_argument(size % num_samples == 0, "num_samples", f"a divisor of the {size} rewards", num_samples)
    # b = r(x, y*), for all n samples of a prompt
    if kind == "greedy":
        if baseline_reward is None:
            raise ValueError("baseline_reward must have shape [B] for baseline='greedy', got None")
        check_shape("baseline_reward", baseline_reward, "[B]", (size // num_samples,))
        return baseline_reward.to(compute_dtype(reward, baseline_reward)).repeat_interleave(num_samples)
    reward = reward.to(compute_dtype(reward))
    if kind == "none":
        return torch.zeros_like(reward)
    check_argument(num_samples >= 2, "num_samples", f"at least 2 for baseline={kind!r}", num_samples)
    group = reward.reshape(-1, num_samples)  # [B, n]
    total = group.sum(dim=1, keepdim=True)  # [B, 1]
    # b_i = (sum_j r_j - r_i) / (n - 1), which does not depend on y_i: the gradient stays unbiased.
    if kind == "leave_one_out":
        return ((total - group) / (num_samples - 1)).flatten()
    return (total / num_samples).expand_as(group).flatten()


def soft_overlong_penalty(lengths: Tensor, max_length: int, cache: int) -> Tensor:
    """Return the share of a penalty that each response pays for its length, float32 from 0 to 1.

    0 up to `max_length - cache` tokens, then linear, 1 at `max_length`: the negative of equation 13 of DAPO (Yu et al.
    2025, arXiv 2503.14476).

    Args:
        lengths: `[M]` tokens of each response, the end-of-sequence token included.
        max_length: the length limit.
        cache: tokens over which the penalty grows, from 1 to `max_length`.

    Raises:
        ValueError: if `cache` is out of its range.
    """
    check_argument(1 <= cache <= max_length, "cache", f"between 1 and max_length={max_length}", cache)
    return ((lengths.float() - (max_length - cache)) / cache).clamp(0.0, 1.0)  # [M]


def normalized_differences(
    parts: Tensor,
    baseline_parts: Tensor,
    weights: Tensor,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the weighted sum of the parts of a reward above their greedy values, each part on its own scale.

    `Σ_k w_k · d_k / s_k` with `d_k = r_k(x, y) - r_k(x, y*)` and `s_k = max(sqrt(mean(d_k²)), 1e-4)`, the mean over all
    responses. It is GDPO (Liu et al. 2026, arXiv 2601.05242) with the greedy value in place of a group's mean, also as
    the center of the deviation `s_k`: around the mean of `d_k`, a part that is nearly the same distance from its greedy
    values everywhere would be blown up. The smallest `s_k` is that of `whiten_advantages`; a constant part adds 0.

    Args:
        parts: `[S, K]` values of the sampled responses; those of one prompt stand next to each other.
        baseline_parts: `[B, K]` values of the greedy responses.
        weights: `[K]`.
        reduce: sums a tensor of `K + 1` numbers over ranks, so that the deviations are global; called exactly once,
            also on a rank without responses. None where there is one process.

    Returns:
        `[S]` float32 (float64 if an input is), detached.

    Raises:
        ValueError: if a shape does not fit.
    """
    check_shape("parts", parts, "[S, K]", (None, None))
    count, num_parts = parts.shape
    check_shape("baseline_parts", baseline_parts, "[B, K]", (None, num_parts))
    check_shape("weights", weights, "[K]", (num_parts,))
    num_prompts = baseline_parts.shape[0]
    divides = count % num_prompts == 0 if num_prompts else count == 0
    check_argument(divides, "baseline_parts", f"of a number of prompts that divides the {count} responses", num_prompts)
    dtype = compute_dtype(parts, baseline_parts)
    # d_k = r_k - b_k of every response [S, K]
    baseline = baseline_parts.detach().to(dtype).repeat_interleave(count // max(num_prompts, 1), dim=0)
    differences = parts.detach().to(dtype) - baseline
    # sigma_k over all ranks [K]; sums of squares and the count share one reduction
    sums = torch.cat([differences.square().sum(0), differences.new_full((1,), count)])  # [K + 1]
    sums = sums if reduce is None else reduce(sums)
    deviations = (sums[:-1] / sums[-1].clamp(min=1)).sqrt().clamp(min=1e-4)  # [K]
    return (differences * (weights.to(differences) / deviations)).sum(1)  # [S]


def whiten_advantages(advantages: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return advantages with mean 0 and variance 1 over all masked tokens, 0 outside the mask.

    `(A - mean) / sqrt(max(variance, 1e-8))`, with the biased variance: that of this very set of tokens.

    Args:
        advantages: `[S, R]`.
        mask: `[S, R]` bool.
        reduce: sums a tensor of at most two numbers over ranks, so that the moments are global; called
            exactly twice, also on a rank without tokens, so that it may be a collective. None where there is
            one process.

    Raises:
        ValueError: if the shapes differ or `mask` is not boolean.
    """
    add_ranks = reduce if reduce is not None else _identity
    total = masked_sum(advantages, mask)
    count, total = add_ranks(torch.stack([mask.sum().to(total.dtype), total])).unbind()
    count = count.clamp(min=1)
    deviations = torch.where(mask, advantages - total / count, 0.0)  # [S, R]
    # Squares of deviations, in a second reduction: mean of squares minus squared mean cancels in float32.
    variance = add_ranks(deviations.square().sum().view(1)).squeeze(0) / count
    return deviations * variance.clamp(min=1e-8).rsqrt()


def remax_advantages(
    reward: Tensor,
    response_mask: Tensor,
    *,
    loss_mask: Tensor | None = None,
    num_samples: int = 1,
    baseline: BaselineKind | Tensor = "greedy",
    baseline_reward: Tensor | None = None,
    baseline_mask: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_credit: KLCredit = "to_go",
    kl_in_baseline: bool = False,
    gamma: float = 1.0,
    reward_clip: float | None = None,
    reward_clip_at: RewardClipAt = "after_baseline",
    whiten: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the advantage of every response token: discounted reward above a baseline, and credit for KL.

    `A_t = gamma^k · clip(reward - baseline) - β · KL_t`, with `β = kl_coef` and k the number of response
    tokens from t to the last one, t included, so that the last token already gets gamma (the paper's code,
    github.com/liziniu/ReMax). `KL_t` is `kl_t` with one-step credit and `Σ_{s≥t} gamma^(s-t) kl_s` to go, s
    and t counting response tokens.

    With gamma = 1, KL to go and no clip this is verl's `Σ_{s≥t} (r_s - β · kl_s) - b`, r on the last response
    token. The defaults leave the policy gradient of `E[reward] - β · KL` unbiased; one-step credit, gamma <
    1, a clip and whitening do not.

    With a reward per token, `A_t = clip(G_t - b_t) - β · KL_t` with `G_t = Σ_{s≥t} gamma^(s-t) r_s`. `b_t` is what the
    baseline makes of the rewards to go that other responses have from the same place t, beyond their end from their
    last token: `b_1` is made of whole rewards, and no `b_t` depends on the sampled tokens. With gamma = 1 and all
    reward on the last token this is the advantage of one number per response.

    Args:
        reward: `[S]` rewards, or `[S, R]` rewards of tokens; the `num_samples` samples of one prompt stand next to each
            other.
        response_mask: `[S, R]` bool, True on response tokens; anything outside it, NaN too, has no effect.
        loss_mask: `[S, R]` bool, True on the response tokens that are trained on; None for all. The others still
            count in the baseline of their siblings, with their reward and their KL.
        num_samples: sampled responses per prompt, `n`.
        baseline: see `baseline_values`; or `[S]` values, or `[S, R]` of each token, of rewards clipped as
            `reward_clip_at` says. Rewards of tokens need a kind.
        baseline_reward: `[B]` rewards of the greedy responses, or `[B, R']` rewards of their tokens; needed by the
            greedy baseline only.
        baseline_mask: `[B, R']` bool, True on the tokens of the greedy responses; needed with rewards of tokens only.
        kl: `[S, R]` unscaled KL estimate per token in nats; no gradient passes through it.
        kl_coef: reward that a nat of KL costs.
        kl_credit: which KL a token pays for.
        kl_in_baseline: take the baseline of `reward - β · Σ kl` in place of the reward (as TRL's RLOO does, which also
            charges every token with the whole response's KL); for baselines made of samples only, as the greedy
            response's KL is not known.
        gamma: discount per token, above 0 and at most 1.
        reward_clip: bound of the absolute value; None for no clip.
        reward_clip_at: clip the reward and the greedy response's before they are compared, or their
            difference.
        whiten: normalize over all tokens last, see `whiten_advantages`.
        reduce: sums over ranks for `whiten`.

    Returns:
        `[S, R]` float32 (float64 if an input is), detached, 0 where the token is not trained on.

    Raises:
        ValueError: if a shape does not fit, a number is out of range, a choice is unknown, or an argument
            that another one needs is None.
    """
    has_tokens = reward.dim() == 2 and reward.shape == response_mask.shape
    loss_mask = response_mask if loss_mask is None else loss_mask
    _check_rewards(reward, response_mask, loss_mask, gamma, reward_clip, reward_clip_at, has_tokens=has_tokens)
    _check_kl(kl, response_mask, kl_coef, kl_credit, kl_in_baseline, baseline)
    check_argument(not (has_tokens and kl_in_baseline), "kl_in_baseline", "False with a reward per token", True)
    dtype = compute_dtype(*(x for x in (reward, baseline_reward, kl) if x is not None))
    bound = math.inf if reward_clip is None else reward_clip
    # ---- beta * kl_t of every token [S, R] ----
    penalty = torch.zeros_like(response_mask, dtype=dtype)
    # A coefficient of 0 costs nothing, even where the estimate is infinite.
    if kl is not None and kl_coef > 0 and kl_credit != "none":
        penalty = torch.where(response_mask, kl_coef * kl.detach().to(dtype), 0.0)
    # ---- A_t = gamma^k * clip(r - b) - beta * KL_t, with token rewards clip(G_t - b_t) - beta * KL_t ----
    reward = reward.detach().to(dtype)
    baseline_reward = None if baseline_reward is None else baseline_reward.detach().to(dtype)
    if has_tokens:
        above = _tokens_above(reward, response_mask, num_samples, baseline, baseline_reward, baseline_mask, gamma)
        above = above.clamp(-bound, bound)  # [S, R]
    else:
        before, after = (bound, math.inf) if reward_clip_at == "before_baseline" else (math.inf, bound)
        reward = reward.clamp(-before, before)
        baseline_reward = None if baseline_reward is None else baseline_reward.clamp(-before, before)
        # Siblings are compared in what is maximized, r - beta * sum_s kl_s, if kl_in_baseline.
        compared = reward - penalty.sum(dim=1) if kl_in_baseline else reward
        values = baseline_values(compared, num_samples, baseline, baseline_reward)
        values = values if values.dim() == 2 else values.unsqueeze(1)  # [S, R] or [S, 1]
        # r - b; in r itself the KL is left to `cost`, token by token
        difference = (reward.unsqueeze(1) - values).clamp(-after, after)
        tokens_to_go = response_mask.flip(1).cumsum(dim=1).flip(1).to(dtype)  # k [S, R], the token itself included
        above = difference * torch.pow(gamma, tokens_to_go)  # [S, R]
    cost = _discounted_sum_to_go(penalty, response_mask, gamma) if kl_credit == "to_go" else penalty  # [S, R]
    advantages = torch.where(loss_mask, above - cost, 0.0)
    return whiten_advantages(advantages, loss_mask, reduce) if whiten else advantages


def _check_rewards(
    reward: Tensor,
    response_mask: Tensor,
    loss_mask: Tensor,
    gamma: float,
    reward_clip: float | None,
    reward_clip_at: RewardClipAt,
    *,
    has_tokens: bool,
) -> None:
    if not has_tokens:
        check_shape("reward", reward, "[S]", (None,))
    check_mask("response_mask", response_mask, "[S, R]", (reward.shape[0], None))
    check_mask("loss_mask", loss_mask, "[S, R]", response_mask.shape)
    check_argument(0 < gamma <= 1, "gamma", "above 0 and at most 1", gamma)
    check_argument(reward_clip is None or reward_clip > 0, "reward_clip", "above 0 or None", reward_clip)
    check_choice("reward_clip_at", reward_clip_at, get_args(RewardClipAt))
    clips_whole = has_tokens and reward_clip is not None and reward_clip_at == "before_baseline"
    check_argument(not clips_whole, "reward_clip_at", "after_baseline with a reward per token", reward_clip_at)


def _tokens_above(
    reward: Tensor,
    mask: Tensor,
    num_samples: int,
    baseline: BaselineKind | Tensor,
    baseline_reward: Tensor | None,
    baseline_mask: Tensor | None,
    gamma: float,
) -> Tensor:
    """Return `[S, R]` the reward to go from each token, above what the baseline has to go from the same place."""
    rows, width = mask.shape
    to_go = _discounted_sum_to_go(torch.where(mask, reward, 0.0), mask, gamma)  # G_t [S, R]
    compared = _held_beyond_end(to_go, mask, width)  # [S, R]
    greedy = None
    if isinstance(baseline, Tensor):
        raise ValueError("baseline must be a kind for rewards of tokens, got a tensor")
    if baseline == "greedy" and baseline_reward is not None:
        if baseline_mask is None:
            raise ValueError("baseline_mask must have shape [B, R'] for greedy rewards of tokens, got None")
        check_mask("baseline_mask", baseline_mask, "[B, R']", (rows // num_samples, None))
        check_shape("baseline_reward", baseline_reward, "[B, R']", baseline_mask.shape)
        values = torch.where(baseline_mask, baseline_reward, 0.0)
        held = _held_beyond_end(_discounted_sum_to_go(values, baseline_mask, gamma), baseline_mask, width)  # [B, R]
        greedy = held.t().flatten()  # place by place, [R * B]
    # Every place is compared as whole responses are: R times S values, the samples of a prompt next to each other.
    values = baseline_values(compared.t().flatten(), num_samples, baseline, greedy)  # [R * S]
    return to_go - values.view(width, rows).t()


def _held_beyond_end(values: Tensor, mask: Tensor, width: int) -> Tensor:
    """Return `[M, width]` the values at each place; beyond a response's end that of its last token."""
    last = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0)  # [M, 1]; an empty response has 0 everywhere
    places = torch.arange(width, device=values.device).expand(len(values), width)
    return values.gather(1, torch.minimum(places, last))


def _discounted_sum_to_go(values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return `Σ_{s≥t} gamma^(masked tokens in [t, s)) · values_s` for every t."""
    if gamma == 1.0:
        return values.flip(1).cumsum(dim=1).flip(1)
    # Recursive doubling: after a round, `total` sums over twice as many tokens and `decay` is the discount
    # across them. That is log2(R) rounds, and only products of discounts: a cumulative sum divided by gamma^t
    # would overflow on long responses.
    total = values
    # Padding discounts nothing, so that time counts response tokens.
    decay = torch.where(mask, torch.full_like(values, gamma), 1.0)
    width = 1
    while width < values.shape[1]:
        total = total + decay * F.pad(total[:, width:], (0, width))
        decay = decay * F.pad(decay[:, width:], (0, width))
        width *= 2
    return total


def _check_kl(
    kl: Tensor | None,
    mask: Tensor,
    kl_coef: float,
    kl_credit: KLCredit,
    kl_in_baseline: bool,
    baseline: BaselineKind | Tensor,
) -> None:
    check_choice("kl_credit", kl_credit, get_args(KLCredit))
    check_argument(kl_coef >= 0, "kl_coef", "at least 0", kl_coef)
    if kl is not None:
        check_shape("kl", kl, "[S, R]", mask.shape)
    elif kl_coef > 0 and kl_credit != "none":
        raise ValueError(f"kl must have shape [S, R] for kl_coef={kl_coef} with kl_credit={kl_credit!r}, got None")
    if kl_in_baseline:
        sampled = not isinstance(baseline, Tensor) and baseline in ("leave_one_out", "group_mean")
        check_argument(sampled, "kl_in_baseline", "False unless baseline is leave_one_out or group_mean", True)
        check_argument(kl_credit != "none", "kl_in_baseline", "False with kl_credit='none'", True)


def _identity(values: Tensor) -> Tensor:
    return values
