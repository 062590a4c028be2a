"""Rollouts by `model.generate`, for architectures that keep another state than a key-value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from remax_lightning.rollout.engine import Generated, SamplingConfig
from remax_lightning.rollout.forward import language_model, row_prompts
from remax_lightning.rollout.sampling import next_tokens

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
    ) -> Generated:
        """Write `n` sampled responses and, if `greedy`, one greedy response per prompt; see `RolloutEngine`."""
        from transformers import GenerationConfig, LogitsProcessorList

        model = language_model(model)  # a PEFT wrapper would write our configuration into the model's own
        prompt_length, num_sampled = prompt_ids.shape[1], len(prompt_ids) * sampling.num_samples
        rows = row_prompts(prompt_ids, sampling.num_samples, greedy)
        choose = _Choose(sampling, num_sampled, prompt_length, eos_ids, generator)
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
                inputs=prompt_ids[rows],
                attention_mask=prompt_mask[rows].long(),
                generation_config=config,
                logits_processor=LogitsProcessorList([choose]),
            )
        finally:
            model.generation_config = own_config
        missing = prompt_length + sampling.max_response_length - output.shape[1]
        ids = torch.nn.functional.pad(output[:, prompt_length:], (0, missing), value=pad_id)
        return Generated(ids[:num_sampled], ids[num_sampled:] if greedy else None)


class _Choose:
    """A logits processor that leaves one token possible in each row: the one that was chosen."""

    def __init__(
        self,
        sampling: SamplingConfig,
        num_sampled: int,
        prompt_length: int,
        eos_ids: list[int],
        generator: torch.Generator,
    ) -> None:
        self.sampling, self.num_sampled, self.prompt_length = sampling, num_sampled, prompt_length
        self.eos_ids, self.generator = eos_ids, generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] - self.prompt_length < self.sampling.min_response_length:
            scores = scores.clone()
            scores[:, self.eos_ids] = -torch.inf
        is_greedy = torch.arange(len(scores)) >= self.num_sampled
        tokens = next_tokens(scores, is_greedy, self.sampling, self.generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
