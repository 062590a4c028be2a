"""Drawing the next token from logits, with nothing but what `SamplingConfig` asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from remax_lightning.rollout.engine import SamplingConfig


def shape_logits(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return `[M, V]` float32 logits after temperature, top-k, top-p and min-p, dropped tokens at minus infinity."""
    logits = logits.float()
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        # A token stays if those ahead of it do not reach top_p yet, so the likeliest one always stays.
        dropped = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token id per row of `[M, V]` logits.

    On a CPU `torch.multinomial` costs an order of magnitude more than inverting the distribution function, so that is
    what is done there; on CUDA it is one fast kernel.
    """
    probabilities = logits.softmax(-1)
    if logits.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    uniform = torch.rand(total.shape, generator=generator, dtype=total.dtype)
    # Rounding may lift uniform * total up to the total itself, past the last token of positive probability.
    point = torch.minimum(uniform * total, total * (1 - torch.finfo(total.dtype).eps))
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1)


def next_tokens(logits: Tensor, is_greedy: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Choose the next token of each row: the likeliest one on greedy rows, a drawn one on the others.

    Args:
        logits: `[M, V]` logits of the last position.
        is_greedy: `[M]` bool on the CPU.
        sampling: how the other rows are sampled.
        generator: source of randomness; one number per sampled row is drawn, whatever the other rows do.
    """
    tokens = logits.argmax(-1)
    sampled = (~is_greedy).nonzero().squeeze(-1).to(logits.device)
    if sampled.numel():
        tokens[sampled] = draw(shape_logits(logits[sampled], sampling), generator)
    return tokens
