"""The sampling distribution: temperature, top-k, top-p and min-p.

Rollout engines sample from it and training computes log-probs under it, so both share these functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.functional import SamplingMask


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Return float32 logits divided by the temperature."""
    logits = logits.float()
    return logits if temperature == 1 else logits / temperature


def apply_top_k_top_p(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Apply top-k, top-p and min-p in this order, as transformers does.

    Args:
        logits: `[M, V]` logits, already divided by the temperature.
        sampling: which of the three to apply, and how.

    Returns:
        `[M, V]` logits with dropped tokens at minus infinity. The most likely token always stays.
    """
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]  # [M, 1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        sorted_probs = sorted_logits.softmax(-1)
        # A token is dropped if the more likely ones reach top_p without it.
        probability_before = sorted_probs.cumsum(-1) - sorted_probs
        dropped = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, probability_before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    if sampling.min_p > 0:
        probs = logits.softmax(-1)
        threshold = sampling.min_p * probs.amax(-1, keepdim=True)  # [M, 1]
        logits = logits.masked_fill(probs < threshold, -torch.inf)
    return logits


def make_sampling_mask(sampling: SamplingConfig) -> SamplingMask | None:
    """Return a function from logits to the tokens that the policy's log-probs range over; None for all tokens.

    The function expects logits divided by the temperature of the log-probs, and returns bool of the same shape.
    """
    if not (sampling.processed_log_probs and sampling.truncates):
        return None
    # Sampling decides at its own temperature, which log-probs leave out if scale_log_probs is False.
    temperature = 1.0 if sampling.scale_log_probs else sampling.temperature
    return lambda logits: apply_top_k_top_p(apply_temperature(logits, temperature), sampling) > -torch.inf


def gather_log_probs(logits: Tensor, tokens: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return the log-probs of sampled tokens as the training pass computes them for the same `sampling`.

    Args:
        logits: `[M, V]` logits of the last position.
        tokens: `[M]` token ids.
        sampling: `scale_log_probs` says whether to divide by the temperature, `processed_log_probs` whether to leave
            dropped tokens out of the distribution.

    Returns:
        `[M]` log-probs in nats, float32.
    """
    scaled = apply_temperature(logits, sampling.temperature if sampling.scale_log_probs else 1.0)  # [M, V]
    mask = make_sampling_mask(sampling)
    if mask is not None:
        scaled = scaled.masked_fill(~mask(scaled), -torch.inf)
    return scaled.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
