"""The sampling distribution: suppressed tokens, temperature, top-k, top-p and min-p.

Rollout engines sample from it and training computes log-probs under it, so both share these functions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.functional import SamplingMask
from remax_lightning.functional.lm_head import mask_logits


class SuppressedTokens(NamedTuple):
    """Tokens that cannot be drawn. Policy and reference leave them out of the distribution, as drawing does.

    Without that the gradient would be of another policy than the one that drew: a blocked EOS has no sample that
    could lower its probability, so training would raise it without bound.

    Args:
        unused_ids: ids without a token in the tokenizer, such as the rows that pad an embedding to a round size. No
            reward could see them.
        eos_ids: ids that cannot be drawn before `min_response_length`.
        min_response_length: number of tokens before a response may end.
    """

    unused_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    min_response_length: int = 0

    @property
    def exist(self) -> bool:
        """Whether any token is suppressed anywhere."""
        return bool(self.unused_ids) or (self.min_response_length > 0 and bool(self.eos_ids))

    def ids_by_phase(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the ids suppressed before `min_response_length`, and those suppressed from there on."""
        before = torch.tensor([*self.unused_ids, *self.eos_ids], dtype=torch.long, device=device)
        return before, before[: len(self.unused_ids)]

    def apply(self, logits: Tensor, positions: Tensor, ids_by_phase: tuple[Tensor, Tensor]) -> Tensor:
        """Return logits with minus infinity on suppressed tokens; the host does not wait for the device.

        Args:
            logits: `[M, V]`.
            positions: `[M]` position of each row in its response, from 0.
            ids_by_phase: those of this object, made once for many calls.
        """
        before, after = ids_by_phase
        logits = logits.index_fill(1, after, -torch.inf)
        if self.min_response_length == 0:
            return logits
        early = positions < self.min_response_length  # [M]
        return torch.where(early[:, None], logits.index_fill(1, before, -torch.inf), logits)


NO_TOKENS = SuppressedTokens()
"""Nothing is suppressed."""


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


def make_sampling_mask(
    sampling: SamplingConfig, suppressed: SuppressedTokens, positions: Tensor, *, truncate: bool = True
) -> SamplingMask | None:
    """Return a function from logits to the tokens that log-probs range over; None for all tokens.

    The function expects logits divided by the temperature of the log-probs.

    Args:
        sampling: `processed_log_probs` says whether top-k, top-p and min-p leave tokens out.
        suppressed: tokens that cannot be drawn.
        positions: `[M]` position of each token in its response, from 0.
        truncate: False for the reference, which is compared with the policy but not truncated.
    """
    truncates = truncate and sampling.processed_log_probs and sampling.truncates
    if not (truncates or suppressed.exist):
        return None
    # Sampling decides at its own temperature, which log-probs leave out if scale_log_probs is False.
    temperature = 1.0 if sampling.scale_log_probs else sampling.temperature
    ids_by_phase = suppressed.ids_by_phase(positions.device)  # copied to the device once, not for every chunk

    def mask(logits: Tensor, rows: slice) -> Tensor:
        if suppressed.exist:
            logits = suppressed.apply(logits, positions[rows], ids_by_phase)
        if truncates:
            logits = apply_top_k_top_p(apply_temperature(logits, temperature), sampling)
        return logits > -torch.inf

    return mask


def gather_log_probs(logits: Tensor, tokens: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return the log-probs of sampled tokens as the training pass computes them for the same `sampling`.

    Args:
        logits: `[M, V]` logits of the last position, minus infinity on suppressed tokens.
        tokens: `[M]` token ids.
        sampling: `scale_log_probs` says whether to divide by the temperature, `processed_log_probs` whether to leave
            dropped tokens out of the distribution.

    Returns:
        `[M]` log-probs in nats, float32.
    """
    scaled = apply_temperature(logits, sampling.temperature if sampling.scale_log_probs else 1.0)  # [M, V]
    scaled = mask_logits(scaled, tokens, make_sampling_mask(sampling, NO_TOKENS, tokens), slice(None))
    return scaled.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
