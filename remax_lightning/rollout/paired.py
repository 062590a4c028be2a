"""The default rollout engine: sampled and greedy responses decoded together, on the weights that are trained.

One prefill, then all rows of a rollout token by token, in buffers that stay in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.models.forward import accepts_argument, model_inputs, prompt_index_per_row
from remax_lightning.models.sampling import bad_rows, gather_log_probs, next_tokens, refuse_bad_rows
from remax_lightning.rollout.base import GenerationOutput, GenerationRequest, StopCheck
from remax_lightning.rollout.cuda_graph import CastLinear, StepCache, cast_linears, fused_norms
from remax_lightning.rollout.static_cache import DecodeBuffers, bucketed_length, cache_of_slots, layout_of
from remax_lightning.sharding import is_sharded, language_model

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


EOS_CHECK_INTERVAL = 16
"""On CUDA, tokens between two checks for finished rows, since each check synchronizes the host with the device. On a
CPU, rows are checked at every token."""


class DecodeOutput(NamedTuple):
    """`N` responses: `ids` and `log_probs` `[N, R]`, `stopped_at` `[N]`; see `GenerationOutput`."""

    ids: Tensor
    log_probs: Tensor | None
    stopped_at: Tensor | None


class DecodeLoop:
    """The state of one decoding loop. Sampled rows come first, prompt by prompt, then the greedy ones.

    Finished rows leave the batch: row `i` of the model's batch writes row `active[i]` of the responses.

    Args:
        model: the policy.
        request: prompts, sampling settings, and what to return.
        rows: `[N]` index of the prompt that each row continues.
        step_cache: replays the decoding step as a CUDA graph; None runs the model each time.
        allocate: returns buffers for a prefilled cache, a number of rows, and a number of slots.

    Raises:
        UserError: if the model's cache has other states than keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        request: GenerationRequest,
        rows: Tensor,
        step_cache: StepCache | None,
        allocate: Callable[[DynamicCache, int, int], DecodeBuffers],
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
        # ---- Slots: each prompt's keys and values for every one of its rows; the first token goes behind them ----
        length = bucketed_length(self.prompt_length + request.sampling.max_response_length)
        self.buffers = allocate(cache, len(rows), length)
        self.buffers.fill(cache, request.prompt_mask, rows)
        # ---- Rows: all are active, and none has ended ----
        self.active = torch.arange(len(rows), device=rows.device)  # [M]
        self.ended = torch.zeros_like(rows, dtype=torch.bool)  # [M]
        self._bad_rows = torch.zeros((), dtype=torch.long, device=rows.device)  # the most at a token so far, on CUDA
        # Before and after the minimum length; one copy to the device has the EOS ids, too.
        self._suppressed = request.suppressed.ids_by_phase(rows.device)
        self._shape: tuple[int, int] | None = None  # rows and slots of the view

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
        for step in range(sampling.max_response_length):
            # ---- Choose the next token of every row ----
            self.suppress_tokens(step)
            self.tokens = next_tokens(self.logits, self.num_sampled, sampling, request.generator)  # [M]
            self._store_tokens(output, step)
            # ---- Find rows that end here ----
            self.ended = self.ended | torch.isin(self.tokens, eos_ids)
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
        """Return whether any row is unfinished; shrink the batch once the unfinished rows fit into half of it."""
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
        # Halving keeps the number of shapes small, and copying keys and values pays off.
        while left and size > 1 and left <= (size + 1) // 2:
            size = (size + 1) // 2
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
        num_rows, slot = len(self.active), self.prompt_length + step  # the slot of the token that is fed
        length = bucketed_length(slot + 1)
        # View and cache are made once per shape: slicing every buffer costs time at each token.
        if self._shape != (num_rows, length):
            self._shape, self._view = (num_rows, length), self.buffers.view(num_rows, length)
            self._cache = cache_of_slots(self.layout, self._view.states, self._view.slot, length)
        # ---- Write the inputs in place, where a captured graph reads them ----
        inputs = self._view.tokens, self._view.positions, self._view.mask
        self._view.tokens[:, 0] = tokens
        self._view.mask[:, slot] = 1
        if self.step_cache is None:
            self.logits = self._forward(*inputs)
        else:
            # All that decides the kernels: rows, slots attended to, slots allocated (the strides), sliding windows.
            key = num_rows, length, self.buffers.mask.shape[1], self.layout
            self.logits = self.step_cache.run(key, self._forward, inputs)  # [M, V]
        # ---- One position further; the view shares the memory of the buffers ----
        self._view.positions.add_(1)
        self.buffers.slot.add_(1)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return `[M, V]` logits. CUDA graphs capture this: it reads its arguments, the slots and the weights."""
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if self.takes_positions:
            inputs["position_ids"] = positions
        logits: Tensor = self.model(**inputs, past_key_values=self._cache, use_cache=True).logits[:, -1]
        return logits


class PairedEngine:
    """Prefills the `B` prompts once, repeats their cache to `N = B * (n + 1)` rows, and decodes all rows in one loop.

    The greedy response costs one more row per prompt instead of one more `generate` call, and every prompt is read
    once. Works with every architecture of transformers whose `forward` takes a `Cache`; use `HuggingFaceEngine` for the
    rest.

    Args:
        cuda_graphs: on CUDA, capture the decoding step once per shape as a CUDA graph and replay it. The responses are
            the same, without Python's overhead per token. On a CPU it changes nothing.
        keep_cache: on CUDA, keep the key-value cache, and in mixed precision the 16-bit copy of the weights, between
            rollouts, because graphs stay valid only with them. False frees both for the training pass, and graphs are
            then captured anew in every rollout, as they are where a strategy gathers the weights for each.
    """

    def __init__(self, cuda_graphs: bool = True, keep_cache: bool = True) -> None:
        self.cuda_graphs, self.keep_cache = cuda_graphs, keep_cache
        self._step_cache = StepCache() if cuda_graphs else None
        self._buffers: DecodeBuffers | None = None
        self._casts: list[CastLinear] = []
        self._fusible: dict[Hashable, bool] = {}

    @property
    def num_graphs(self) -> int:
        """The CUDA graphs that the next rollout can replay."""
        return 0 if self._step_cache is None else len(self._step_cache)

    @torch.inference_mode(False)  # training cannot write into buffers that a validation allocated in inference mode
    @torch.no_grad()
    def generate(self, model: PreTrainedModel, request: GenerationRequest) -> GenerationOutput:
        """Generate `n` sampled responses and, if `request.greedy`, one greedy response per prompt."""
        model, num_sampled = language_model(model), request.num_sampled
        # ---- One row per response: B * n sampled, then B greedy ----
        rows = prompt_index_per_row(request.prompt_ids, request.sampling.num_samples, request.greedy)  # [N]
        device = request.prompt_ids.device.type
        step_cache = self._step_cache if device == "cuda" else None  # a CPU runs each step as it is
        # ---- Decode; under autocast, weights are cast once for the rollout ----
        casting: AbstractContextManager[list[CastLinear]] = nullcontext([])
        if torch.is_autocast_enabled(device):
            casting = cast_linears(model, self._casts)
        fusing = fused_norms(model, self._fusible) if device == "cuda" else nullcontext()
        with fusing, casting as casts:
            if step_cache is not None:
                step_cache.begin(model)
                if casts != self._casts:
                    step_cache.clear()  # its graphs read the old copies
            self._casts = casts
            output = DecodeLoop(model, request, rows, step_cache, self._allocate).run()
        # ---- Buffers and graphs stay only where the next rollout can replay the graphs ----
        if step_cache is None or not (self.keep_cache and step_cache.is_reusable and not is_sharded(model)):
            self._buffers, self._casts = None, []
            if step_cache is not None:
                step_cache.clear()
        return GenerationOutput(
            sampled_ids=output.ids[:num_sampled],  # [S, R]
            greedy_ids=output.ids[num_sampled:] if request.greedy else None,  # [B, R]
            log_probs=None if output.log_probs is None else output.log_probs[:num_sampled],  # [S, R]
            stopped_at=output.stopped_at,  # [N]
        )

    def _allocate(self, cache: DynamicCache, num_rows: int, length: int) -> DecodeBuffers:
        """Return buffers for a rollout: those of the last one if they are kept and large enough."""
        if self._buffers is None or not self._buffers.fits(cache, num_rows, length):
            if self._buffers is not None and self._step_cache is not None:
                self._step_cache.clear()  # its graphs read the old buffers
            self._buffers = None  # free the old ones before allocating new ones
            self._buffers = DecodeBuffers.create(cache, num_rows, length)
        return self._buffers
