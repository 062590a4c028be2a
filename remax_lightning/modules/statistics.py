"""Log-probs and entropies of responses under a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from remax_lightning.batch import PromptBatch, Responses
from remax_lightning.functional import TokenStatistics, token_statistics
from remax_lightning.rollout.forward import model_inputs, takes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def response_statistics(
    model: PreTrainedModel, prompt: PromptBatch, responses: Responses, temperature: float = 1.0
) -> TokenStatistics:
    """Run `model` over prompts and responses and return statistics of the response tokens.

    Logits are made at response positions only. Columns that are padding in every row are left out, so padding costs
    nothing and changes nothing.

    Args:
        model: policy or reference.
        prompt: `B` prompts, padded on the left.
        responses: `M = B * n` responses, prompt by prompt, padded on the right.
        temperature: divides the logits.

    Returns:
        Log-probs and entropies `[M, R]`, 0 outside the response mask.
    """
    width = responses.response_ids.shape[1]
    first = int(prompt.prompt_mask.any(0).long().argmax())
    length = max(1, int(responses.response_mask.sum(-1).max()))
    repeats = responses.response_ids.shape[0] // prompt.prompt_ids.shape[0]
    ids = responses.response_ids[:, :length]
    mask = responses.response_mask[:, :length]
    input_ids = torch.cat([prompt.prompt_ids[:, first:].repeat_interleave(repeats, 0), ids], dim=1)
    input_mask = torch.cat([prompt.prompt_mask[:, first:].repeat_interleave(repeats, 0), mask], dim=1)
    inputs = model_inputs(model, input_ids, input_mask)
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = length + 1
    logits = model(**inputs, use_cache=False).logits[:, -length - 1 : -1]
    statistics = token_statistics(logits, ids, temperature)
    return TokenStatistics(*(F.pad(values.masked_fill(~mask, 0.0), (0, width - length)) for values in statistics))
