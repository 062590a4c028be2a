"""Log-probs of given tokens, and the entropy of the distributions that they come from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from remax_lightning.functional._checks import check_shape, check_that, compute_dtype


class TokenStatistics(NamedTuple):
    """What a training pass needs to know of each response token.

    Args:
        log_probs: `[S, R]` log-probs of the given tokens in nats, differentiable.
        entropy: `[S, R]` entropy of the policy at that position in nats, detached.
    """

    log_probs: Tensor
    entropy: Tensor


def token_statistics(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> TokenStatistics:
    """Return log-probs of `ids` and entropies, of the softmax of `logits / temperature`.

    Args:
        logits: `[S, R, V]`, those that predict `ids` (already shifted).
        ids: `[S, R]` token ids.
        temperature: divides the logits; the one that sampled keeps the gradient on-policy.

    Returns:
        both `[S, R]` float32 (float64 for float64 logits).

    Raises:
        ValueError: if the shapes do not fit or `temperature` is not above 0.
    """
    check_shape("logits", logits, "[S, R, V]", (None, None, None))
    check_shape("ids", ids, "[S, R]", logits.shape[:2])
    check_that(temperature > 0, "temperature", "above 0", temperature)
    log_softmax = torch.log_softmax(logits.to(compute_dtype(logits)) / temperature, dim=-1)
    log_probs = log_softmax.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        # entr(0) = 0, where p * log p is NaN: logits of -inf are allowed.
        entropy = torch.special.entr(log_softmax.exp()).sum(dim=-1)
    return TokenStatistics(log_probs, entropy)
