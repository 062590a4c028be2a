"""Squared norms of the gradients of responses: over all weights, at the logits, and of the output head alone.

The first is what the variance of the gradient is made of, and takes a backward pass for each response. The others are
cheap, and stand in for it during training; `agreement` says how well.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remax_lightning.functional import hidden_statistics
from remax_lightning.models.forward import find_head, hidden_states
from remax_lightning.modules import ReMaxModule
from remax_lightning.types import Rollout

NUM_RESAMPLES = 1000


class SquaredNorms(NamedTuple):
    """Of the gradient of `log π(y)` of each response, `[S]` each.

    Args:
        weights: over all weights that are trained.
        logits: `Σ_t |onehot(y_t) - π_t|²`, at the logits: what the monitor of a run takes.
        head: of the output head alone, `|Σ_t (onehot(y_t) - π_t) h_tᵀ|²`; None where it cannot be read.
    """

    weights: Tensor
    logits: Tensor
    head: Tensor | None


def squared_norms(module: ReMaxModule, rollout: Rollout) -> SquaredNorms:
    """Return the norms of the responses of a rollout; one backward pass for each."""
    weights, logits, heads = [], [], []
    num_prompts = len(rollout.prompt.prompts)
    has_head = find_head(module.policy).head is not None
    for index in range(num_prompts):
        part = rollout.micro_batch(index, num_prompts)  # a prompt with its n samples
        for sample in range(part.num_samples):
            active = torch.arange(part.num_samples, device=module.device) == sample  # [n]
            logits.append(differentiate(module, part, active)[sample])
            gradients = (weight.grad for weight in module.policy.parameters() if weight.grad is not None)
            weights.append(sum(gradient.double().square().sum() for gradient in gradients))
            if has_head:
                heads.append(_head_norm(module, part, sample))
    free(module)
    joined = [torch.stack([torch.as_tensor(norm).double() for norm in norms]) for norms in (weights, logits)]
    return SquaredNorms(joined[0], joined[1], torch.stack(heads).double() if heads else None)


def differentiate(module: ReMaxModule, rollout: Rollout, active: Tensor | None = None) -> Tensor:
    """Leave the gradient of the sum of `log π(y)` over the active responses in the weights.

    Returns:
        `[S]` squared norms at the logits, 0 of the others.
    """
    free(module)
    with torch.enable_grad():
        stats = module.token_statistics(rollout, active, norm=True)  # [S, R]
        mask = rollout.sampled.response_mask if active is None else rollout.sampled.response_mask & active[:, None]
        stats.log_probs.masked_fill(~mask, 0.0).sum().backward()
    return cast(Tensor, stats.squared_norm).masked_fill(~mask, 0.0).sum(1)


def free(module: ReMaxModule) -> None:
    """Free the gradients of the weights."""
    for parameter in module.policy.parameters():
        parameter.grad = None


def _head_norm(module: ReMaxModule, rollout: Rollout, row: int) -> Tensor:
    """Return the squared norm of the gradient of the head, as if it shared its weights with nothing."""
    prompt, sampled = rollout.prompt, rollout.sampled
    prompt_ids = prompt.prompt_ids[row // rollout.num_samples]
    prompt_ids = prompt_ids[prompt.prompt_mask[row // rollout.num_samples]]
    response = sampled.response_ids[row][sampled.response_mask[row]]  # [T]
    ids = torch.cat([prompt_ids, response])[None]
    with torch.no_grad():
        states = hidden_states(module.policy, ids, torch.ones_like(ids, dtype=torch.bool))[0]
    head = find_head(module.policy).head
    if head is None:
        raise ValueError("module must have a policy whose output head can be read")
    scaled = module.sampling.temperature if module.sampling.scale_log_probs else 1.0
    with torch.enable_grad():
        weight = head.weight.detach().requires_grad_()
        states, head = states[len(prompt_ids) - 1 : -1], head._replace(weight=weight)
        found = hidden_statistics(states, head, response, scaled, entropy=False)
        (gradient,) = torch.autograd.grad(found.log_probs.sum(), weight)
    return gradient.double().square().sum()


class Agreement(NamedTuple):
    """How a cheap norm agrees with the true one.

    Args:
        rank_correlation: Spearman's, with a 95 % interval (bootstrap over prompts).
        slope: of the logarithm of the true norm on that of the cheap one; 1 where they are proportional.
    """

    rank_correlation: tuple[float, float, float]
    slope: float


def agreement(true: Tensor, cheap: Tensor, num_samples: int) -> Agreement:
    """Compare two norms of the same responses.

    Args:
        true: `[S]` over all weights.
        cheap: `[S]`.
        num_samples: responses per prompt, which are drawn together.
    """
    pairs = torch.stack([true, cheap], 1).double().cpu().numpy()  # [S, 2]
    pairs = pairs[(pairs > 0).all(1)] if (pairs > 0).all(1).sum() > 2 else pairs
    value = _spearman(pairs)
    generator = np.random.default_rng(0)
    num_prompts = len(pairs) // num_samples
    groups = pairs[: num_prompts * num_samples].reshape(num_prompts, num_samples, 2)
    drawn = [
        _spearman(groups[generator.integers(0, num_prompts, num_prompts)].reshape(-1, 2)) for _ in range(NUM_RESAMPLES)
    ]
    low, high = (float(np.nanquantile(drawn, share)) for share in (0.025, 0.975))
    logs = np.log(np.maximum(pairs, np.finfo(np.float64).tiny))
    centered = logs - logs.mean(0)
    spread = max(float((centered[:, 1] ** 2).sum()), float(np.finfo(np.float64).tiny))
    slope = float((centered[:, 0] * centered[:, 1]).sum()) / spread
    return Agreement((value, low, high), slope)


def _spearman(pairs: NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation of two columns, ties at the mean of their ranks."""
    ranks = np.empty_like(pairs)
    for column in (0, 1):
        _, inverse, counts = np.unique(pairs[:, column], return_inverse=True, return_counts=True)
        ranks[:, column] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    centered = ranks - ranks.mean(0)
    spread = np.sqrt((centered**2).sum(0)).prod()
    return float(centered.prod(1).sum() / spread) if spread > 0 else float("nan")
