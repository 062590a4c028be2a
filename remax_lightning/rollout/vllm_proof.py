"""Proof that a vLLM server holds and samples the policy: its responses under the trainer's own passes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.errors import UserError
from remax_lightning.models.sampling import apply_temperature, apply_top_k_top_p, gather_log_probs
from remax_lightning.rollout.base import GenerationRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIMIT, LIMIT_16_BITS = 0.05, 1.0
"""Largest difference in nats between two log-probs of one token that rounding explains, as for the own engines."""
MEAN_LIMIT, MEAN_LIMIT_16_BITS = 0.01, 0.1
"""Largest mean difference: bfloat16 moves single tokens by much and most by little."""
LIKELIHOOD_LIMIT = 6.0
"""Standard errors by which the mean log-prob of drawn tokens may differ from what the policy itself would draw; by
chance it is more in one comparison of 500 million."""
MAX_IMPOSSIBLE = 0.02
"""Share of drawn tokens that the policy could not draw: rounding moves a token over the edge of top-k or top-p."""
_TEMPERATURES = [2.0 ** (step / 8) for step in range(-16, 17)]  # 0.25 to 4
"""Temperatures that a server may sample at by mistake."""


class ProvenRow(NamedTuple):
    """A response that is compared.

    Args:
        url: of the server.
        prompt: `[P]` token ids.
        tokens: `[t]` token ids of the response.
        log_probs: `[t]` that the server returned; None for a greedy response.
    """

    url: str
    prompt: Tensor
    tokens: Tensor
    log_probs: Tensor | None


def log_probs_mode(sampling: SamplingConfig, request: GenerationRequest | None = None) -> str | None:
    """Return which of vLLM's log-probs are those that are trained.

    Args:
        sampling: of the run.
        request: tells whether tokens are suppressed; None goes by `sampling` alone.

    Returns:
        `raw_logprobs` (the model's own), `processed_logprobs` (after suppression, temperature and truncation), None
        where both are the same, or `neither`.
    """
    suppresses = sampling.min_response_length > 0 or (request is not None and bool(request.unused_ids))
    # What differs between the model's own distribution and the one that is sampled from, and whether it is trained.
    parts = [(suppresses, True), (sampling.temperature != 1, sampling.scale_log_probs)]
    parts.append((sampling.truncates, sampling.processed_log_probs))
    trained = {is_trained for differs, is_trained in parts if differs}
    if not trained:
        return None
    if trained == {True}:
        # Tokens without a name in the tokenizer have next to no probability, so that raw log-probs do as well.
        only_unused = sampling.min_response_length == 0 and not any(differs for differs, _ in parts[1:])
        return None if only_unused else "processed_logprobs"
    return "raw_logprobs" if trained == {False} else "neither"


@torch.no_grad()
def prove(model: PreTrainedModel, request: GenerationRequest, rows: list[ProvenRow], *, is_16_bit: bool) -> float:
    """Compare responses of servers with passes of the policy, and return the mean difference of their log-probs.

    Args:
        model: the policy, in eval mode and with full parameters.
        request: that the responses answer.
        rows: sampled responses with the servers' log-probs, and greedy ones.
        is_16_bit: whether a server computes in 16 bits.

    Raises:
        UserError: naming the server and what differs.
    """
    is_16_bit = is_16_bit or model.dtype != torch.float32 or torch.is_autocast_enabled(model.device.type)
    limit, mean_limit = (LIMIT_16_BITS, MEAN_LIMIT_16_BITS) if is_16_bit else (LIMIT, MEAN_LIMIT)
    comparable = log_probs_mode(request.sampling, request) != "neither"
    gaps: list[Tensor] = []
    for url in dict.fromkeys(row.url for row in rows):
        logits = [(row, *_logits(model, request, row)) for row in rows if row.url == url]
        sampled = [_Sampled(row.tokens, row.log_probs.to(raw), raw, possible)
                   for row, raw, possible in logits if row.log_probs is not None]  # fmt: skip
        if comparable and sampled:
            gaps.append(_judge_log_probs(url, sampled, request.sampling, limit, mean_limit))
        _judge_greedy(url, [(row.tokens, possible) for row, _, possible in logits if row.log_probs is None], limit)
        _judge_likelihood(url, sampled, request.sampling)
    return float(torch.cat(gaps).mean()) if gaps else 0.0


class _Sampled(NamedTuple):
    """A sampled response under the trainer.

    Args:
        tokens: `[t]` token ids.
        log_probs: `[t]` the server's.
        raw: `[t, V]` the policy's logits.
        possible: `[t, V]` the same with minus infinity on suppressed tokens.
    """

    tokens: Tensor
    log_probs: Tensor
    raw: Tensor
    possible: Tensor


def _logits(model: Any, request: GenerationRequest, row: ProvenRow) -> tuple[Tensor, Tensor]:
    """Return the policy's logits `[t, V]` of a response, and those with suppressed tokens left out."""
    # [P + t, V]; no mask and no positions, because nothing is padded
    logits = cast(Tensor, model(torch.cat([row.prompt, row.tokens])[None], use_cache=False).logits)[0]
    raw = logits[len(row.prompt) - 1 : -1].float()
    if int(row.tokens.max()) >= raw.shape[-1]:
        raise UserError(
            f"model.rollout: the server {row.url} drew token {int(row.tokens.max())}, and the policy has"
            f" {raw.shape[-1]}; it serves a model with another vocabulary"
        )
    positions = torch.arange(len(row.tokens), device=raw.device)
    return raw, request.suppressed.apply(raw, positions, request.suppressed.ids_by_phase(raw.device))


def _judge_log_probs(
    url: str, rows: list[_Sampled], sampling: SamplingConfig, limit: float, mean_limit: float
) -> Tensor:
    """Return the differences of log-probs, or stop the run with what explains them."""
    expected = [gather_log_probs(row.possible, row.tokens, sampling) for row in rows]
    gaps = _gaps(rows, expected)
    if gaps.max() <= limit and gaps.mean() <= mean_limit:
        return gaps
    # ---- Which other distribution has the server's log-probs? ----
    cause = "it holds other weights, or reads the prompts otherwise"
    raw = [_gather(row.raw, row.tokens) for row in rows]
    processed = [_gather(_sampled_from(row.possible, sampling), row.tokens) for row in rows]
    for what, candidate in (
        ("they are those of the model itself; start it with --logprobs-mode processed_logprobs", raw),
        (
            "they are those of the distribution that is sampled from; start it with --logprobs-mode raw_logprobs",
            processed,
        ),
    ):
        if _gaps(rows, candidate).max() <= limit:
            cause = what
    others = {t: _gaps(rows, [_gather(row.possible / t, row.tokens) for row in rows]).mean() for t in _TEMPERATURES}
    nearest = min(others, key=lambda t: float(others[t]))
    if others[nearest] <= max(mean_limit, 0.2 * float(gaps.mean())) and cause.startswith("it holds"):
        cause = f"they are those of a temperature near {nearest:.2g}, not of {sampling.temperature:g}"
    raise UserError(
        f"model.rollout: the server {url} has log-probs that differ from the trainer's by {float(gaps.mean()):.2g} nats"
        f" in the mean and {float(gaps.max()):.2g} at most, of {len(gaps)} drawn tokens; rounding explains"
        f" {mean_limit:g} and {limit:g}: {cause}"
    )


def _gaps(rows: list[_Sampled], expected: list[Tensor]) -> Tensor:
    """Return all absolute differences; what is no number counts as far off."""
    pairs = zip(rows, expected, strict=True)
    return torch.cat([(row.log_probs - value).abs().nan_to_num(1e4, 1e4) for row, value in pairs])


def _gather(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def _sampled_from(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    return apply_top_k_top_p(apply_temperature(logits, sampling.temperature), sampling)


def _judge_greedy(url: str, rows: list[tuple[Tensor, Tensor]], limit: float) -> None:
    below = [logits.max(-1).values - logits.gather(-1, tokens[:, None]).squeeze(-1) for tokens, logits in rows]
    gap = max((float(value.max()) for value in below), default=0.0)
    if gap > limit:
        raise UserError(
            f"model.rollout: the server {url} has greedy responses with tokens that are {gap:.2g} nats below the most"
            f" likely ones of the trainer; rounding explains {limit:g}: it holds other weights, or decodes otherwise"
        )


def _judge_likelihood(url: str, rows: list[_Sampled], sampling: SamplingConfig) -> None:
    """Stop the run if drawn tokens are more or less likely than draws of the policy are.

    A server may return right log-probs and draw from another distribution. Of a token drawn from p the log-prob has the
    mean `sum p log p` and the variance `sum p (log p)^2 - mean^2`; tokens are drawn one after the other, so the
    variances of their differences from these means add up.
    """
    difference = variance = impossible = count = 0.0
    for row in rows:
        log_probs = _sampled_from(row.possible, sampling).log_softmax(-1)  # [t, V]
        probs, bounded = log_probs.exp(), log_probs.clamp_min(-1e4)  # 0 * -inf is NaN
        mean, square = (probs * bounded).sum(-1), (probs * bounded.square()).sum(-1)  # [t]
        drawn = log_probs.gather(-1, row.tokens[:, None]).squeeze(-1)
        possible = drawn.isfinite()
        count, impossible = count + len(drawn), impossible + float((~possible).sum())
        difference += float((drawn - mean)[possible].sum())
        variance += float((square - mean.square())[possible].sum())
    if impossible > max(1.0, MAX_IMPOSSIBLE * count):
        raise UserError(
            f"model.rollout: the server {url} drew {impossible:.0f} of {count:.0f} tokens that model.sampling leaves"
            " out: it samples from another distribution"
        )
    errors = abs(difference) / math.sqrt(variance) if variance > 1e-6 else 0.0
    if errors > LIKELIHOOD_LIMIT:
        what = "more" if difference > 0 else "less"
        raise UserError(
            f"model.rollout: the server {url} draws tokens that are {what} likely than draws of the policy, by"
            f" {errors:.2g} standard errors over {count:.0f} tokens: it samples at another temperature than"
            f" model.sampling.temperature {sampling.temperature:g}, or truncates otherwise"
        )
