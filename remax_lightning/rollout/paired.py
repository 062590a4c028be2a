"""The own rollout engine: sampled and greedy responses of a prompt decoded together, on the trainer's own weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remax_lightning.rollout.engine import Generated, SamplingConfig
from remax_lightning.rollout.forward import model_inputs, row_prompts, takes
from remax_lightning.rollout.kv_slots import repeat_into_slots
from remax_lightning.rollout.packed import packed_linears
from remax_lightning.rollout.sampling import next_tokens

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

COMPACT_BELOW = 0.5
"""Rows that have ended leave the batch once this share of it is left: the copy of the cache then pays for itself."""


class PairedEngine:
    """One prefill of the `B` prompts, its cache repeated to `N = B * (n + 1)` rows, one decoding loop for all of them.

    The greedy response costs one more row per prompt instead of one more `generate` call, and the prompt is read once.
    Works with every architecture of transformers whose `forward` takes a `Cache`; `HuggingFaceEngine` is for the rest.
    """

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        sampling: SamplingConfig,
        eos_ids: list[int],
        pad_id: int,
        generator: torch.Generator,
        greedy: bool = True,
    ) -> Generated:
        """Write `n` sampled responses and, if `greedy`, one greedy response per prompt; see `RolloutEngine`."""
        num_sampled = len(prompt_ids) * sampling.num_samples
        num_rows = num_sampled + (len(prompt_ids) if greedy else 0)
        with packed_linears(model, num_rows):
            decoding = _Decoding(model, prompt_ids, prompt_mask, sampling, eos_ids, pad_id, greedy)
            for step in range(sampling.max_response_length):
                decoding.choose(step, generator)
                if step + 1 == sampling.max_response_length or not decoding.compact():
                    break
                decoding.advance(step)
        ids = decoding.response_ids
        return Generated(ids[:num_sampled], ids[num_sampled:] if greedy else None)


class _Decoding:
    """The state of one decoding loop. Rows stand sampled first, prompt by prompt, then the greedy ones."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: SamplingConfig,
        eos_ids: list[int],
        pad_id: int,
        greedy: bool,
    ) -> None:
        from transformers import DynamicCache

        self.model, self.sampling = model, sampling
        device = prompt_ids.device
        batch, self.prompt_length = prompt_ids.shape
        self.eos_ids = torch.tensor(eos_ids, device=device)
        rows = row_prompts(prompt_ids, sampling.num_samples, greedy)

        self.cache: DynamicCache = DynamicCache(config=model.config)
        inputs = model_inputs(model, prompt_ids, prompt_mask)
        if takes(model, "logits_to_keep"):
            inputs["logits_to_keep"] = 1
        logits = model(**inputs, past_key_values=self.cache, use_cache=True).logits[:, -1]
        self.logits: Tensor = logits[rows]
        repeat_into_slots(self.cache, rows, sampling.max_response_length)

        self.response_ids = torch.full(
            (len(rows), sampling.max_response_length), pad_id, dtype=torch.long, device=device
        )
        # Row i of the model's batch writes row active[i] of the responses.
        self.active = torch.arange(len(rows), device=device)
        self.is_greedy = torch.arange(len(rows)) >= batch * sampling.num_samples
        self.mask = prompt_mask.new_ones(len(rows), self.prompt_length + sampling.max_response_length)
        self.mask[:, : self.prompt_length] = prompt_mask[rows]
        self.positions = prompt_mask[rows].long().sum(-1, keepdim=True)
        self.ended = torch.zeros(len(rows), dtype=torch.bool, device=device)

    def choose(self, step: int, generator: torch.Generator) -> None:
        """Choose token `step` of every row that has not ended."""
        if step < self.sampling.min_response_length:
            self.logits[:, self.eos_ids] = -torch.inf
        self.tokens = next_tokens(self.logits, self.is_greedy, self.sampling, generator)
        self.response_ids[self.active[~self.ended], step] = self.tokens[~self.ended]
        self.ended |= torch.isin(self.tokens, self.eos_ids)

    def compact(self) -> bool:
        """Let ended rows leave the batch when that pays; return whether any row is left to decode."""
        left = int((~self.ended).sum())
        if left == 0:
            return False
        if left <= COMPACT_BELOW * len(self.ended):
            keep = (~self.ended).nonzero().squeeze(-1)
            self.cache.batch_select_indices(keep)
            self.active, self.tokens, self.mask = self.active[keep], self.tokens[keep], self.mask[keep]
            self.positions, self.ended = self.positions[keep], self.ended[keep]
            self.is_greedy = self.is_greedy[keep.cpu()]
        return True

    def advance(self, step: int) -> None:
        """Feed the chosen tokens and keep the logits that follow them."""
        inputs = {
            "input_ids": self.tokens[:, None],
            "attention_mask": self.mask[:, : self.prompt_length + step + 1].long(),
        }
        if takes(self.model, "position_ids"):
            inputs["position_ids"] = self.positions + step
        self.logits = self.model(**inputs, past_key_values=self.cache, use_cache=True).logits[:, -1]
