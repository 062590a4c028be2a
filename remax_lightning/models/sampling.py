"""The sampling distribution: suppressed tokens, temperature, top-k, top-p and min-p, and how tokens are drawn from it.

Rollout engines sample from it and training computes log-probs under it, so both share these functions. Of a model's own
`generation_config` nothing is used: `SamplingConfig` alone decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from remax_lightning.config import SamplingConfig
from remax_lightning.errors import UserError
from remax_lightning.functional import SamplingMask
from remax_lightning.functional.log_probs import mask_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


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


def truncated_logits(logits: Tensor, sampling: SamplingConfig, temperature: float | None = None) -> Tensor:
    """Return float32 logits of what is sampled from: over the temperature, and truncated as transformers does.

    Args:
        logits: `[M, V]`, minus infinity on suppressed tokens.
        sampling: which of top-k, top-p and min-p to apply, in this order, and how.
        temperature: None for that of `sampling`.

    Returns:
        `[M, V]` logits with dropped tokens at minus infinity. The most likely token always stays.
    """
    logits = apply_temperature(logits, sampling.temperature if temperature is None else temperature)
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]  # [M, 1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p < 1:
        logits = apply_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        probs = logits.softmax(-1)
        threshold = sampling.min_p * probs.amax(-1, keepdim=True)  # [M, 1]
        logits = logits.masked_fill(probs < threshold, -torch.inf)
    return logits


def apply_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Set all but the most likely tokens, which together reach `top_p`, to minus infinity.

    A token is dropped if those before it reach `top_p` without it. They are in order of their logits, and those with
    the same logit in order of their ids. The vocabulary is not sorted, which would cost more than all else of a draw.

    Args:
        logits: `[M, V]` float32.
        top_p: the probability to reach.
    """
    # Tensors without values, of the plan, can only take the way of a device that the host does not wait for.
    if logits.device.type == "cpu" and not isinstance(logits, FakeTensor):
        return _top_p_of_likeliest(logits, top_p)
    return _top_p_by_digits(logits, top_p)


LIKELIEST = 256
"""Tokens among which a CPU looks for the end of top-p first."""


def _top_p_of_likeliest(logits: Tensor, top_p: float) -> Tensor:
    """Apply top-p on a CPU: to the likeliest tokens, and only rows that need more are sorted."""
    size = min(LIKELIEST, logits.shape[-1])
    total = logits.logsumexp(-1, keepdim=True)  # [M, 1]
    threshold, count = _smallest_kept(logits.topk(size).values, total, top_p)  # [M, 1] each
    is_flat = (count == size).squeeze(-1)  # [M] and may need more
    if size < logits.shape[-1] and is_flat.any():
        # numpy sorts forty times as fast as torch, which would also return the order.
        in_order = -torch.from_numpy(np.sort(-logits[is_flat].detach().numpy(), axis=-1))
        threshold[is_flat], count[is_flat] = _smallest_kept(in_order, total[is_flat], top_p)
    # Nothing is kept of a row that is no distribution, so that nobody draws from it.
    threshold = threshold.where(total.isfinite(), torch.nan)
    kept = logits >= threshold
    tied = (kept.sum(-1) > count.squeeze(-1)).nonzero().squeeze(-1)  # rows that keep some tokens of one logit
    if len(tied):
        at = logits[tied] == threshold[tied]
        kept_of_tie = count[tied] - (logits[tied] > threshold[tied]).sum(-1, keepdim=True)
        kept[tied] &= ~at | (at.cumsum(-1) <= kept_of_tie)
    return torch.where(kept, logits, -torch.inf)


def _smallest_kept(in_order: Tensor, total: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return `[M, 1]` the smallest logit that top-p keeps of `[M, K]` descending ones, and how many it keeps.

    Args:
        in_order: the likeliest tokens.
        total: `[M, 1]` log of the sum of all exponentials.
        top_p: the probability to reach.
    """
    probs = (in_order - total).exp()
    count = (probs.cumsum(-1) - probs < top_p).sum(-1, keepdim=True).clamp_min(1)  # the most likely one stays
    return in_order.gather(-1, count - 1), count


DIGITS = (11, 11, 10)
"""Bits of a logit that are found at once, from the highest."""
UNITS = 2.0**40
"""Probabilities are counted in integers of this, whose sums are the same in any order."""


def _top_p_by_digits(logits: Tensor, top_p: float) -> Tensor:
    """Apply top-p where the host must not wait: find the smallest kept logit digit by digit, by sums of probabilities.

    A CUDA graph can capture it, and it is the same at every call: integers are added.
    """
    mass = (logits.softmax(-1) * UNITS).long()  # [M, V]
    # Integers from 0 in the order of the logits; adding 0 makes one of both zeros.
    bits = (logits + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + 2**31  # [M, V]
    # Of the smallest kept key: its digits so far, and the mass of all tokens above them, less what is to be reached.
    found: Tensor | int = 0  # [M, 1], as is `excess`
    excess: Tensor | int = -int(top_p * UNITS)
    shift = 32
    for number in DIGITS:
        size, is_first, shift = 1 << number, shift == 32, shift - number
        digits = keys >> shift
        # Tokens count that have the digits found so far.
        counted = mass if is_first else mass.where((digits >> number) == found, 0)
        index = digits if is_first else digits & (size - 1)
        upto = mass.new_zeros(len(logits), size).scatter_add_(-1, index, counted).cumsum(-1)  # [M, size]
        # Tokens of a digit are dropped if those of higher digits reach `top_p`. Never are all, but in a row of NaN.
        reached = upto[:, -1:] + excess
        digit = (upto <= reached).sum(-1, keepdim=True).clamp_max(size - 1)  # [M, 1]
        excess = reached - upto.gather(-1, digit)
        found = digit if is_first else (found << number) | digit
    # ---- Of the tokens with the smallest kept logit, the first ones stay ----
    at = keys == found
    stays = at & (at.cumsum(-1) * mass + excess < mass)
    return torch.where((keys > found) | stays, logits, -torch.inf)


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
    waits_for_eos = suppressed.min_response_length > 0 and bool(suppressed.eos_ids)
    suppresses = bool(suppressed.unused_ids) or waits_for_eos
    if not (truncates or suppresses):
        return None
    # Sampling decides at its own temperature, which log-probs leave out if scale_log_probs is False.
    temperature = 1.0 if sampling.scale_log_probs else sampling.temperature
    ids_by_phase = suppressed.ids_by_phase(positions.device)  # copied to the device once, not for every chunk

    def mask(logits: Tensor, rows: slice) -> Tensor:
        if suppresses:
            logits = suppressed.apply(logits, positions[rows], ids_by_phase)
        if truncates:
            logits = truncated_logits(logits, sampling, temperature)
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
    # Suppressed tokens are at minus infinity already, so positions are not read; `tokens` only has their device.
    mask = make_sampling_mask(sampling, NO_TOKENS, tokens)
    if mask is not None:
        scaled = mask_logits(scaled, tokens, mask, slice(None))
    return scaled.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


class Draws(NamedTuple):
    """The random numbers of a step: a row takes its own ones, whichever other rows have left the batch.

    Args:
        total: how many are drawn, one for each sampled row of the rollout.
        rows: `[S']` which of them the sampled rows of the batch take.
    """

    total: int
    rows: Tensor


def next_tokens(
    logits: Tensor,
    num_sampled: int,
    sampling: SamplingConfig,
    generator: torch.Generator,
    truncate: Callable[[Tensor, SamplingConfig], Tensor] = truncated_logits,
    draws: Draws | None = None,
) -> Tensor:
    """Choose the next token of each row: sampled on the first `num_sampled` rows, greedy on the others.

    Args:
        logits: `[M, V]` logits of the last position.
        num_sampled: number of sampled rows; they come first.
        sampling: temperature, top-k, top-p and min-p.
        generator: source of randomness. How much it is advanced depends on the number of sampled rows alone.
        truncate: what computes `truncated_logits`, such as a CUDA graph of it.
        draws: on a CPU, which random numbers the rows take; None: as many as there are rows.

    Returns:
        `[M]` token ids.

    Raises:
        UserError: on a CPU, if a row of the logits is no distribution. Elsewhere the host would have to wait for the
            device at every token, and engines call `check_logits` now and then.
    """
    # The first of equal ones, like argmax, in a third of its time.
    highest, greedy = logits[num_sampled:].max(-1)
    if logits.device.type == "cpu":
        refuse_bad_rows((~highest.isfinite()).sum(), len(highest))
    if num_sampled == 0:
        return greedy
    scaled = truncate(logits[:num_sampled], sampling)  # [S, V]
    if logits.device.type == "cpu":
        return torch.cat([sample_inverse_cdf(scaled, generator, draws), greedy])  # [M]
    return torch.cat([sample_exponential_race(scaled, generator), greedy])  # [M]


def sample_exponential_race(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sample `[M]` token ids as the argmin of exponential variables whose rates are the tokens' probabilities.

    This takes four kernels and no synchronization. `torch.multinomial` samples in the same way, but on CUDA it spends
    two thirds of its time on ten more kernels that check that its input is a distribution, which a softmax always is.
    """
    # With E_v ~ Exp(1), E_v / p_v is smallest at v with probability p_v. In logs that is the largest of
    # log p_v - log E_v, and of logit_v - log E_v: a constant for the whole row changes no argmax.
    times = torch.empty_like(logits).exponential_(generator=generator)  # [M, V]
    return (logits - times.log_()).argmax(-1)


def sample_inverse_cdf(logits: Tensor, generator: torch.Generator, draws: Draws | None = None) -> Tensor:
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
    total, rows = draws or (num_rows, slice(None))
    uniform = torch.rand(total, 1, generator=generator, dtype=cumulative.dtype)[rows]  # [M, 1]
    refuse_bad_rows((~cumulative[:, -1].isfinite()).sum(), num_rows)
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
        UserError: if one is not. A token drawn from NaN would silently be the first of the vocabulary.
    """
    refuse_bad_rows(bad_rows(logits), len(logits))


def refuse_bad_rows(count: Tensor, num_rows: int) -> None:
    """Raise what `check_logits` raises if the number of bad rows, a tensor, is above 0; the host waits for it."""
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


NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
}
"""Settings of transformers that change the sampled distribution, and the value with which they do not."""
IMPLICIT_TOP_K = 50
"""The top-k that transformers 5 uses if sampling is on and none is set."""


def ignored_settings(model: PreTrainedModel, sampling: SamplingConfig) -> dict[str, Any]:
    """Return the settings with which `model.generate` would sample from another distribution than `sampling` says."""
    config: Any = model.generation_config
    if config is None:
        return {}
    settings = {name: getattr(config, name, None) for name in NEUTRAL}
    if settings["top_k"] is None:
        settings["top_k"] = IMPLICIT_TOP_K
    wanted = {name: getattr(sampling, name, neutral) for name, neutral in NEUTRAL.items()}
    return {name: value for name, value in settings.items() if value is not None and value != wanted[name]}


def log_ignored_settings(model: PreTrainedModel, sampling: SamplingConfig) -> None:
    """Log the settings of the model that sampling ignores."""
    ignored = ignored_settings(model, sampling)
    if ignored:
        log.info(
            "responses are sampled as model.sampling says; model.generate would also have taken %s",
            ", ".join(f"{name} {value}" for name, value in ignored.items()),
        )
