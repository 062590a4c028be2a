"""The decoding loop: one prefill, then all rows of a rollout token by token, in buffers that stay in place.

`decode_attention.py` has what a step attends to; what it cannot run decodes in the masked slots of `static_cache.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.errors import UserError
from remax_lightning.models.forward import (
    accepts_argument,
    model_inputs,
)
from remax_lightning.models.packing import attention_by_name
from remax_lightning.models.sampling import (
    Draws,
    bad_rows,
    gather_log_probs,
    next_tokens,
    refuse_bad_rows,
    truncated_logits,
)
from remax_lightning.rollout.base import GenerationRequest, StopCheck
from remax_lightning.rollout.cuda_graph import StepCache
from remax_lightning.rollout.decode_attention import (
    NAME,
    AttentionStates,
    DecodeAttention,
    RolloutSize,
    RolloutStates,
    StepInputs,
    decode_attention,
    layout_of,
    steps,
)
from remax_lightning.rollout.static_cache import DecodeBuffers

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

log = logging.getLogger(__name__)


EOS_CHECK_INTERVAL = 16
"""On CUDA, tokens between two checks for finished rows, since each check synchronizes the host with the device. On a
CPU, rows are checked at every token."""
ROWS_AT_ONCE = 8
"""On a CPU, a batch shrinks to multiples of these rows, and below to half of them and less. Products with the weights
take as long for 9 rows as for 16. On uneven responses a model of 135 M parameters took 0.93 of the time of halving."""


class DecodeOutput(NamedTuple):
    """`N` responses: `ids` and `log_probs` `[N, R]`, `stopped_at` `[N]`; see `GenerationOutput`."""

    ids: Tensor
    log_probs: Tensor | None
    stopped_at: Tensor | None


def smaller_batch(left: int, size: int, device: torch.device) -> int:
    """Return the rows that a batch of `size` shrinks to when `left` of them are unfinished."""
    if device.type == "cpu":  # each eight rows cost time
        many = left > ROWS_AT_ONCE
        return min(size, -(-left // ROWS_AT_ONCE) * ROWS_AT_ONCE if many else 1 << max(left - 1, 0).bit_length())
    # Halving keeps the number of shapes small, each of which has a graph.
    while left and size > 1 and left <= (size + 1) // 2:
        size = (size + 1) // 2
    return size


class DecodeLoop:
    """The state of one decoding loop. Sampled rows come first, prompt by prompt, then the greedy ones.

    Finished rows leave the batch: row `i` of the model's batch writes row `active[i]` of the responses.

    Args:
        model: the policy.
        request: prompts, sampling settings, and what to return.
        rows: `[N]` index of the prompt that each row continues.
        step_cache: replays the decoding step as a CUDA graph; None runs the model each time.
        allocate: returns the keys and values of a rollout for a prefilled cache and its size.

    Raises:
        UserError: if the model's cache has other states than keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        request: GenerationRequest,
        rows: Tensor,
        step_cache: StepCache | None,
        allocate: Callable[[DynamicCache, RolloutSize], RolloutStates],
    ) -> None:
        from transformers import DynamicCache

        self.model, self.request, self.step_cache = model, request, step_cache
        self.prompt_length, self.num_sampled = request.prompt_ids.shape[1], request.num_sampled
        # ---- Prefill: every prompt once, whatever the number of its rows ----
        cache = DynamicCache(config=model.config)
        inputs = model_inputs(model, request.prompt_ids, request.prompt_mask)
        if accepts_argument(model, "logits_to_keep"):
            # The next token needs the last logits only: [B, 1, V] instead of [B, P, V].
            inputs["logits_to_keep"] = 1
        prompt_logits: Tensor = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]  # [B, V]
        self.logits = prompt_logits[rows]  # [N, V]
        layout = layout_of(cache)
        if layout is None:
            raise UserError(
                f"model.rollout: PairedEngine cannot decode with a {type(model).__name__}, which keeps more than keys"
                " and values; leave model.rollout out, or set it to HuggingFaceEngine"
            )
        self.layout, self.takes_positions = layout, "position_ids" in inputs
        # ---- Keys and values: each prompt's for every one of its rows; the first token goes behind them ----
        size = RolloutSize(len(prompt_logits), len(rows), self.prompt_length, request.sampling.max_response_length)
        self.buffers = allocate(cache, size)
        self.buffers.fill(cache, request.prompt_mask, rows)
        masked = isinstance(self.buffers, DecodeBuffers)
        self.attention = None if masked else DecodeAttention(cast("AttentionStates", self.buffers))
        # ---- Rows: all are active, and none has ended ----
        self.active = torch.arange(len(rows), device=rows.device)  # [M]
        self.ended = torch.zeros_like(rows, dtype=torch.bool)  # [M]
        self._bad_rows = torch.zeros((), dtype=torch.long, device=rows.device)  # the most at a token so far, on CUDA
        # Before and after the minimum length; one copy to the device has the EOS ids, too.
        self._suppressed = request.suppressed.ids_by_phase(rows.device)
        self._step: StepInputs | None = None  # what the last step ran on

    def run(self) -> DecodeOutput:
        """Decode until every row has ended or reached the maximum length.

        Raises:
            UserError: if the logits of any token are not finite; on CUDA with the next check for finished rows.
        """
        request, sampling, device = self.request, self.request.sampling, self.active.device
        # ---- Columns that no row reaches stay padding ----
        shape = len(self.active), sampling.max_response_length
        ids = torch.full(shape, request.pad_id, dtype=torch.long, device=device)  # [N, R]
        output = DecodeOutput(
            ids,
            torch.zeros(shape, dtype=torch.float32, device=device) if request.return_log_probs else None,
            None if request.stop_check is None else torch.zeros_like(ids[:, 0]),
        )
        # The ids that are suppressed before the minimum length are the unused ones, then EOS.
        eos_ids = self._suppressed[0][len(request.unused_ids) :]
        # Top-p alone launches sixty kernels on CUDA; a graph launches them at once.
        truncate = self._truncate_by_graph if self.step_cache is not None and sampling.truncates else truncated_logits
        for step in range(sampling.max_response_length):
            # ---- Choose the next token of every row ----
            self.suppress_tokens(step)
            draws = Draws(request.num_sampled, self.active[: self.num_sampled])
            drawn = self.num_sampled, sampling, request.generator
            self.tokens = next_tokens(self.logits, *drawn, truncate, draws)  # [M]
            self._store_tokens(output, step)
            # ---- Find rows that end here ----
            # Not by `isin`, which sorts where there are many ids, and then waits for the device.
            self.ended = self.ended | (self.tokens[:, None] == eos_ids).any(-1)
            if request.stop_check is not None and step >= sampling.min_response_length:
                self._apply_stop_check(request.stop_check, output, step)
            if step + 1 == sampling.max_response_length:
                if device.type != "cpu":  # on a CPU each token has been checked
                    refuse_bad_rows(torch.maximum(self._bad_rows, bad_rows(self.logits)), len(self.logits))
                break
            if not self._rows_are_left(step):
                break
            if request.progress is not None and (step + 1) % EOS_CHECK_INTERVAL == 0:
                request.progress(step + 1)  # on CUDA, the host has just waited for the device
            # ---- Logits of the next position [M, V] ----
            self.decode_step(step, self.tokens)
        return output

    def _truncate_by_graph(self, logits: Tensor, sampling: SamplingConfig) -> Tensor:
        """Return `truncated_logits`."""
        options = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        key = "truncated", logits.shape, logits.dtype, options
        step_cache = cast(StepCache, self.step_cache)
        return step_cache.run_on_copies(key, partial(truncated_logits, sampling=sampling), (logits,))

    def suppress_tokens(self, step: int) -> None:
        """Set the logits of tokens that cannot be drawn at `step`, a position from 0, to minus infinity."""
        suppressed = self._suppressed[step >= self.request.sampling.min_response_length]
        if len(suppressed):
            self.logits = self.logits.index_fill(1, suppressed, -torch.inf)  # [M, V]

    def _store_tokens(self, output: DecodeOutput, step: int) -> None:
        """Store the tokens of unfinished rows, and the log-probs of the sampled ones."""
        output.ids[self.active, step] = self.tokens.masked_fill(self.ended, self.request.pad_id)
        if output.log_probs is not None:
            sampled = slice(0, self.num_sampled)  # the greedy rows are a baseline, which no gradient reaches
            log_probs = gather_log_probs(self.logits[sampled], self.tokens[sampled], self.request.sampling)
            output.log_probs[self.active[sampled], step] = log_probs.masked_fill(self.ended[sampled], 0.0)

    def _apply_stop_check(self, stop_check: StopCheck, output: DecodeOutput, step: int) -> None:
        """End the rows whose last token completes a stop string."""
        # The response so far, with the token that was just stored.
        stopped = stop_check(output.ids[self.active, : step + 1]) & ~self.ended  # [M]
        if output.stopped_at is not None:
            output.stopped_at[self.active] = output.stopped_at[self.active].masked_fill(stopped, step + 1)
        self.ended = self.ended | stopped

    def _rows_are_left(self, step: int) -> bool:
        """Return whether any row is unfinished; shrink the batch once enough of its rows have ended."""
        on_cuda = self.active.device.type == "cuda"
        if on_cuda:  # on a CPU each token has been checked
            # A number on the device. An infinite logit of one token need not show in those that follow.
            self._bad_rows = torch.maximum(self._bad_rows, bad_rows(self.logits))
            if (step + 1) % EOS_CHECK_INTERVAL:
                return True
        # A number on the device; `int` below makes the host wait for it, once.
        unfinished_rows = (~self.ended).sum()
        if on_cuda:  # both in one number, so that the host waits once
            unfinished_rows = torch.where(self._bad_rows > 0, -1, unfinished_rows)
        left, size = int(unfinished_rows), len(self.ended)
        if left < 0:
            refuse_bad_rows(self._bad_rows, len(self.logits))
        size = smaller_batch(left, size, self.active.device)
        if left and size < len(self.ended):
            # Keep the unfinished rows, and finished ones to fill up. Sorted, so that sampled rows stay in front of
            # greedy ones.
            unfinished, finished = (~self.ended).nonzero().squeeze(-1), self.ended.nonzero().squeeze(-1)
            self._compact_rows(
                torch.cat([unfinished, finished[: size - left]]).sort().values, self.prompt_length + step
            )
        return left > 0

    def _compact_rows(self, rows: Tensor, filled: int) -> None:
        """Move the given rows, with their first `filled` slots, to the front of the buffers and drop the others."""
        self.buffers.keep_rows(rows, filled)
        # Rows keep their order, so the sampled ones among them come first again.
        self.num_sampled = int((rows < self.num_sampled).sum())
        self.active, self.ended, self.tokens = self.active[rows], self.ended[rows], self.tokens[rows]

    def decode_step(self, step: int, tokens: Tensor) -> None:
        """Run the model on one token per row; the logits of the next ones, `[M, V]`, replace `self.logits`.

        Args:
            step: position of these tokens in the responses, from 0. Steps follow each other without a gap.
            tokens: `[M]` the tokens that were chosen from `self.logits`.
        """
        # The slot of the token that is fed; what a step runs on is made once per key, since slicing costs time.
        slot = self.prompt_length + step
        self._step = self.buffers.begin_step(len(self.active), slot, self.layout, self._step)
        self._step.tensors[0][:, 0] = tokens  # in place, where a captured graph reads them
        if self.step_cache is None:
            self.logits = self._forward(*self._step.tensors)  # [M, V]
        else:  # sliding windows decide the kernels, too
            self.logits = self.step_cache.run((self._step.key, self.layout), self._forward, self._step.tensors)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return `[M, V]` logits. CUDA graphs capture this: it reads its arguments, the slots and the weights."""
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if self.takes_positions:
            inputs["position_ids"] = positions
        attention: AbstractContextManager[Any] = nullcontext()
        if self.attention is not None:
            attention = attention_by_name(self.model, NAME, decode_attention, steps.running, self.attention)
        cache = cast(StepInputs, self._step).cache
        with attention:
            logits: Tensor = self.model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
        return logits
