"""Log-probs, entropies and KL of responses under a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from remax_lightning.batch import PromptBatch, Responses, Rollout
from remax_lightning.functional import PolicyStatistics, TokenStatistics, hidden_statistics, token_statistics
from remax_lightning.modules.head import find_head, hidden_states, required_head
from remax_lightning.rollout.forward import model_inputs, takes

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
    return _statistics(model, _rows(prompt, responses), temperature)[0]


def policy_statistics(
    policy: PreTrainedModel,
    rollout: Rollout,
    temperature: float = 1.0,
    reference: PreTrainedModel | None = None,
    passes: int = 1,
) -> PolicyStatistics:
    """Return the statistics of the sampled responses, each `[S, R]` and 0 outside the response mask.

    The KL over the vocabulary is among them where the rollout holds the reference's hidden states.

    Args:
        policy: the model that is trained.
        rollout: the responses.
        temperature: divides the logits of both models.
        reference: whose hidden states the rollout may hold.
        passes: into how many forward passes the rollout is divided.

    Raises:
        UserError: if the KL over the vocabulary is asked for and a model's head cannot be read.
    """
    found = []
    for part in (rollout.part(i, passes) for i in range(passes)):
        rows = _rows(part.prompt, part.sampled)
        if part.reference_hidden is None or reference is None:
            found.append(PolicyStatistics(*_statistics(policy, rows, temperature)[0]))
            continue
        head, other = required_head(policy, "model.policy"), required_head(reference, "model.reference")
        kept = part.reference_hidden[part.sampled.response_mask]
        hidden, ids = _predicting(policy, rows), rows.ids[rows.mask]
        values = hidden_statistics(hidden, head, ids, temperature, reference=(kept, other))
        found.append(PolicyStatistics(*(rows.spread(cast(Tensor, each)) for each in values)))
    log_probs, entropy, kl = zip(*found, strict=True)
    return PolicyStatistics(torch.cat(log_probs), torch.cat(entropy), None if None in kl else torch.cat(kl))


def with_reference(
    rollout: Rollout, reference: PreTrainedModel, temperature: float = 1.0, keep_hidden: bool = False
) -> Rollout:
    """Return `rollout` with the log-probs of its sampled tokens under the reference, made in its `num_splits` passes.

    Args:
        rollout: the responses.
        reference: the frozen model.
        temperature: divides the logits.
        keep_hidden: keep the reference's hidden states too, for the KL over the vocabulary.

    Raises:
        UserError: if `keep_hidden` and the reference's head cannot be read.
    """
    passes, log_probs, kept = rollout.prompt.num_splits, [], []
    if keep_hidden:
        required_head(reference, "model.reference")
    for part in (rollout.part(i, passes) for i in range(passes)):
        rows = _rows(part.prompt, part.sampled)
        statistics, hidden = _statistics(reference, rows, temperature)
        log_probs.append(statistics.log_probs)
        if keep_hidden and hidden is not None:
            mask = part.sampled.response_mask
            kept.append(hidden.new_zeros(*mask.shape, hidden.shape[-1]).masked_scatter(mask[..., None], hidden))
    return rollout._replace(
        reference_log_probs=torch.cat(log_probs), reference_hidden=torch.cat(kept) if kept else None
    )


class _Rows(NamedTuple):
    """Prompts and responses side by side, without columns that are padding in every row."""

    input_ids: Tensor
    input_mask: Tensor
    ids: Tensor
    mask: Tensor
    width: int

    def spread(self, values: Tensor) -> Tensor:
        """Return the values of the counted tokens at their places in `[S, R]`, 0 elsewhere."""
        placed = values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)
        return F.pad(placed, (0, self.width - self.mask.shape[1]))


def _rows(prompt: PromptBatch, responses: Responses) -> _Rows:
    first = int(prompt.prompt_mask.any(0).long().argmax())
    length = max(1, int(responses.response_mask.sum(-1).max()))
    repeats = responses.response_ids.shape[0] // prompt.prompt_ids.shape[0]
    ids = responses.response_ids[:, :length]
    mask = responses.response_mask[:, :length]
    input_ids = torch.cat([prompt.prompt_ids[:, first:].repeat_interleave(repeats, 0), ids], dim=1)
    input_mask = torch.cat([prompt.prompt_mask[:, first:].repeat_interleave(repeats, 0), mask], dim=1)
    return _Rows(input_ids, input_mask, ids, mask, responses.response_ids.shape[1])


def _statistics(model: PreTrainedModel, rows: _Rows, temperature: float) -> tuple[TokenStatistics, Tensor | None]:
    """Return the statistics `[S, R]`, and the hidden states that they are made of where the head can be read."""
    head = find_head(model).head
    if head is None:
        statistics = token_statistics(_logits(model, rows), rows.ids, temperature)
        return TokenStatistics(*(rows.spread(values[rows.mask]) for values in statistics)), None
    hidden = _predicting(model, rows)
    log_probs, entropy, _ = hidden_statistics(hidden, head, rows.ids[rows.mask], temperature)
    return TokenStatistics(rows.spread(log_probs), rows.spread(entropy)), hidden


def _predicting(model: PreTrainedModel, rows: _Rows) -> Tensor:
    """Return the hidden states that predict the counted tokens, one row for each."""
    length = rows.ids.shape[1]
    return hidden_states(model, rows.input_ids, rows.input_mask)[:, -length - 1 : -1][rows.mask]


def _logits(model: PreTrainedModel, rows: _Rows) -> Tensor:
    length = rows.ids.shape[1]
    inputs = model_inputs(model, rows.input_ids, rows.input_mask)
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = length + 1
    return cast(Tensor, model(**inputs, use_cache=False).logits)[:, -length - 1 : -1]
