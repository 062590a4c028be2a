"""The default rollout engine: sampled and greedy responses decoded together, on the weights that are trained.

One prefill, then all rows of a rollout token by token, in buffers that stay in place. `decode_attention.py` has what a
step attends to; what it cannot run decodes in the masked slots of `static_cache.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.errors import UserError
from remax_lightning.models.forward import (
    accepts_argument,
    model_inputs,
    output_gap,
    prompt_index_per_row,
    run_probe,
)
from remax_lightning.models.packing import attention_obstacle, smallest_window
from remax_lightning.models.sampling import bad_rows, gather_log_probs, next_tokens, refuse_bad_rows, truncated_logits
from remax_lightning.rollout.base import GenerationOutput, GenerationRequest, StopCheck
from remax_lightning.rollout.cuda_graph import CastLinear, StepCache, cast_linears
from remax_lightning.rollout.decode_attention import AttentionStates, DecodeAttention, RolloutStates, SharedPrefix
from remax_lightning.rollout.fused_layers import fused_activations, fused_norms, fused_rotary
from remax_lightning.rollout.row_lengths import RowLengths, kind_of_states
from remax_lightning.rollout.static_cache import DecodeBuffers, RolloutSize, allocate_slots, layout_of
from remax_lightning.sharding import is_sharded, language_model

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

log = logging.getLogger(__name__)


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
        self.attention = None if masked else DecodeAttention(model, cast("AttentionStates", self.buffers))
        # ---- Rows: all are active, and none has ended ----
        self.active = torch.arange(len(rows), device=rows.device)  # [M]
        self.ended = torch.zeros_like(rows, dtype=torch.bool)  # [M]
        self._bad_rows = torch.zeros((), dtype=torch.long, device=rows.device)  # the most at a token so far, on CUDA
        # Before and after the minimum length; one copy to the device has the EOS ids, too.
        self._suppressed = request.suppressed.ids_by_phase(rows.device)
        self._key: Hashable = None  # of the inputs and the cache of steps

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
            self.tokens = next_tokens(self.logits, self.num_sampled, sampling, request.generator, self._truncate)  # [M]
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

    def _truncate(self, logits: Tensor, sampling: SamplingConfig) -> Tensor:
        """Return `truncated_logits`, on CUDA from a graph: top-p alone launches sixty kernels."""
        if self.step_cache is None or not sampling.truncates:
            return truncated_logits(logits, sampling)
        options = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        key = "truncated", logits.shape, logits.dtype, options
        return self.step_cache.run_on_copies(key, partial(truncated_logits, sampling=sampling), (logits,))

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
        # Inputs and cache are made once per key: slicing every buffer costs time at each token.
        key = self.buffers.step_key(num_rows, slot)
        if self._key != key:
            self._key = key
            self._inputs, self._cache = self.buffers.step_inputs(num_rows, slot, self.layout)
        # ---- Write the inputs in place, where a captured graph reads them ----
        self._inputs[0][:, 0] = tokens
        self.buffers.begin_step(num_rows, slot)
        if self.step_cache is None:
            self.logits = self._forward(*self._inputs)
        else:  # sliding windows decide the kernels, too
            self.logits = self.step_cache.run((key, self.layout), self._forward, self._inputs)  # [M, V]
        self.buffers.end_step(num_rows)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return `[M, V]` logits. CUDA graphs capture this: it reads its arguments, the slots and the weights."""
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if self.takes_positions:
            inputs["position_ids"] = positions
        with self.attention or nullcontext():
            logits: Tensor = self.model(**inputs, past_key_values=self._cache, use_cache=True).logits[:, -1]
        return logits


class PairedEngine:
    """Prefills the `B` prompts once, and decodes all `N = B * (n + 1)` rows in one loop.

    The greedy response costs one more row per prompt instead of one more `generate` call, and every prompt is read
    once. The rows of a prompt share its keys and values where device and model allow that. Works with every
    architecture of transformers whose `forward` takes a `Cache`; use `HuggingFaceEngine` for the rest.

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
        self._buffers: RolloutStates | None = None
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
        # ---- Fewer operators; in 16 bits they round otherwise, which a CPU does not need ----
        is_float32 = model.dtype == torch.float32 and not torch.is_autocast_enabled(device)
        with ExitStack() as stack:
            for fuse in (fused_norms, fused_rotary, fused_activations) if device == "cuda" or is_float32 else ():
                stack.enter_context(fuse(model, self._fusible))
            casts = stack.enter_context(casting)
            if step_cache is not None:
                step_cache.begin(model)
                if casts != self._casts:
                    step_cache.clear()  # its graphs read the old copies
            self._casts = casts
            output = DecodeLoop(model, request, rows, step_cache, partial(self._allocate, model)).run()
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

    def _allocate(self, model: PreTrainedModel, cache: DynamicCache, size: RolloutSize) -> RolloutStates:
        """Return keys and values for a rollout: those of the last one if they are kept and large enough."""
        kind = choose_states(model, cache, size)
        if not isinstance(self._buffers, kind) or not self._buffers.fits(cache, size):
            if self._buffers is not None and self._step_cache is not None:
                self._step_cache.clear()  # its graphs read the old buffers
            self._buffers = None  # free the old ones before allocating new ones
            self._buffers = NEW_STATES[kind](cache, size)
        return self._buffers


# ---- Which keys and values a rollout has ----


NEW_STATES: dict[type[Any], Callable[[DynamicCache, RolloutSize], Any]] = {
    DecodeBuffers: allocate_slots,
    SharedPrefix: SharedPrefix,
    RowLengths: RowLengths.create,
}
"""What makes keys and values of each kind, for a prefilled cache and the size of the rollout."""


def choose_states(model: PreTrainedModel, cache: DynamicCache, size: RolloutSize) -> type[Any]:
    """Return the kind of keys and values for a rollout; the log says which and why, once.

    The first call for a model runs it on a few tokens, on all ranks where it is sharded.
    """
    kind, reason = kind_of_states(cache)
    if kind is not None:
        reasons = _obstacles.setdefault(model, {})
        if kind not in reasons:
            reasons[kind] = decoding_obstacle(model, kind)
        reason = reasons[kind]
        # ---- Texts that a sliding window cuts need masks, unless the cache itself has the window ----
        window, chunk = smallest_window(model), getattr(model.config.get_text_config(), "attention_chunk_size", None)
        is_cut = window is not None and window < size.length
        if not reason and is_cut and (window == chunk or window not in (layout_of(cache) or ())):
            reason = f"texts of {size.length} tokens are longer than the {window} that some of its layers see"
    said = f"masked slots for each row, because {reason}" if reason else _WAYS[kind]
    if _said.get(model) != said:
        _said[model] = said
        log.info("%s: rollouts decode in %s", type(model).__name__, said)
    return DecodeBuffers if reason or kind is None else kind


@torch.no_grad()
def decoding_obstacle(model: PreTrainedModel, kind: type[Any]) -> str:
    """Return why a model cannot decode on states of a kind; empty if it can.

    Decodes two tokens behind two prompts, one of them with padding, and compares with a pass over the whole texts.

    Raises:
        UserError: if the model's cache has other states than keys and values.
    """
    if kind is not DecodeBuffers and (reason := attention_obstacle(model)):
        return reason
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (3, 6), generator=generator)
    ids[2, :4] = ids[1, :4]  # two rows of the same prompt
    ids, mask = ids.to(model.device), torch.ones(3, 6, dtype=torch.bool)
    mask[1:, :2] = False
    mask, rows = mask.to(model.device), torch.arange(3).clamp_max(1).to(model.device)

    def probe() -> str:
        inputs = model_inputs(model, ids, mask)
        if accepts_argument(model, "logits_to_keep"):
            inputs["logits_to_keep"] = 1
        expected = model(**inputs, use_cache=False).logits[:, -1]  # [3, V]
        sampling = SamplingConfig(max_response_length=3)
        request = GenerationRequest(ids[:2, :4], mask[:2, :4], sampling, [], 0, torch.Generator(model.device))
        loop = DecodeLoop(model, request, rows, None, NEW_STATES[kind])
        for step in range(2):
            loop.decode_step(step, ids[:, 4 + step])
        if loop.attention is not None and loop.attention.calls < 2 * len(loop.layout):
            return "not all of its layers have attention that can be replaced"
        gap = output_gap(loop.logits, expected)
        return f"its logits would be others ({gap})" if gap else ""

    return run_probe(probe, "a decoding step fails ({})".format)


_WAYS: dict[Any, str] = {
    SharedPrefix: "float32, with one copy of a prompt's keys and values for all its rows",
    RowLengths: "flash attention, which is told the length of each row",
}
_obstacles: WeakKeyDictionary[Any, dict[type[Any], str]] = WeakKeyDictionary()
_said: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
