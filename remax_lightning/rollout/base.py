"""What a rollout engine is, and how responses are sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from remax_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

StopCheck: TypeAlias = Callable[[Tensor], Tensor]
"""Says of `[M, t]` token ids of responses, `[M]` bool, whether their last token completes what ends a response."""


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled. Nothing truncates the distribution unless it is asked for.

    Args:
        max_response_length: most tokens of a response, end-of-sequence token included.
        min_response_length: fewest tokens before the end-of-sequence token may come, or a stop string counts.
        stop_strings: texts that end a response as an end-of-sequence token does; the tokens that complete one belong to
            the response.
        num_samples: sampled responses per prompt, `n`. One is what the paper uses.
        temperature: divides the logits.
        top_k: sample from the `top_k` likeliest tokens only; 0 samples from all of them.
        top_p: sample from the smallest set of likeliest tokens whose probability reaches `top_p`.
        min_p: drop tokens less likely than `min_p` times the likeliest one.
        scale_log_probs: whether the training pass divides the logits by the temperature too. True keeps the gradient
            on-policy; False is what the paper's code does.
        truncate_log_probs: whether the policy's log-probs are of the truncated distribution, over the tokens that
            top-k, top-p and min-p keep. True keeps the gradient on-policy under truncation; False is what the paper's
            code does. The reference keeps all tokens, so that the KL is finite.

    Raises:
        UserError: if a value is out of its range.
    """

    max_response_length: int = 256
    min_response_length: int = 0
    num_samples: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    scale_log_probs: bool = True
    stop_strings: tuple[str, ...] = ()
    truncate_log_probs: bool = False

    def __post_init__(self) -> None:
        checks = (
            (self.max_response_length >= 1, "max_response_length", "at least 1"),
            (0 <= self.min_response_length <= self.max_response_length, "min_response_length",
             "between 0 and max_response_length"),
            (self.num_samples >= 1, "num_samples", "at least 1"),
            (self.temperature > 0, "temperature", "above 0 (the greedy response is made anyway, as the baseline)"),
            (self.top_k >= 0, "top_k", "0 (all tokens) or more"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (0 <= self.min_p < 1, "min_p", "at least 0 and below 1"),
            (all(self.stop_strings), "stop_strings", "texts of at least one character"),
            (self.truncates or not self.truncate_log_probs, "truncate_log_probs",
             "false where top_k, top_p and min_p leave nothing out"),
        )  # fmt: skip
        for holds, name, expected in checks:
            if not holds:
                raise UserError(f"model.sampling.{name} must be {expected}, got {getattr(self, name)}")

    @property
    def truncates(self) -> bool:
        """Whether sampling leaves out part of the policy's distribution."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


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

    @property
    def num_sampled(self) -> int:
        """Number of sampled responses, `S = B * n`."""
        return len(self.prompt_ids) * self.sampling.num_samples


class GenerationOutput(NamedTuple):
    """Token ids that an engine wrote.

    Args:
        sampled_ids: `[S, R]` sampled responses, prompt by prompt, padded on the right.
        greedy_ids: `[B, R]` greedy responses, or None if they were not asked for.
        log_probs: `[S, R]` log-probs of the sampled tokens in nats under the policy that drew them, 0 after the end of
            a response; None if they were not asked for.
        stopped_at: `[N]` tokens through the end of a stop string, sampled responses first, 0 where none ended the
            response; None without stop strings.
    """

    sampled_ids: Tensor
    greedy_ids: Tensor | None
    log_probs: Tensor | None = None
    stopped_at: Tensor | None = None


class RolloutEngine(Protocol):
    """Generates responses with the policy's own weights."""

    def generate(self, model: PreTrainedModel, request: GenerationRequest) -> GenerationOutput:
        """Generate `n` sampled responses and, if `request.greedy`, one greedy response to each prompt.

        Args:
            model: the policy, in eval mode.
            request: prompts, sampling settings, and what to return.
        """
