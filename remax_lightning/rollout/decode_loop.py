"""The decoding loop: all rows of a rollout, a token at a time, in memory that stays where it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.models.forward import model_inputs, takes
from remax_lightning.models.sampling_mask import gather_log_probs
from remax_lightning.rollout.base import GenerationRequest, StopCheck
from remax_lightning.rollout.cast_linear import Packed
from remax_lightning.rollout.sampling import next_tokens
from remax_lightning.rollout.static_cache import (
    attended_length,
    cache_of_slots,
    fill_slots,
    keep_rows,
    layout_of,
    make_slots,
    slot_dtype,
    states_of,
)
from remax_lightning.rollout.step_cache import Recorder

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

STEPS_BETWEEN_LOOKS = 16
"""On CUDA, tokens between two looks at which rows have ended: at each look Python waits for the device, and then the
device for Python. On a CPU every token is looked at."""


class Buffers(NamedTuple):
    """What a decoding step reads and writes.

    Args:
        tokens: `[N, 1]` the tokens that are fed.
        positions: `[N, 1]` their positions.
        mask: `[N, S]` 1 on the slots of real tokens, 0 on padding and on what was not written yet.
        slot: `[1]` the slot that is written next.
        states: `[N, H, S, D]` slots of keys, then values of each layer.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    slot: Tensor
    states: list[Tensor]

    @classmethod
    def make(cls, cache: DynamicCache, num_rows: int, length: int) -> Buffers:
        """Return buffers for `N` rows and `S` slots of a model with such a cache."""
        states = make_slots(cache, num_rows, length)
        zeros = partial(torch.zeros, dtype=torch.long, device=states[0].device)
        return cls(zeros(num_rows, 1), zeros(num_rows, 1), zeros(num_rows, length), zeros(1), states)

    def fit(self, cache: DynamicCache, num_rows: int, length: int) -> bool:
        """Whether they serve such a rollout."""
        rows, slots = self.mask.shape
        return (
            rows >= num_rows
            and slots >= length
            and [_kind(each, each.dtype) for each in self.states]
            == [_kind(each, slot_dtype(each)) for each in states_of(cache)]
        )


def _kind(states: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    return states.shape[1], states.shape[3], dtype, states.device


class Written(NamedTuple):
    """`N` responses: `ids` and `log_probs` `[N, R]`, `stopped_at` `[N]`; see `GenerationOutput`."""

    ids: Tensor
    log_probs: Tensor | None
    stopped_at: Tensor | None


class Decoding:
    """The state of one decoding loop. Rows stand sampled first, prompt by prompt, then the greedy ones.

    Args:
        model: the policy.
        request: prompts, sampling settings, and what to return.
        rows: `[N]` which prompt each row continues.
        recorder: replays the decoding step; None runs the model each time.
        weights: of the model's layers that run on packed ones.
        room: gives buffers for a prefilled cache, rows and slots.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        request: GenerationRequest,
        rows: Tensor,
        recorder: Recorder | None,
        weights: list[Packed],
        room: Callable[[DynamicCache, int, int], Buffers],
    ) -> None:
        from transformers import DynamicCache

        self.model, self.request, self.recorder, self.weights = model, request, recorder, weights
        self.prompt_length, self.num_sampled = request.prompt_ids.shape[1], request.num_sampled
        cache = DynamicCache(config=model.config)
        inputs = model_inputs(model, request.prompt_ids, request.prompt_mask)
        if takes(model, "logits_to_keep"):
            inputs["logits_to_keep"] = 1
        self.logits: Tensor = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1][rows]
        layout = layout_of(cache)
        if layout is None:
            raise UserError(
                f"model.rollout: PairedEngine cannot decode with a {type(model).__name__}, which keeps more than keys"
                " and values; leave model.rollout out, or set it to HuggingFaceEngine"
            )
        self.layout = layout
        length = attended_length(self.prompt_length + request.sampling.max_response_length)
        self.buffers = room(cache, len(rows), length)
        self._fill(cache, request.prompt_mask[rows].long(), rows)
        # Row i of the model's batch writes row active[i] of the responses, until that has ended.
        self.active = torch.arange(len(rows), device=rows.device)
        self.ended = torch.zeros_like(rows, dtype=torch.bool)
        self._inputs: tuple[int, int, tuple[Tensor, ...]] | None = None

    def _fill(self, cache: DynamicCache, mask: Tensor, rows: Tensor) -> None:
        count, buffers = len(rows), self.buffers
        fill_slots(buffers.states, cache, rows, self.prompt_length)
        buffers.mask[:count] = torch.nn.functional.pad(mask, (0, buffers.mask.shape[1] - self.prompt_length))
        buffers.positions[:count, 0] = mask.sum(-1)
        buffers.slot.fill_(self.prompt_length)

    def write(self) -> Written:
        """Write all responses."""
        request, sampling, device = self.request, self.request.sampling, self.active.device
        shape = len(self.active), sampling.max_response_length
        ids = torch.full(shape, request.pad_id, dtype=torch.long, device=device)  # [N, R]
        written = Written(
            ids,
            torch.zeros(shape, dtype=torch.float32, device=device) if request.return_log_probs else None,
            None if request.stop_check is None else torch.zeros_like(ids[:, 0]),
        )
        ends = torch.tensor(request.eos_ids, device=device)
        for step in range(sampling.max_response_length):
            may_end = step >= sampling.min_response_length
            if not may_end:
                self.logits = self.logits.index_fill(1, ends, -torch.inf)
            self.tokens = next_tokens(self.logits, self.num_sampled, sampling, request.generator)
            self._note(written, step)
            self.ended = self.ended | torch.isin(self.tokens, ends)
            if request.stop_check is not None and may_end:
                self._stop(request.stop_check, written, step)
            if step + 1 == sampling.max_response_length or not self._rows_are_left(step):
                break
            self._advance(step)
        return written

    def _note(self, written: Written, step: int) -> None:
        """Write down the tokens of the rows that go on, and their log-probs."""
        written.ids[self.active, step] = self.tokens.masked_fill(self.ended, self.request.pad_id)
        if written.log_probs is not None:
            drawn = slice(0, self.num_sampled)
            values = gather_log_probs(self.logits[drawn], self.tokens[drawn], self.request.sampling)
            written.log_probs[self.active[drawn], step] = values.masked_fill(self.ended[drawn], 0.0)

    def _stop(self, stop_check: StopCheck, written: Written, step: int) -> None:
        """End the rows whose last token completes a stop string."""
        stopped = stop_check(written.ids[self.active, : step + 1]) & ~self.ended
        if written.stopped_at is not None:
            written.stopped_at[self.active] = written.stopped_at[self.active].masked_fill(stopped, step + 1)
        self.ended = self.ended | stopped

    def _rows_are_left(self, step: int) -> bool:
        """Return whether any row is left to decode; let ended ones leave where the others fit into half the batch."""
        if self.active.device.type == "cuda" and (step + 1) % STEPS_BETWEEN_LOOKS:
            return True
        left, size = int((~self.ended).sum()), len(self.ended)
        # By halves: few shapes to record, and the copy of keys and values pays for itself.
        while left and size > 1 and left <= (size + 1) // 2:
            size = (size + 1) // 2
        if left and size < len(self.ended):
            alive, over = (~self.ended).nonzero().squeeze(-1), self.ended.nonzero().squeeze(-1)
            self._keep(torch.cat([alive, over[: size - left]]).sort().values, self.prompt_length + step)
        return left > 0

    def _keep(self, rows: Tensor, filled: int) -> None:
        keep_rows(self.buffers.states, rows, filled)
        for buffer in (self.buffers.positions, self.buffers.mask):
            buffer[: len(rows)] = buffer[rows]
        self.num_sampled = int((rows < self.num_sampled).sum())
        self.active, self.ended, self.tokens = self.active[rows], self.ended[rows], self.tokens[rows]

    def _advance(self, step: int) -> None:
        """Feed the chosen tokens and keep the logits that follow them."""
        count, slot = len(self.active), self.prompt_length + step
        length = attended_length(slot + 1)
        if self._inputs is None or self._inputs[:2] != (count, length):
            self._inputs = count, length, self._views(count, length)
        tokens, positions, mask, *_ = inputs = self._inputs[2]
        tokens[:, 0] = self.tokens
        mask[:, slot] = 1
        if self.recorder is None:
            self.logits = self._run(length, *inputs)
        else:
            shape = count, length, self.buffers.mask.shape[1], len(self.weights), self.layout
            self.logits = self.recorder.run(shape, lambda *views: self._run(length, *views), inputs)
        positions.add_(1)
        self.buffers.slot.add_(1)

    def _views(self, count: int, length: int) -> tuple[Tensor, ...]:
        tokens, positions, mask, slot, states = self.buffers
        rows = (each[:count] for each in states)
        return tokens[:count], positions[:count], mask[:count, :length], slot, *rows, *(w.weight for w in self.weights)

    def _run(
        self, length: int, tokens: Tensor, positions: Tensor, mask: Tensor, slot: Tensor, *states: Tensor
    ) -> Tensor:
        """Return `[N, V]` logits. This is what is recorded: a function of its arguments and of the model's weights."""
        slots = states[: 2 * len(self.layout)]
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if takes(self.model, "position_ids"):
            inputs["position_ids"] = positions
        cache = cache_of_slots(self.layout, slots, slot, length)
        own = [packed.weight for packed in self.weights]
        for packed, weight in zip(self.weights, states[len(slots) :], strict=True):
            packed.weight = weight
        try:
            logits: Tensor = self.model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
        finally:
            for packed, weight in zip(self.weights, own, strict=True):
                packed.weight = weight
        return logits
