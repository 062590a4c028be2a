"""The choice of a rollout engine for a model, and the engine for all that `PairedEngine` does not support.

`HuggingFaceEngine` calls `model.generate`, for architectures that keep another state than a key-value cache.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.functional import response_mask
from remax_lightning.models.forward import accepts_argument, prompt_index_per_row
from remax_lightning.models.sampling import check_logits, gather_log_probs, next_tokens
from remax_lightning.rollout.base import GenerationOutput, GenerationRequest, RolloutEngine, StopCheck
from remax_lightning.rollout.paired import PairedEngine, decoding_obstacle
from remax_lightning.rollout.static_cache import DecodeBuffers
from remax_lightning.sharding import language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


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
