"""Choosing the next token of every row: sampled rows follow `SamplingConfig`, greedy ones take the argmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from remax_lightning.config import SamplingConfig
from remax_lightning.errors import UserError
from remax_lightning.models.sampling_mask import apply_temperature, apply_top_k_top_p


def next_tokens(logits: Tensor, num_sampled: int, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Choose the next token of each row: sampled on the first `num_sampled` rows, greedy on the others.

    Args:
        logits: `[M, V]` logits of the last position.
        num_sampled: number of sampled rows; they come first.
        sampling: temperature, top-k, top-p and min-p.
        generator: source of randomness. How much it is advanced depends on the number of sampled rows alone.

    Returns:
        `[M]` token ids.

    Raises:
        UserError: on a CPU, if a row of the logits is no distribution. Elsewhere the host would have to wait for the
            device at every token, and engines call `check_logits` now and then.
    """
    # The first of equal ones, like argmax, in a third of its time.
    highest, greedy = logits[num_sampled:].max(-1)
    if logits.device.type == "cpu":
        _raise_if_any((~highest.isfinite()).sum(), len(highest))
    if num_sampled == 0:
        return greedy
    scaled = apply_temperature(logits[:num_sampled], sampling.temperature)
    return torch.cat([sample(apply_top_k_top_p(scaled, sampling), generator), greedy])


def sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sample one token id per row of `[M, V]` float32 logits, with the method that suits the device."""
    if logits.device.type == "cpu":
        return sample_inverse_cdf(logits, generator)
    return sample_exponential_race(logits, generator)


def sample_exponential_race(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sample `[M]` token ids as the argmin of exponential variables whose rates are the tokens' probabilities.

    This takes four kernels and no synchronization. `torch.multinomial` samples in the same way, but on CUDA it spends
    two thirds of its time on ten more kernels that check that its input is a distribution, which a softmax always is.
    """
    times = torch.empty_like(logits).exponential_(generator=generator)  # [M, V]
    return (logits - times.log_()).argmax(-1)


def sample_inverse_cdf(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sample `[M]` token ids by inverting the cumulative distribution function, with one random number per row.

    On a CPU `torch.multinomial` costs an order of magnitude more. The function is inverted in two steps, first to a
    block of the vocabulary and then within the block, because a cumulative sum over the whole vocabulary would cost
    more than the softmax.
    """
    probs = logits.softmax(-1)
    num_rows, vocab_size = probs.shape
    # Step 1: pick a block of about sqrt(V) tokens.
    block_size = 1 << vocab_size.bit_length() // 2
    blocks = torch.nn.functional.pad(probs, (0, -vocab_size % block_size)).view(num_rows, -1, block_size)  # [M, K, V/K]
    cumulative = blocks.sum(-1).cumsum(-1)  # [M, K]
    uniform = torch.rand(num_rows, 1, generator=generator, dtype=cumulative.dtype)
    _raise_if_any((~cumulative[:, -1].isfinite()).sum(), num_rows)
    point = uniform * cumulative[:, -1:]  # [M, 1]
    block = _search(cumulative, point)
    # Step 2: pick a token within the block, by what is left of the point.
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, block)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, block_size)).squeeze(1).cumsum(-1)  # [M, V/K]
    return (block * block_size + _search(within, (point - before).clamp_min(0.0))).squeeze(-1)


def bad_rows(logits: Tensor) -> Tensor:
    """Return how many rows of `[M, V]` logits hold NaN or plus infinity, or nothing but minus infinity."""
    return (~logits.amax(-1).isfinite()).sum()  # the maximum of a row with a NaN is NaN


def check_logits(logits: Tensor) -> None:
    """Check that every row of `[M, V]` logits is a distribution; the host waits for the device.

    Raises:
        UserError: if one is not. A token drawn from NaN would be the first of the vocabulary, without a word.
    """
    _raise_if_any(bad_rows(logits), len(logits))


def _raise_if_any(count: Tensor, num_rows: int) -> None:
    if isinstance(count, FakeTensor):  # the plan runs on tensors without values
        return
    if count:
        raise UserError(
            f"model.policy: the logits of {int(count)} of {num_rows} responses are not finite, so that no token can be"
            " drawn: its weights are damaged, or its activations overflow. Use another model or an earlier checkpoint;"
            " in training lower model.optimizer.init_args.lr or set trainer.gradient_clip_val, and with float16 set"
            " trainer.precision: bf16-mixed"
        )


def _search(cumulative: Tensor, point: Tensor) -> Tensor:
    """Return `[M, 1]` the first index where a cumulative sum `[M, K]` exceeds the point; its term is never 0."""
    total = cumulative[:, -1:]
    # Rounding may have lifted the point to the total itself, which would give an index past the end.
    point = torch.minimum(point, total * (1 - torch.finfo(total.dtype).eps))
    index: Tensor = torch.searchsorted(cumulative, point, right=True)
    return index
