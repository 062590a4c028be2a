"""Log-probs, entropies and KL of responses under a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.functional import OutputHead, TokenStatistics, hidden_statistics, token_statistics
from remax_lightning.models.forward import accepts_argument, find_head, hidden_states, model_inputs, required_head
from remax_lightning.models.last_mlp import skip_unread_tokens
from remax_lightning.models.packing import packed_texts, packing_obstacle
from remax_lightning.models.sampling import NO_TOKENS, SuppressedTokens, make_sampling_mask
from remax_lightning.sharding import unwrap_peft
from remax_lightning.types import PromptBatch, Responses, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def response_statistics(
    model: PreTrainedModel,
    prompt: PromptBatch,
    responses: Responses,
    temperature: float = 1.0,
    *,
    packed: bool = False,
    entropy: bool = True,
) -> TokenStatistics:
    """Run `model` over prompts and responses and return statistics of the response tokens.

    Logits are made for counted tokens only, a few at a time, where the model's head can be read; otherwise at response
    positions. Columns that are padding in every row are left out, so padding costs nothing and changes nothing.

    Args:
        model: policy or reference.
        prompt: `B` prompts, padded on the left.
        responses: `M = B * n` responses, prompt by prompt, padded on the right.
        temperature: divides the logits.
        packed: run one packed row, where the model can be packed; otherwise padded rows.
        entropy: whether entropies are among the statistics.

    Returns:
        Log-probs and entropies `[M, R]`, 0 outside the response mask.
    """
    (rows,) = _forward_batches(model if packed else None, prompt, responses)  # all responses in one batch
    sampling = SamplingConfig(temperature=temperature)
    statistics, _ = row_statistics(model, rows, find_head(model).head, sampling, entropy=entropy)
    return _in_their_places([statistics], [rows.places], responses.response_mask.shape)


def policy_statistics(
    policy: PreTrainedModel,
    rollout: Rollout,
    sampling: SamplingConfig,
    reference: PreTrainedModel | None = None,
    trained: Tensor | None = None,
    batch_size: int | Sequence[Tensor] | None = None,
    suppressed: SuppressedTokens = NO_TOKENS,
    *,
    packed: bool = True,
    entropy: bool = True,
    squared_norm: bool = False,
) -> TokenStatistics:
    """Return the statistics of the sampled responses, each `[S, R]` and 0 outside the response mask.

    The KL over the vocabulary is among them where the rollout holds the reference's hidden states.

    Args:
        policy: the model that is trained.
        rollout: the responses.
        sampling: what the log-probs are of.
        reference: whose hidden states the rollout may hold.
        trained: `[S]` bool, the responses that are run; the others' statistics are 0. None for all.
        batch_size: responses per forward pass, counting those that are not run, or the numbers of the responses of
            each pass; None for all at once.
        suppressed: tokens that could not be drawn; neither the policy nor the reference counts them.
        packed: run packed rows, where the policy can be packed; False runs padded rows.
        entropy: whether entropies are among them.
        squared_norm: whether the squared norms of gradients are.

    Raises:
        UserError: if the KL over the vocabulary is asked for and a model's head cannot be read.
    """
    # ---- Run the policy, a batch of responses at a time ----
    passes: list[TokenStatistics] = []
    places: list[Tensor] = []
    for rows in _forward_batches(policy if packed else None, rollout.prompt, rollout.sampled, batch_size, trained):
        if rollout.reference_hidden is None or reference is None:
            head, compared = find_head(policy).head, None
        else:
            # A KL over the vocabulary compares whole distributions, which both heads make from hidden states.
            head, other = required_head(policy, "model.policy"), required_head(reference, "model.reference")
            compared = rollout.reference_hidden.flatten(0, 1)[rows.places], other  # [K, D']
        statistics, _ = row_statistics(
            policy, rows, head, sampling, suppressed, compared, entropy=entropy, squared_norm=squared_norm
        )
        passes.append(statistics)
        places.append(rows.places)
    return _in_their_places(passes, places, rollout.sampled.response_mask.shape)


def with_reference(
    rollout: Rollout,
    reference: PreTrainedModel,
    sampling: SamplingConfig,
    keep_hidden: bool = False,
    batch_size: int | Sequence[Tensor] | None = None,
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
        batch_size: responses per forward pass, or the numbers of the responses of each pass; None for those of a
            training pass, the rollout's share of `num_micro_batches`.
        suppressed: tokens that could not be drawn, which the reference does not count either.

    Raises:
        UserError: if `keep_hidden` and the reference's head cannot be read.
    """
    log_probs, hidden_parts, places, mask = [], [], [], rollout.sampled.response_mask
    # Fail before the first pass rather than after it.
    if keep_hidden:
        required_head(reference, "model.reference")
    batch_size = batch_size or len(mask) // rollout.prompt.num_micro_batches
    for rows in _forward_batches(reference, rollout.prompt, rollout.sampled, batch_size):
        head = find_head(reference).head
        statistics, hidden = row_statistics(reference, rows, head, sampling, suppressed, truncate=False, entropy=False)
        log_probs.append(statistics.log_probs)  # log pi_ref(y_t) [K]
        places.append(rows.places)
        if keep_hidden and hidden is not None:
            hidden_parts.append(hidden)
    return rollout._replace(
        reference_log_probs=_scatter_tokens(log_probs, places, mask.shape),
        reference_hidden=_scatter_tokens(hidden_parts, places, mask.shape) if hidden_parts else None,
    )


class ForwardBatch(NamedTuple):
    """Prompts with their responses behind them, and which of their tokens count.

    Args:
        input_ids: `[M, T]` token ids of `M` of the responses with their prompts, padded on the left; packed, they are
            one row `[1, T]`.
        input_mask: `[M, T]` bool, True on real tokens.
        length: `L`, columns at the end that hold all of the counted tokens; packed, all.
        predicting: `[K]` where the states that predict the `K` counted tokens stand among the `M * T`. Indices in place
            of a mask, since their shape tells `K`; of a mask only its values do.
        targets: `[K]` ids of the counted tokens.
        positions: `[K]` their positions in their responses.
        places: `[K]` where they stand among the `S * R` tokens of all responses.
        texts: tokens of each text of a packed row; None for padded rows.
    """

    input_ids: Tensor
    input_mask: Tensor
    length: int
    predicting: Tensor
    targets: Tensor
    positions: Tensor
    places: Tensor
    texts: list[int] | None = None


class RowStatistics(NamedTuple):
    """What `row_statistics` returns.

    Args:
        statistics: of the `K` counted tokens, each `[K]`; `kl` only where there is a reference.
        hidden: `[K, D]` the hidden states that predict them; None without a head.
    """

    statistics: TokenStatistics
    hidden: Tensor | None


def _forward_batches(
    model: PreTrainedModel | None,
    prompt: PromptBatch,
    responses: Responses,
    batch_size: int | Sequence[Tensor] | None = None,
    chosen: Tensor | None = None,
) -> Iterator[ForwardBatch]:
    """Yield the batches of the passes, and of each batch only the responses that are True in `chosen`.

    They are packed where `model` can be and it saves padding, and padded without one.
    """
    num_samples = len(responses.response_ids) // len(prompt.prompt_ids)
    lengths = prompt.prompt_mask.sum(1).repeat_interleave(num_samples) + responses.response_mask.sum(1)  # [S]
    # Of the rows that are run, as the plan of a budget counts.
    longest = int((lengths if chosen is None else lengths * chosen).max())
    packs = model is not None and not packing_obstacle(model, longest)
    numbers = torch.arange(len(responses.response_ids), device=responses.response_ids.device)
    is_size = batch_size is None or isinstance(batch_size, int)
    batches = numbers.split(batch_size or len(numbers)) if is_size else batch_size
    # Split before choosing: every rank then runs the same number of passes, which sharded weights need.
    for batch in cast("Sequence[Tensor]", batches):
        rows = batch if chosen is None else batch[chosen[batch]]
        # Rows of one length have no padding to save, and no mask: they run as they are.
        has_padding = packs and len(rows) > 1 and bool((lengths[rows] != lengths[rows[0]]).any())
        yield (_pack if has_padding else _pad_left)(prompt, responses, rows)


def _pad_left(prompt: PromptBatch, responses: Responses, rows: Tensor) -> ForwardBatch:
    """Return the responses `rows` `[M]` directly behind their prompts, padded to the longest row."""
    (num_responses, width), num_prompt_tokens = responses.response_ids.shape, prompt.prompt_ids.shape[1]  # S, R, P
    prompts = rows // (num_responses // len(prompt.prompt_ids))  # [M], response i has prompt i // n
    ids = torch.cat([prompt.prompt_ids[prompts], responses.response_ids[rows]], dim=1)  # [M, P + R]
    mask = torch.cat([prompt.prompt_mask[prompts], responses.response_mask[rows]], dim=1)
    # ---- Real tokens to the right, in their order; columns that are padding in every row are left out ----
    longest = max(2, int(mask.sum(1).max())) if len(rows) else 2  # T
    columns = mask.long().argsort(dim=1, stable=True)[:, -longest:]  # [M, T]
    input_ids, input_mask = ids.gather(1, columns), mask.gather(1, columns)
    # ---- The counted tokens are those of responses; the state before a token predicts it ----
    row, column = (input_mask & (columns >= num_prompt_tokens)).nonzero(as_tuple=True)  # both [K]
    positions = columns[row, column] - num_prompt_tokens  # [K]
    # At least one column, also where no token counts.
    length = max(1, longest - int(column.min())) if len(column) else 1  # L
    return ForwardBatch(
        input_ids,
        input_mask,
        length,
        predicting=row * longest + column - 1,
        targets=input_ids[row, column],
        positions=positions,
        places=rows[row] * width + positions,
    )


def _pack(prompt: PromptBatch, responses: Responses, rows: Tensor) -> ForwardBatch:
    """Return the responses `rows` `[M]` behind their prompts, all in one row without padding."""
    (num_responses, width), num_prompt_tokens = responses.response_ids.shape, prompt.prompt_ids.shape[1]  # S, R, P
    prompts = rows // (num_responses // len(prompt.prompt_ids))  # [M], response i has prompt i // n
    mask = torch.cat([prompt.prompt_mask[prompts], responses.response_mask[rows]], dim=1)  # [M, P + R]
    row, column = mask.nonzero(as_tuple=True)  # both [T], text by text
    ids = torch.cat([prompt.prompt_ids[prompts], responses.response_ids[rows]], dim=1)[row, column]  # [T]
    # ---- The counted tokens are those of responses; the state before a token predicts it ----
    (counted,) = (column >= num_prompt_tokens).nonzero(as_tuple=True)  # [K]
    positions = column[counted] - num_prompt_tokens  # [K]
    return ForwardBatch(
        ids[None],
        torch.ones_like(ids[None], dtype=torch.bool),
        len(ids),
        predicting=counted - 1,
        targets=ids[counted],
        positions=positions,
        places=rows[row[counted]] * width + positions,
        texts=mask.sum(1).tolist(),
    )


def _in_their_places(
    passes: Sequence[TokenStatistics], places: Sequence[Tensor], shape: Sequence[int]
) -> TokenStatistics:
    """Return the statistics of passes, each of their counted tokens `[K]`, at their places in `[S, R]`."""
    columns = zip(*passes, strict=True)  # log-probs of all passes, entropies of all passes, ...
    values = (None if column[0] is None else _scatter_tokens(column, places, shape) for column in columns)
    return TokenStatistics(*cast("Iterator[Tensor]", values))


def _scatter_tokens(values: Sequence[Tensor], places: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return values of tokens, `[K]` or `[K, D]` in parts, at their places in `[S, R]`, and 0 elsewhere."""
    joined = torch.cat(list(values))
    flat = joined.new_zeros(shape[0] * shape[1], *joined.shape[1:])
    return flat.index_copy(0, torch.cat(list(places)), joined).view(*shape, *joined.shape[1:])


def row_statistics(
    model: PreTrainedModel,
    rows: ForwardBatch,
    head: OutputHead | None,
    sampling: SamplingConfig,
    suppressed: SuppressedTokens = NO_TOKENS,
    reference: tuple[Tensor, OutputHead] | None = None,
    *,
    truncate: bool = True,
    entropy: bool = True,
    squared_norm: bool = False,
) -> RowStatistics:
    """Run `model` once over `rows` and return the statistics of their counted tokens.

    No operator needs the values of its tensors, so `remax plan` runs it on shapes alone.

    Args:
        model: policy or reference.
        rows: prompts with their responses.
        head: the model's output head, see `find_head`; None lets the model compute the logits of all tokens at once.
        sampling: what the log-probs are of: its temperature divides the logits, and its truncation leaves tokens out.
        suppressed: tokens that could not be drawn.
        reference: `[K, D']` hidden states of the reference for the counted tokens, and its head, for the KL over the
            vocabulary. Needs `head`.
        truncate: False for the reference, which is compared with the policy but not truncated.
        entropy: whether entropies are computed.
        squared_norm: whether squared norms of gradients are.
    """
    # Scaled log-probs are of the distribution that is sampled from, the others of the model itself.
    temperature = sampling.temperature if sampling.scale_log_probs else 1.0
    sampling_mask = make_sampling_mask(sampling, suppressed, rows.positions, truncate=truncate)
    # ---- One pass, to hidden states; where the head cannot be read, the model computes the logits itself ----
    with skip_unread_tokens(model, rows.predicting):
        outputs = (_counted_logits if head is None else _counted_states)(model, rows)  # [K, V] or [K, D]
    if head is None:
        logits, ids = outputs[None], rows.targets[None]  # [1, K, V], [1, K]
        asked = {"entropy": entropy, "squared_norm": squared_norm}
        columns = token_statistics(logits, ids, temperature, sampling_mask, **asked)  # [1, K] each
        values = (None if column is None else column[0] for column in columns)
        return RowStatistics(TokenStatistics(*cast("Iterator[Tensor]", values)), None)
    # ---- The logits of counted tokens only, a few at a time ----
    statistics = hidden_statistics(
        outputs,
        head,
        rows.targets,
        temperature,
        reference=reference,
        sampling_mask=sampling_mask,
        reference_mask=None
        if reference is None
        else make_sampling_mask(sampling, suppressed, rows.positions, truncate=False),
        entropy=entropy,
        squared_norm=squared_norm,
    )
    return RowStatistics(statistics, outputs)


def _counted_states(model: PreTrainedModel, rows: ForwardBatch) -> Tensor:
    """Return `[K, D]` hidden states that predict the counted tokens."""
    if rows.texts is None:
        states = hidden_states(model, rows.input_ids, rows.input_mask)  # [M, T, D]
    else:
        with packed_texts(model, rows.texts, rows.input_ids) as packed:
            states = unwrap_peft(model).base_model(**packed.inputs, use_cache=False).last_hidden_state  # [1, T, D]
    return states.flatten(0, 1)[rows.predicting]


def _counted_logits(model: PreTrainedModel, rows: ForwardBatch) -> Tensor:
    """Return `[K, V]` logits that predict the counted tokens, of a model that computes them itself."""
    keeps = accepts_argument(model, "logits_to_keep")
    # ---- One packed row: the model is asked for the counted tokens alone, where it can be ----
    if rows.texts is not None:
        with packed_texts(model, rows.texts, rows.input_ids) as packed:
            asked = {"logits_to_keep": rows.predicting} if keeps else {}
            logits = cast(Tensor, model(**packed.inputs, **asked, use_cache=False).logits)[0]  # [K or T, V]
        return logits if keeps else logits[rows.predicting]
    # ---- Padded rows: of the last columns ----
    inputs = model_inputs(model, rows.input_ids, rows.input_mask)
    if keeps:
        # The responses, and the token before them, which predicts the first of the longest one.
        inputs["logits_to_keep"] = rows.length + 1
    # The logits of the last token predict a token that was not drawn.
    logits = cast(Tensor, model(**inputs, use_cache=False).logits)[:, -rows.length - 1 : -1]  # [M, L, V]
    width = rows.input_ids.shape[1]  # T
    row, column = rows.predicting // width, rows.predicting % width + 1  # both [K], of the counted tokens
    return logits.flatten(0, 1)[row * rows.length + column - (width - rows.length)]
