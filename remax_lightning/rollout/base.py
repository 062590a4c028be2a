"""The interface of rollout engines: what they are asked for, and what they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.models.sampling_mask import SuppressedTokens

StopCheck: TypeAlias = Callable[[Tensor], Tensor]
"""Maps `[M, t]` token ids of responses to `[M]` bool: whether the last token completes a stop string."""


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """What a rollout engine is asked for. Callers fill in every field, so an engine never has to guess.

    Args:
        prompt_ids: `[B, P]` token ids, padded on the left.
        prompt_mask: `[B, P]` bool, True on real tokens.
        sampling: how to sample; `sampling.num_samples` is `n`, so there are `S = B * n` sampled responses.
        eos_ids: token ids that end a response.
        pad_id: token id that fills a row after its response has ended.
        generator: the only source of randomness, on the model's device.
        greedy: whether to decode one greedy response per prompt too. ReMax needs it as the baseline.
        return_log_probs: whether to return the log-probs of the sampled tokens, under the distribution that `sampling`
            says the training pass uses.
        stop_check: ends a response in addition to `eos_ids`; None without stop strings.
        unused_ids: ids without a token in the tokenizer, which must not be drawn, greedily neither.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    sampling: SamplingConfig
    eos_ids: list[int]
    pad_id: int
    generator: torch.Generator
    greedy: bool = True
    return_log_probs: bool = False
    stop_check: StopCheck | None = None
    unused_ids: tuple[int, ...] = ()

    @property
    def suppressed(self) -> SuppressedTokens:
        """Tokens that must not be drawn: `unused_ids`, and EOS before `sampling.min_response_length`."""
        return SuppressedTokens(self.unused_ids, tuple(self.eos_ids), self.sampling.min_response_length)

    @property
    def num_sampled(self) -> int:
        """Number of sampled responses, `S = B * n`."""
        return len(self.prompt_ids) * self.sampling.num_samples


class GenerationOutput(NamedTuple):
    """The responses that an engine generated; `R` is `sampling.max_response_length`.

    Args:
        sampled_ids: `[S, R]` sampled responses, prompt by prompt, padded on the right.
        greedy_ids: `[B, R]` greedy responses; None unless requested.
        log_probs: `[S, R]` log-probs of the sampled tokens in nats under the policy that generated them, 0 after the
            end of a response; None unless requested.
        stopped_at: `[S + B]` length of a response that a stop string ended, sampled responses first; 0 where none did.
            None without stop strings.
    """

    sampled_ids: Tensor
    greedy_ids: Tensor | None
    log_probs: Tensor | None = None
    stopped_at: Tensor | None = None


class RolloutEngine(Protocol):
    """Generates responses with the policy's own weights."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        """Generate `n` sampled responses and, if `request.greedy`, one greedy response to each prompt.

        Args:
            model: the policy, a `PreTrainedModel` in eval mode. Annotated as Any, because the command line compares
                annotations, and an engine of the user's may say either.
            request: prompts, sampling settings, and what to return.
        """
