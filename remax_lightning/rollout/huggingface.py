"""Rollouts by `model.generate`, for architectures that keep another state than a key-value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from remax_lightning.functional import response_mask
from remax_lightning.models.forward import language_model, row_prompts
from remax_lightning.rollout.base import GenerationOutput, SamplingConfig, StopCheck
from remax_lightning.rollout.sampling import log_probs_of, next_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HuggingFaceEngine:
    """One `generate` call of `N = B * (n + 1)` rows; a logits processor draws on the sampled rows.

    `generate` itself always decodes greedily here. So nothing of the model's `generation_config` (top-k 50, say, which
    transformers adds to any sampling) reaches the distribution, and the randomness comes from our generator alone.
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
        log_probs: bool = False,
        ended: StopCheck | None = None,
    ) -> GenerationOutput:
        """Write `n` sampled responses and, if `greedy`, one greedy response per prompt; see `RolloutEngine`."""
        model = language_model(model)  # a PEFT wrapper would write our configuration into the model's own
        prompt_length, num_sampled = prompt_ids.shape[1], len(prompt_ids) * sampling.num_samples
        rows = row_prompts(prompt_ids, sampling.num_samples, greedy)
        choose = _Choose(sampling, num_sampled, prompt_length, eos_ids, generator, log_probs)
        stop = None if ended is None else _Stop(ended, sampling.min_response_length, prompt_length, eos_ids)
        output = _generate(model, prompt_ids[rows], prompt_mask[rows].long(), sampling, eos_ids, pad_id, choose, stop)
        missing = prompt_length + sampling.max_response_length - output.shape[1]
        ids = torch.nn.functional.pad(output[:, prompt_length:], (0, missing), value=pad_id)
        stopped_at = None if stop is None else stop.stopped_at
        kept = None
        if log_probs:
            kept = torch.nn.functional.pad(torch.stack(choose.log_probs, 1), (0, missing))
            of_sampled = None if stopped_at is None else stopped_at[:num_sampled]
            kept = kept.masked_fill(~response_mask(ids[:num_sampled], eos_ids, of_sampled), 0.0)
        return GenerationOutput(ids[:num_sampled], ids[num_sampled:] if greedy else None, kept, stopped_at)


def _generate(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    sampling: SamplingConfig,
    eos_ids: list[int],
    pad_id: int,
    choose: _Choose,
    stop: _Stop | None,
) -> Tensor:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_response_length,
        eos_token_id=eos_ids,
        pad_token_id=pad_id,
        use_cache=True,
    )
    # generate fills whatever is unset here from the model's own configuration, so that is put aside meanwhile.
    own_config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = cast("Any", model).generate(
            inputs=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([cast("Any", choose)]),
            stopping_criteria=StoppingCriteriaList([] if stop is None else [cast("Any", stop)]),
        )
    finally:
        model.generation_config = own_config
    return cast(Tensor, output)


class _Choose:
    """A logits processor that leaves one token possible in each row: the one that was chosen."""

    def __init__(
        self,
        sampling: SamplingConfig,
        num_sampled: int,
        prompt_length: int,
        eos_ids: list[int],
        generator: torch.Generator,
        keep: bool,
    ) -> None:
        self.sampling, self.num_sampled, self.prompt_length = sampling, num_sampled, prompt_length
        self.eos_ids, self.generator, self.keep = eos_ids, generator, keep
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] - self.prompt_length < self.sampling.min_response_length:
            scores = scores.clone()
            scores[:, self.eos_ids] = -torch.inf
        tokens = next_tokens(scores, self.num_sampled, self.sampling, self.generator)
        if self.keep:
            drawn = slice(0, self.num_sampled)
            self.log_probs.append(log_probs_of(scores[drawn], tokens[drawn], self.sampling))
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Stop:
    """A stopping criterion that notes which rows a stop string has ended, and where."""

    def __init__(self, ended: StopCheck, min_response_length: int, prompt_length: int, eos_ids: list[int]) -> None:
        self.ended, self.min_response_length, self.prompt_length = ended, min_response_length, prompt_length
        self.eos_ids = torch.tensor(eos_ids)
        self.stopped_at = torch.zeros(0, dtype=torch.long)

    def __call__(self, input_ids: Tensor, _: Any, **__: Any) -> Tensor:
        ids = input_ids[:, self.prompt_length :]
        if len(self.stopped_at) == 0:
            self.stopped_at = torch.zeros_like(ids[:, 0])
            self.eos_ids = self.eos_ids.to(ids.device)
        if ids.shape[1] > self.min_response_length:
            over = (self.stopped_at > 0) | torch.isin(ids, self.eos_ids).any(-1)
            self.stopped_at = self.stopped_at.masked_fill(self.ended(ids) & ~over, ids.shape[1])
        return self.stopped_at > 0
