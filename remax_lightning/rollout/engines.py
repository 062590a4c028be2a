"""The rollout engines that decode with the policy's own weights, and the choice of one for a model.

`PairedEngine` decodes sampled and greedy responses together, in one loop. `HuggingFaceEngine` calls `model.generate`,
for architectures that keep another state than a key-value cache. `AutoEngine` takes the first where a probe says that
it is right. The probe also chooses what a loop attends to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.errors import UserError
from remax_lightning.functional import response_mask
from remax_lightning.models.flash_attention import MAX_FLASH_HEAD
from remax_lightning.models.forward import (
    accepts_argument,
    model_inputs,
    output_gap,
    prompt_index_per_row,
    run_probe,
)
from remax_lightning.models.packing import attention_obstacle, smallest_window
from remax_lightning.models.sampling import check_logits, gather_log_probs, next_tokens
from remax_lightning.rollout.base import GenerationOutput, GenerationRequest, RolloutEngine, StopCheck
from remax_lightning.rollout.cuda_graph import CastLinear, StepCache, cast_linears
from remax_lightning.rollout.decode_attention import (
    RolloutSize,
    RolloutStates,
    layout_of,
    slot_dtype,
    states_of,
)
from remax_lightning.rollout.decode_loop import DecodeLoop
from remax_lightning.rollout.fused_layers import fused_activations, fused_norms, fused_rotary, transposed_products
from remax_lightning.rollout.row_lengths import RowLengths, flash_takes_lengths
from remax_lightning.rollout.shared_prefix import SharedPrefix
from remax_lightning.rollout.static_cache import DecodeBuffers, allocate_slots
from remax_lightning.sharding import is_sharded, language_model

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

log = logging.getLogger(__name__)


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
            if is_float32:
                stack.enter_context(transposed_products(model))
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


def kind_of_states(cache: DynamicCache) -> tuple[type[Any] | None, str]:
    """Return the class of states that device and dtype of a prefilled cache allow; None and the reason for slots."""
    states = states_of(cache)
    dtypes, widths = {slot_dtype(each) for each in states}, {each.shape[3] for each in states}
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if states[0].device.type == "cpu":
        return (SharedPrefix, "") if dtypes == {torch.float32} else (None, f"a CPU shares in float32, not in {names}")
    if not dtypes <= {torch.float16, torch.bfloat16} or len(dtypes) > 1:
        return None, f"flash attention computes in 16 bits, not in {names}"
    if len(widths) > 1 or max(widths) > MAX_FLASH_HEAD or max(widths) % 8:
        return None, f"flash attention takes no heads of {' and '.join(map(str, sorted(widths)))}"
    if not flash_takes_lengths():
        return None, f"flash attention of torch {torch.__version__} is not told lengths"
    return RowLengths, ""


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


# ---- transformers' own loop ----


class HuggingFaceEngine:
    """One `generate` call of `N = B * (n + 1)` rows; a logits processor draws on the sampled rows.

    `generate` itself always decodes greedily here. So nothing of the model's `generation_config` (top-k 50, say, which
    transformers adds to any sampling) reaches the distribution, and the randomness comes from our generator alone.
    """

    @torch.no_grad()
    def generate(self, model: PreTrainedModel, request: GenerationRequest) -> GenerationOutput:
        """Write `n` sampled responses and, if `request.greedy`, one greedy response per prompt; see `RolloutEngine`."""
        model = language_model(model)  # a PEFT wrapper would write our configuration into the model
        prompt_length, num_sampled = request.prompt_ids.shape[1], request.num_sampled
        choose = _Choose(request)
        stop = None if request.stop_check is None else _Stop(request.stop_check, request)
        output = _generate(model, request, choose, stop)  # [N, P + longest response]
        # `generate` stops after the longest response; engines return R columns.
        missing = prompt_length + request.sampling.max_response_length - output.shape[1]
        ids = torch.nn.functional.pad(output[:, prompt_length:], (0, missing), value=request.pad_id)  # [N, R]
        stopped_at = None if stop is None else stop.stopped_at  # [N]
        log_probs = None
        if request.return_log_probs:
            log_probs = torch.nn.functional.pad(torch.stack(choose.log_probs, 1), (0, missing))  # [S, R]
            of_sampled = None if stopped_at is None else stopped_at[:num_sampled]
            # Behind the end of a response stands padding, which was chosen as well but does not count.
            log_probs = log_probs.masked_fill(~response_mask(ids[:num_sampled], request.eos_ids, of_sampled), 0.0)
        return GenerationOutput(ids[:num_sampled], ids[num_sampled:] if request.greedy else None, log_probs, stopped_at)


def _generate(model: PreTrainedModel, request: GenerationRequest, choose: _Choose, stop: _Stop | None) -> Tensor:
    """Return `[N, P + longest response]` token ids of prompts and responses."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    rows = prompt_index_per_row(request.prompt_ids, request.sampling.num_samples, request.greedy)  # [N]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=request.sampling.max_response_length,
        eos_token_id=request.eos_ids,
        pad_token_id=request.pad_id,
        use_cache=True,
    )
    # generate fills unset values from the model's own generation_config, so that is set aside during the call.
    model_config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = cast("Any", model).generate(
            inputs=request.prompt_ids[rows],
            attention_mask=request.prompt_mask[rows].long(),
            generation_config=config,
            logits_processor=LogitsProcessorList([cast("Any", choose)]),
            stopping_criteria=StoppingCriteriaList([] if stop is None else [cast("Any", stop)]),
        )
    finally:
        model.generation_config = model_config
    return cast(Tensor, output)


class _Choose:
    """A logits processor that chooses the next token of every row and masks all others."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.suppressed = request.suppressed.ids_by_phase(request.prompt_ids.device)
        self.log_probs: list[Tensor] = []  # one [S] per step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        request, sampling = self.request, self.request.sampling
        # By the position of the next token, from 0.
        position = input_ids.shape[1] - request.prompt_ids.shape[1]
        may_end = position >= sampling.min_response_length
        if len(self.suppressed[may_end]):
            scores = scores.index_fill(1, self.suppressed[may_end], -torch.inf)
        if scores.device.type != "cpu":  # where `next_tokens` checks; `generate` waits at each token anyway
            check_logits(scores)
        tokens = next_tokens(scores, request.num_sampled, sampling, request.generator)  # [N]
        if request.return_log_probs:
            sampled = slice(0, request.num_sampled)
            self.log_probs.append(gather_log_probs(scores[sampled], tokens[sampled], sampling))
        if request.progress is not None:
            request.progress(position)
        # Only the chosen token stays finite, so that greedy decoding, all that `generate` does here, takes it.
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Stop:
    """A stopping criterion that records where a stop string ends each row."""

    def __init__(self, stop_check: StopCheck, request: GenerationRequest) -> None:
        self.stop_check, self.prompt_length = stop_check, request.prompt_ids.shape[1]
        self.min_response_length = request.sampling.min_response_length
        self.eos_ids = torch.tensor(request.eos_ids)
        self.stopped_at = torch.zeros(0, dtype=torch.long)

    def __call__(self, input_ids: Tensor, _: Any, **__: Any) -> Tensor:
        ids = input_ids[:, self.prompt_length :]  # [N, t]
        # Rows and device are known at the first call.
        if len(self.stopped_at) == 0:
            self.stopped_at = torch.zeros_like(ids[:, 0])
            self.eos_ids = self.eos_ids.to(ids.device)
        if ids.shape[1] > self.min_response_length:
            # A row that has ended holds padding, which must not complete a stop string.
            ended = (self.stopped_at > 0) | torch.isin(ids, self.eos_ids).any(-1)
            self.stopped_at = self.stopped_at.masked_fill(self.stop_check(ids) & ~ended, ids.shape[1])
        return self.stopped_at > 0


# ---- The choice ----


class AutoEngine:
    """`PairedEngine` if it supports the model, `HuggingFaceEngine` otherwise; the log says which and why."""

    def __init__(self) -> None:
        self._engine: RolloutEngine | None = None

    def choice(self, model: PreTrainedModel) -> RolloutEngine:
        """Return the engine for the first model that this is called with, in eval mode and with full parameters."""
        if self._engine is None:
            self._engine = choose_engine(language_model(model))
        return self._engine

    def generate(self, model: PreTrainedModel, request: GenerationRequest) -> GenerationOutput:
        """Generate responses with the engine that fits `model`; see `RolloutEngine`."""
        return self.choice(model).generate(model, request)


def clone_engine(engine: RolloutEngine) -> RolloutEngine:
    """Return an engine of the same kind for another model, because ours keep CUDA graphs of the last one.

    An engine of the user's own is returned as it is. vLLM's servers hold the policy alone, so that another model
    decodes here.
    """
    from remax_lightning.rollout.vllm import VLLMEngine  # late: it is asked for by few runs

    if type(engine) in (AutoEngine, VLLMEngine):
        return AutoEngine()
    if type(engine) is PairedEngine:
        return PairedEngine(cuda_graphs=engine.cuda_graphs, keep_cache=engine.keep_cache)
    return engine


def choose_engine(model: PreTrainedModel) -> RolloutEngine:
    """Return the fastest engine that supports `model`."""
    unsupported = why_unsupported(model)
    engine = HuggingFaceEngine() if unsupported else PairedEngine()
    reason = unsupported or "takes a key-value cache"
    log.info("rollout engine: %s, since %s %s", type(engine).__name__, type(model).__name__, reason)
    return engine


def why_unsupported(model: PreTrainedModel) -> str:
    """Return why `PairedEngine` cannot decode with `model`, or an empty string; runs the model on a few tokens."""
    # The flag that transformers sets on Mamba and its relatives.
    if getattr(model, "_is_stateful", False):
        return "keeps a recurrent state"
    if not accepts_argument(model, "past_key_values"):
        return "takes no key-value cache"
    try:  # slots are what every model decodes in that can decode on nothing else
        reason = decoding_obstacle(model, DecodeBuffers)
    except UserError:
        # For example a convolutional or recurrent state, whose rows cannot be selected like those of keys and values.
        return "keeps more than keys and values in its cache"
    return f"cannot decode in slots: {reason}" if reason else ""
