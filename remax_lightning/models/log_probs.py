"""Log-probs, entropies and KL of responses under a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.functional import (
    PolicyStatistics,
    TokenStatistics,
    hidden_statistics,
    token_statistics,
)
from remax_lightning.models.forward import accepts_argument, model_inputs
from remax_lightning.models.lm_head import find_head, hidden_states, required_head
from remax_lightning.models.sampling_mask import NO_TOKENS, SuppressedTokens, make_sampling_mask
from remax_lightning.types import PromptBatch, Responses, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def response_statistics(
    model: PreTrainedModel, prompt: PromptBatch, responses: Responses, temperature: float = 1.0
) -> TokenStatistics:
    """Run `model` over prompts and responses and return statistics of the response tokens.

    Logits are made for counted tokens only, a few at a time, where the model's head can be read; otherwise at response
    positions. Columns that are padding in every row are left out, so padding costs nothing and changes nothing.

    Args:
        model: policy or reference.
        prompt: `B` prompts, padded on the left.
        responses: `M = B * n` responses, prompt by prompt, padded on the right.
        temperature: divides the logits.

    Returns:
        Log-probs and entropies `[M, R]`, 0 outside the response mask.
    """
    (rows,) = _forward_batches(prompt, responses)
    statistics = _statistics(model, rows, temperature, SamplingConfig(), NO_TOKENS)[0]
    return TokenStatistics(*(_scatter_tokens([values], responses.response_mask) for values in statistics))


def policy_statistics(
    policy: PreTrainedModel,
    rollout: Rollout,
    sampling: SamplingConfig,
    reference: PreTrainedModel | None = None,
    trained: Tensor | None = None,
    batch_size: int | None = None,
    suppressed: SuppressedTokens = NO_TOKENS,
) -> PolicyStatistics:
    """Return the statistics of the sampled responses, each `[S, R]` and 0 outside the response mask.

    The KL over the vocabulary is among them where the rollout holds the reference's hidden states.

    Args:
        policy: the model that is trained.
        rollout: the responses.
        sampling: what the log-probs are of.
        reference: whose hidden states the rollout may hold.
        trained: `[S]` bool, the responses that are run; the others' statistics are 0. None for all.
        batch_size: responses per forward pass, counting those that are not run; None for all at once.
        suppressed: tokens that could not be drawn; neither the policy nor the reference counts them.

    Raises:
        UserError: if the KL over the vocabulary is asked for and a model's head cannot be read.
    """
    temperature = _temperature(sampling)
    passes: list[PolicyStatistics] = []
    for rows in _forward_batches(rollout.prompt, rollout.sampled, batch_size, trained):
        if rollout.reference_hidden is None or reference is None:
            passes.append(PolicyStatistics(*_statistics(policy, rows, temperature, sampling, suppressed)[0]))
            continue
        head, other = required_head(policy, "model.policy"), required_head(reference, "model.reference")
        reference_inputs = rollout.reference_hidden[rows.token_mask], other
        hidden, ids = _predicting_states(policy, rows), rows.ids[rows.mask]  # [M, D], [M]
        passes.append(
            hidden_statistics(
                hidden,
                head,
                ids,
                temperature,
                reference=reference_inputs,
                sampling_mask=make_sampling_mask(sampling, suppressed, rows.positions),
                reference_mask=make_sampling_mask(sampling, suppressed, rows.positions, truncate=False),
            )
        )
    mask = rollout.sampled.response_mask if trained is None else rollout.sampled.response_mask & trained[:, None]
    log_probs, entropy, kl = zip(*passes, strict=True)
    return PolicyStatistics(
        _scatter_tokens(log_probs, mask),
        _scatter_tokens(entropy, mask),
        None if None in kl else _scatter_tokens(kl, mask),
    )


def with_reference(
    rollout: Rollout,
    reference: PreTrainedModel,
    sampling: SamplingConfig,
    keep_hidden: bool = False,
    batch_size: int | None = None,
    suppressed: SuppressedTokens = NO_TOKENS,
) -> Rollout:
    """Return `rollout` with the log-probs of its sampled tokens under the reference.

    Call it under `no_grad`. `inference_mode` would not do: autograd refuses to save its tensors for a backward pass,
    and the hidden states are needed there.

    Args:
        rollout: the responses.
        reference: the frozen model.
        sampling: its temperature divides the logits.
        keep_hidden: keep the reference's hidden states too, for the KL over the vocabulary.
        batch_size: responses per forward pass; None for those of a training pass, the rollout's share of
            `num_micro_batches`.
        suppressed: tokens that could not be drawn, which the reference does not count either.

    Raises:
        UserError: if `keep_hidden` and the reference's head cannot be read.
    """
    log_probs, hidden_parts, mask = [], [], rollout.sampled.response_mask
    if keep_hidden:
        required_head(reference, "model.reference")
    for rows in _forward_batches(
        rollout.prompt, rollout.sampled, batch_size or len(mask) // rollout.prompt.num_micro_batches
    ):
        statistics, hidden = _statistics(reference, rows, _temperature(sampling), sampling, suppressed, truncate=False)
        log_probs.append(statistics.log_probs)
        if keep_hidden and hidden is not None:
            hidden_parts.append(hidden)
    return rollout._replace(
        reference_log_probs=_scatter_tokens(log_probs, mask),
        reference_hidden=_scatter_tokens(hidden_parts, mask) if hidden_parts else None,
    )


def _temperature(sampling: SamplingConfig) -> float:
    return sampling.temperature if sampling.scale_log_probs else 1.0


class _ForwardBatch(NamedTuple):
    """Prompts and responses side by side, without columns that are padding in every row.

    Args:
        input_ids: `[M, T]` token ids of `M` of the responses with their prompts.
        input_mask: `[M, T]` bool, True on real tokens.
        ids: `[M, L]` the responses alone.
        mask: `[M, L]` their mask.
        token_mask: `[S, R]` bool, where the counted tokens stand among all responses.
    """

    input_ids: Tensor
    input_mask: Tensor
    ids: Tensor
    mask: Tensor
    token_mask: Tensor

    @property
    def positions(self) -> Tensor:
        """Position in its response of each counted token, `[M * L]` in the order of `ids[mask]`."""
        return self.mask.nonzero()[:, 1]


def _forward_batches(
    prompt: PromptBatch, responses: Responses, batch_size: int | None = None, chosen: Tensor | None = None
) -> Iterator[_ForwardBatch]:
    """Yield `batch_size` responses after the other, only those of them that are True in `chosen`."""
    # Batches first: all ranks then make as many passes, whatever is chosen, and weights in shards ask for that.
    numbers = torch.arange(len(responses.response_ids), device=responses.response_ids.device)
    for rows in numbers.split(batch_size or len(numbers)):
        yield _make_forward_batch(prompt, responses, rows if chosen is None else rows[chosen[rows]])


def _make_forward_batch(prompt: PromptBatch, responses: Responses, rows: Tensor) -> _ForwardBatch:
    prompts = rows // (len(responses.response_ids) // len(prompt.prompt_ids))
    prompt_ids, prompt_mask = prompt.prompt_ids[prompts], prompt.prompt_mask[prompts]
    token_mask = torch.zeros_like(responses.response_mask).index_copy(0, rows, responses.response_mask[rows])
    first = int(prompt_mask.any(0).long().argmax())
    length = max(1, int(token_mask.sum(-1).max()))
    ids, mask = responses.response_ids[rows, :length], responses.response_mask[rows, :length]
    input_ids = torch.cat([prompt_ids[:, first:], ids], dim=1)
    input_mask = torch.cat([prompt_mask[:, first:], mask], dim=1)
    return _ForwardBatch(input_ids, input_mask, ids, mask, token_mask)


def _scatter_tokens(values: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the values of the tokens under `mask`, `[M]` or `[M, D]` in parts, at their places in `[S, R]`, else 0."""
    joined = torch.cat(list(values))
    mask = mask.view(*mask.shape, *(1 for _ in joined.shape[1:]))
    return joined.new_zeros(*mask.shape[:2], *joined.shape[1:]).masked_scatter(mask, joined)


def _statistics(
    model: PreTrainedModel,
    rows: _ForwardBatch,
    temperature: float,
    sampling: SamplingConfig,
    suppressed: SuppressedTokens,
    *,
    truncate: bool = True,
) -> tuple[TokenStatistics, Tensor | None]:
    """Return the statistics `[M]` of the counted tokens, and the hidden states behind them if the head can be read."""
    head, ids = find_head(model).head, rows.ids[rows.mask]
    if head is None:
        positions = torch.arange(rows.ids.shape[1], device=ids.device).repeat(len(rows.ids))  # [M * L]
        sampling_mask = make_sampling_mask(sampling, suppressed, positions, truncate=truncate)
        statistics = token_statistics(_logits(model, rows), rows.ids, temperature, sampling_mask)
        return TokenStatistics(*(values[rows.mask] for values in statistics)), None
    sampling_mask = make_sampling_mask(sampling, suppressed, rows.positions, truncate=truncate)
    hidden = _predicting_states(model, rows)
    return TokenStatistics(*hidden_statistics(hidden, head, ids, temperature, sampling_mask=sampling_mask)[:2]), hidden


def _predicting_states(model: PreTrainedModel, rows: _ForwardBatch) -> Tensor:
    """Return the hidden states that predict the counted tokens, one row for each."""
    length = rows.ids.shape[1]
    return hidden_states(model, rows.input_ids, rows.input_mask)[:, -length - 1 : -1][rows.mask]


def _logits(model: PreTrainedModel, rows: _ForwardBatch) -> Tensor:
    length = rows.ids.shape[1]
    inputs = model_inputs(model, rows.input_ids, rows.input_mask)
    if accepts_argument(model, "logits_to_keep"):
        inputs["logits_to_keep"] = length + 1
    return cast(Tensor, model(**inputs, use_cache=False).logits)[:, -length - 1 : -1]
