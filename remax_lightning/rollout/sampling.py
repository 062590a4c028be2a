"""Drawing the next token from logits, with nothing but what `SamplingConfig` asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from remax_lightning.functional import SamplingMask
from remax_lightning.rollout.base import SamplingConfig


def truncate(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return `[M, V]` logits over the temperature after top-k, top-p and min-p, dropped tokens at minus infinity."""
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


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Return float32 logits over the temperature."""
    logits = logits.float()
    return logits if temperature == 1 else logits / temperature


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token id per row of `[M, V]` float32 logits, in the way that suits the device."""
    return drawn_by_inversion(logits, generator) if logits.device.type == "cpu" else drawn_by_race(logits, generator)


def drawn_by_race(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw by letting exponential clocks of the tokens' probabilities as rates race: the first to ring is drawn.

    Four kernels that nobody waits for. `torch.multinomial` draws so too, but on CUDA spends two thirds of its time on
    ten more kernels that look whether its input is a distribution, which a softmax is.
    """
    times = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - times.log_()).argmax(-1)


def drawn_by_inversion(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw by inverting the distribution function, at one random number a row.

    On a CPU `torch.multinomial` costs an order of magnitude more. The function is inverted in two steps, first to a
    block of the vocabulary and then within it, because a running sum over all of it would cost more than the softmax.
    """
    probabilities = logits.softmax(-1)
    rows, vocabulary = probabilities.shape
    size = 1 << vocabulary.bit_length() // 2
    blocks = torch.nn.functional.pad(probabilities, (0, -vocabulary % size)).view(rows, -1, size)
    cumulative = blocks.sum(-1).cumsum(-1)
    uniform = torch.rand(rows, 1, generator=generator, dtype=cumulative.dtype)
    point = uniform * cumulative[:, -1:]
    block = _inverse(cumulative, point)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, block)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, size)).squeeze(1).cumsum(-1)
    return (block * size + _inverse(within, (point - before).clamp_min(0.0))).squeeze(-1)


def _inverse(cumulative: Tensor, point: Tensor) -> Tensor:
    """Return `[M, 1]` the first place where a running sum `[M, K]` is above the point, so one that it grew at."""
    total = cumulative[:, -1:]
    # Rounding may have lifted the point up to the total itself, past the last place.
    below = torch.minimum(point, total * (1 - torch.finfo(total.dtype).eps))
    place: Tensor = torch.searchsorted(cumulative, below, right=True)
    return place


def next_tokens(logits: Tensor, num_sampled: int, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Choose the next token of each row: a drawn one on the first `num_sampled` rows, the likeliest on the others.

    Args:
        logits: `[M, V]` logits of the last position.
        num_sampled: rows that are sampled; they stand first.
        sampling: how.
        generator: source of randomness; what it is asked for depends on the number of sampled rows alone.
    """
    likeliest = logits[num_sampled:].max(-1).indices  # the first of equal ones, as argmax, at a third of its time
    if num_sampled == 0:
        return likeliest
    shaped = truncate(tempered(logits[:num_sampled], sampling.temperature), sampling)
    return torch.cat([draw(shaped, generator), likeliest])


def kept_tokens(sampling: SamplingConfig) -> SamplingMask | None:
    """Return what says which tokens the policy's log-probs are over, of logits over the temperature of log-probs.

    None for all tokens.
    """
    if not (sampling.truncate_log_probs and sampling.truncates):
        return None
    temperature = 1.0 if sampling.scale_log_probs else sampling.temperature
    return lambda logits: truncate(tempered(logits, temperature), sampling) > -torch.inf


def log_probs_of(logits: Tensor, tokens: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return `[M]` log-probs of `tokens` in nats, float32, as the training pass makes them for the same `sampling`.

    Args:
        logits: `[M, V]` of the last position.
        tokens: `[M]` token ids.
        sampling: `scale_log_probs` says whether they are over the temperature, `truncate_log_probs` whether the dropped
            tokens are left out of the distribution.
    """
    scaled = tempered(logits, sampling.temperature if sampling.scale_log_probs else 1.0)
    kept = kept_tokens(sampling)
    if kept is not None:
        scaled = scaled.masked_fill(~kept(scaled), -torch.inf)
    return scaled.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
