"""Log-probs, entropies and KL of responses under a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.functional import (
    OutputHead,
    PolicyStatistics,
    TokenStatistics,
    hidden_statistics,
    token_statistics,
)
from remax_lightning.models.forward import accepts_argument, find_head, hidden_states, model_inputs, required_head
from remax_lightning.models.sampling import NO_TOKENS, SuppressedTokens, make_sampling_mask
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
    (rows,) = _forward_batches(prompt, responses)  # all responses in one batch
    log_probs, entropy, _ = row_statistics(model, rows, find_head(model).head, temperature).statistics
    mask = responses.response_mask
    return TokenStatistics(_scatter_tokens([log_probs], mask), _scatter_tokens([entropy], mask))


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
    # ---- Run the policy, a batch of responses at a time ----
    temperature = _temperature(sampling)
    passes: list[PolicyStatistics] = []
    for rows in _forward_batches(rollout.prompt, rollout.sampled, batch_size, trained):
        if rollout.reference_hidden is None or reference is None:
            head, compared = find_head(policy).head, None
        else:
            # A KL over the vocabulary compares whole distributions, which both heads make from hidden states.
            head, other = required_head(policy, "model.policy"), required_head(reference, "model.reference")
            compared = rollout.reference_hidden[rows.token_mask], other  # [K, D']
        passes.append(row_statistics(policy, rows, head, temperature, sampling, suppressed, compared).statistics)
    # ---- Every pass returns its counted tokens in a row, [K]; back to their places, [S, R] ----
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
    # Fail before the first pass rather than after it.
    if keep_hidden:
        required_head(reference, "model.reference")
    for rows in _forward_batches(
        rollout.prompt, rollout.sampled, batch_size or len(mask) // rollout.prompt.num_micro_batches
    ):
        statistics, hidden = row_statistics(
            reference,
            rows,
            find_head(reference).head,
            _temperature(sampling),
            sampling,
            suppressed,
            truncate=False,
        )
        log_probs.append(statistics.log_probs)  # log pi_ref(y_t) [K]
        if keep_hidden and hidden is not None:
            hidden_parts.append(hidden)
    return rollout._replace(
        reference_log_probs=_scatter_tokens(log_probs, mask),
        reference_hidden=_scatter_tokens(hidden_parts, mask) if hidden_parts else None,
    )


def _temperature(sampling: SamplingConfig) -> float:
    # Scaled log-probs are of the distribution that is sampled from, the others of the model itself.
    return sampling.temperature if sampling.scale_log_probs else 1.0


class ForwardBatch(NamedTuple):
    """Prompts and responses side by side, without columns that are padding in every row.

    Args:
        input_ids: `[M, T]` token ids of `M` of the responses with their prompts.
        input_mask: `[M, T]` bool, True on real tokens.
        ids: `[M, L]` the responses alone.
        counted: rows and columns of the `K` counted tokens in `ids`, both `[K]`. Indices in place of a mask, since
            their shape tells `K`; of a mask only its values do.
        token_mask: `[S, R]` bool, where the counted tokens stand among all responses.
    """

    input_ids: Tensor
    input_mask: Tensor
    ids: Tensor
    counted: tuple[Tensor, Tensor]
    token_mask: Tensor


class RowStatistics(NamedTuple):
    """What `row_statistics` returns.

    Args:
        statistics: of the `K` counted tokens, each `[K]`; `kl` only where there is a reference.
        hidden: `[K, D]` the hidden states that predict them; None without a head.
    """

    statistics: PolicyStatistics
    hidden: Tensor | None


def _forward_batches(
    prompt: PromptBatch, responses: Responses, batch_size: int | None = None, chosen: Tensor | None = None
) -> Iterator[ForwardBatch]:
    """Yield batches of `batch_size` responses, and of each batch only those that are True in `chosen`."""
    # Split before choosing: every rank then runs the same number of passes, which sharded weights need.
    numbers = torch.arange(len(responses.response_ids), device=responses.response_ids.device)
    for batch in numbers.split(batch_size or len(numbers)):
        rows = batch if chosen is None else batch[chosen[batch]]  # [M]
        prompts = rows // (len(responses.response_ids) // len(prompt.prompt_ids))  # [M], response i has prompt i // n
        prompt_ids, prompt_mask = prompt.prompt_ids[prompts], prompt.prompt_mask[prompts]  # [M, P]
        # [S, R], True on the tokens of this batch alone
        token_mask = torch.zeros_like(responses.response_mask).index_copy(0, rows, responses.response_mask[rows])
        # Columns that are padding in every row are left out: L tokens of the longest response, T with its prompt.
        first = int(prompt_mask.any(0).long().argmax())
        # At least one column, also where no token counts.
        length = max(1, int(token_mask.sum(-1).max()))
        ids, mask = responses.response_ids[rows, :length], responses.response_mask[rows, :length]  # [M, L]
        input_ids = torch.cat([prompt_ids[:, first:], ids], dim=1)  # [M, T]
        input_mask = torch.cat([prompt_mask[:, first:], mask], dim=1)
        counted_rows, counted_columns = mask.nonzero(as_tuple=True)  # both [K]
        yield ForwardBatch(input_ids, input_mask, ids, (counted_rows, counted_columns), token_mask)


def _scatter_tokens(values: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the values of the tokens under `mask`, `[K]` or `[K, D]` in parts, at their places in `[S, R]`, else 0."""
    joined = torch.cat(list(values))
    mask = mask.view(*mask.shape, *(1 for _ in joined.shape[1:]))
    return joined.new_zeros(*mask.shape[:2], *joined.shape[1:]).masked_scatter(mask, joined)


def row_statistics(
    model: PreTrainedModel,
    rows: ForwardBatch,
    head: OutputHead | None,
    temperature: float = 1.0,
    sampling: SamplingConfig | None = None,
    suppressed: SuppressedTokens = NO_TOKENS,
    reference: tuple[Tensor, OutputHead] | None = None,
    *,
    truncate: bool = True,
) -> RowStatistics:
    """Run `model` once over `rows` and return the statistics of their counted tokens.

    No operator needs the values of its tensors, so `remax plan` runs it on shapes alone.

    Args:
        model: policy or reference.
        rows: prompts with their responses.
        head: the model's output head, see `find_head`; None lets the model compute the logits of all tokens at once.
        temperature: divides the logits.
        sampling: says which tokens `truncate` leaves out; None for none.
        suppressed: tokens that could not be drawn.
        reference: `[K, D']` hidden states of the reference for the counted tokens, and its head, for the KL over the
            vocabulary. Needs `head`.
        truncate: False for the reference, which is compared with the policy but not truncated.
    """
    length, sampling = rows.ids.shape[1], sampling or SamplingConfig()
    # ---- The head cannot be read: the model computes the logits of all response tokens at once ----
    if head is None:
        positions = torch.arange(length, device=rows.ids.device).repeat(len(rows.ids))  # [M * L]
        sampling_mask = make_sampling_mask(sampling, suppressed, positions, truncate=truncate)
        log_probs, entropy = token_statistics(_logits(model, rows), rows.ids, temperature, sampling_mask)  # [M, L]
        return RowStatistics(PolicyStatistics(log_probs[rows.counted], entropy[rows.counted]), None)
    # ---- Hidden states first, then the logits of counted tokens only, a few at a time ----
    # The state before a token predicts it.
    states = hidden_states(model, rows.input_ids, rows.input_mask)  # [M, T, D]
    hidden = states[:, -length - 1 : -1][rows.counted]  # [K, D]
    del states  # free it, unless the backward pass needs it
    positions = rows.counted[1]  # [K], of each token in its response
    statistics = hidden_statistics(
        hidden,
        head,
        rows.ids[rows.counted],
        temperature,
        reference=reference,
        sampling_mask=make_sampling_mask(sampling, suppressed, positions, truncate=truncate),
        reference_mask=make_sampling_mask(sampling, suppressed, positions, truncate=False),
    )
    return RowStatistics(statistics, hidden)


def _logits(model: PreTrainedModel, rows: ForwardBatch) -> Tensor:
    length = rows.ids.shape[1]
    inputs = model_inputs(model, rows.input_ids, rows.input_mask)
    if accepts_argument(model, "logits_to_keep"):
        # The response, and the token before it, which predicts the first of the response.
        inputs["logits_to_keep"] = length + 1
    # [M, L, V]; the logits of the last token predict a token that was not drawn
    return cast(Tensor, model(**inputs, use_cache=False).logits)[:, -length - 1 : -1]
