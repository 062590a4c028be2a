"""What the reward of a sampled response is compared with, besides the greedy response's reward.

A baseline leaves the policy gradient unbiased if it does not depend on the response that it is subtracted from: it may
read the greedy response (which the prompt and the weights decide), the other samples of the prompt, and other prompts.
All functions here hold to that by leaving out a response's own reward, or all rewards of its own prompt.

They work on the rollout batch of all ranks, so that a baseline does not depend on how prompts are shared out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remax_lightning.functional.masking import check_argument, check_shape, compute_dtype


def batch_mean(reward: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean reward of all other responses of the batch, optionally weighted.

    With `weights` proportional to the squared norm of each response's gradient this is the constant that minimizes the
    variance of the gradient, `Σ w r / Σ w` (Greensmith et al. 2004; OPO, arXiv 2505.23585, takes the length for `w`).

    Args:
        reward: `[S]`.
        weights: `[S]`, 0 or more; None for equal ones.

    Returns:
        `[S]` float32 (float64 if an input is); 0 where there is no other response.

    Raises:
        ValueError: if a shape does not fit.
    """
    check_shape("reward", reward, "[S]", (None,))
    weights = torch.ones_like(reward) if weights is None else weights
    check_shape("weights", weights, "[S]", reward.shape)
    dtype = compute_dtype(reward, weights)
    reward, weights = reward.double(), weights.double()
    # Leave-one-out sums by subtraction cancel; around the mean of all they do so far less.
    center = reward.mean()
    total = weights.sum() - weights  # [S]
    weighted = weights * (reward - center)  # [S]
    mean = (weighted.sum() - weighted) / total.clamp_min(torch.finfo(torch.float64).tiny)  # [S]
    # Where all others weigh nothing, their plain mean; where there is no other, 0.
    plain = _mean_of_others(reward)
    few = total <= 1e-12 * weights.sum()
    return torch.where(few, plain, mean + center).to(dtype)


def optimal_per_token(reward: Tensor, squared_norms: Tensor) -> Tensor:
    """Return what each token's reward is compared with: the mean of all other responses, weighted by their gradients.

    `b_it = Σ_{k≠i} W_kt r_k / Σ_{k≠i} W_kt`, with `W_kt` the sum of the squared norms of the gradients of response k up
    to token t (the optimal token baseline, arXiv 2602.07078, which weighs the samples of one prompt): the credit of a
    token is compared with responses by how much they have moved the gradient by then. A response that has ended keeps
    its weight.

    Args:
        reward: `[S]`.
        squared_norms: `[S, R]` squared norms of the gradients of the log-probs of the tokens, 0 beyond the end.

    Returns:
        `[S, R]` float32 (float64 if an input is); 0 where there is no other response.

    Raises:
        ValueError: if a shape does not fit.
    """
    check_shape("reward", reward, "[S]", (None,))
    check_shape("squared_norms", squared_norms, "[S, R]", (len(reward), None))
    dtype = compute_dtype(reward, squared_norms)
    weights, reward = squared_norms.double().cumsum(1), reward.double()  # W [S, R]
    center = reward.mean()
    weighted = weights * (reward - center)[:, None]  # [S, R]
    total = weights.sum(0) - weights
    mean = (weighted.sum(0) - weighted) / total.clamp_min(torch.finfo(torch.float64).tiny) + center
    few = total <= 1e-12 * weights.sum(0)
    return torch.where(few, _mean_of_others(reward)[:, None], mean).to(dtype)


def greedy_and_samples(reward: Tensor, num_samples: int, greedy_reward: Tensor) -> Tensor:
    """Return the mean of the greedy response's reward and those of the prompt's other samples.

    `b_ij = (g_i + Σ_{k≠j} r_ik) / n`: the greedy response counts as one more sample. With n = 1 that is ReMax.

    Args:
        reward: `[S]` rewards; the `num_samples` samples of one prompt stand next to each other.
        num_samples: sampled responses per prompt, `n`.
        greedy_reward: `[B]` rewards of the greedy responses.

    Returns:
        `[S]` float32 (float64 if an input is).

    Raises:
        ValueError: if a shape does not fit.
    """
    group = _groups(reward, num_samples, greedy_reward)  # [B, n]
    dtype = compute_dtype(reward, greedy_reward)
    group, greedy = group.to(dtype), greedy_reward.to(dtype).unsqueeze(1)  # [B, n], [B, 1]
    return ((greedy + group.sum(1, keepdim=True) - group) / num_samples).flatten()


def calibrated_greedy(reward: Tensor, num_samples: int, greedy_reward: Tensor, ridge: float = 1.0) -> Tensor:
    """Return what a response's reward is expected to be, given the reward of the greedy response.

    `b_i = m + a · (g_i - g)`: the line of least squares through the greedy rewards of the *other* prompts and the mean
    rewards of their samples, with `g` and `m` the means over those. Where the greedy reward says nothing about the
    sampled one the slope is 0 and this is the mean of the other prompts; where they agree it is 1.

    Args:
        reward: `[S]` rewards; the `num_samples` samples of one prompt stand next to each other.
        num_samples: sampled responses per prompt, `n`.
        greedy_reward: `[B]` rewards of the greedy responses.
        ridge: prompts of average spread, but without any relation, that are added to the sums of squares: few prompts
            then do not decide on a slope.

    Returns:
        `[S]` float32 (float64 if an input is); 0 where there is no other prompt.

    Raises:
        ValueError: if a shape does not fit, or `ridge` is negative.
    """
    group = _groups(reward, num_samples, greedy_reward)
    check_argument(ridge >= 0, "ridge", "0 or more", ridge)
    dtype = compute_dtype(reward, greedy_reward)
    others = max(len(group) - 1, 1)
    # ---- Means over the other prompts [B] ----
    mean, greedy = group.double().mean(1), greedy_reward.double()
    m, g = _mean_of_others(mean), _mean_of_others(greedy)
    # ---- Sums of squares over the other prompts, about their own means: a rank-one downdate of those of all [B] ----
    dm, dg = mean - mean.mean(), greedy - greedy.mean()
    down = (others + 1) / others
    covariance = (dg * dm).sum() - down * dg * dm
    spread = ((dg * dg).sum() - down * dg * dg).clamp_min(0.0)
    # Greedy rewards are no samples, so the ridge may know those of all prompts.
    spread = spread + ridge * dg.square().mean()
    # What is left of a spread by rounding, of the mean or of the difference, says nothing.
    rounding = 1e-12 * (dg * dg).sum() + 1e-20 * greedy.square().mean()
    slope = torch.where(spread > rounding, covariance / spread, 0.0)
    slope = torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)
    return (m + slope * (greedy - g)).repeat_interleave(num_samples).to(dtype)


def shrinkage(reward: Tensor, num_samples: int) -> Tensor:
    """Return the mean of the prompt's other samples, shrunk to the mean of the other prompts (arXiv 2511.03710).

    `b_ij = (1 - λ) · mean_{k≠j} r_ik + λ · mean of the other prompts`, with `λ = v / (v + s)`: `v` the variance of
    the first mean, `s` the variance of the prompts' own values, both estimated on the other prompts. Few samples of
    alike prompts are shrunk, many samples of different prompts are not.

    Args:
        reward: `[S]` rewards; the `num_samples` samples of one prompt stand next to each other.
        num_samples: sampled responses per prompt, `n`, at least 2.

    Returns:
        `[S]` float32 (float64 if `reward` is). Fewer than 3 prompts say nothing about their spread, so `λ` is 0.

    Raises:
        ValueError: if a shape does not fit, or there is one sample per prompt.
    """
    check_argument(num_samples >= 2, "num_samples", "at least 2", num_samples)
    group = _groups(reward, num_samples)
    values = group.double()
    siblings = (values.sum(1, keepdim=True) - values) / (num_samples - 1)  # [B, n]
    if len(group) < 3:
        return siblings.flatten().to(compute_dtype(reward))
    # ---- Variances on the other prompts [B] ----
    mean, within = values.mean(1), _mean_of_others(values.var(1))
    others = len(group) - 1
    deviation = mean - mean.mean()
    squares = deviation.square()
    down = (others + 1) / others
    between = squares.sum() - down * squares
    # Where the other prompts' rewards are all alike, both are 0 but for what rounding leaves of one's own, which must
    # not decide on the share.
    rounding = 1e-20 * values.square().mean()
    within = within.where(within > 1e-12 * values.var(1).mean() + rounding, 0.0)
    between = between.where(between > 1e-12 * squares.sum() + rounding, 0.0) / (others - 1)
    between = (between - within / num_samples).clamp_min(0.0)  # a mean of n samples varies by itself
    v = within / (num_samples - 1)
    share = torch.where(v + between > 0, v / (v + between).clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    share = share.unsqueeze(1)  # [B, 1]
    shrunk = (1 - share) * siblings + share * _mean_of_others(mean).unsqueeze(1)
    return shrunk.flatten().to(compute_dtype(reward))


def _groups(reward: Tensor, num_samples: int, greedy_reward: Tensor | None = None) -> Tensor:
    """Return `[B, n]` rewards of the samples of each prompt."""
    check_shape("reward", reward, "[S]", (None,))
    size = reward.shape[0]
    check_argument(num_samples >= 1, "num_samples", "at least 1", num_samples)
    check_argument(size % num_samples == 0, "num_samples", f"a divisor of the {size} rewards", num_samples)
    if greedy_reward is not None:
        check_shape("greedy_reward", greedy_reward, "[B]", (size // num_samples,))
    return reward.reshape(-1, num_samples)


def _mean_of_others(values: Tensor) -> Tensor:
    """Return the mean of all values but each one's own; 0 where there is no other."""
    if len(values) < 2:
        return torch.zeros_like(values)
    center = values.mean()
    # (Σ v - v_i) / (N - 1), about the mean of all: the sum of the others' deviations is minus one's own.
    return center - (values - center) / (len(values) - 1)
