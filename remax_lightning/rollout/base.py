"""The interface of rollout engines: what they are asked for, which texts end a response, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from remax_lightning.config import SamplingConfig
from remax_lightning.errors import UserError
from remax_lightning.models.sampling import SuppressedTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        unused_ids: ids without a token in the tokenizer, which must be drawn neither at random nor greedily.
        progress: called now and then with the number of tokens that the longest response has, for a bar; None where
            nobody watches.
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
    progress: Callable[[int], None] | None = None

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


PREFIXES_TRIED = 1000
"""Tokens of the vocabulary that are tried as the text in front of another token."""


def stop_string_check(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> StopCheck | None:
    """Return a check whether the last token of a response completes one of the strings; None without strings.

    It wraps transformers' `StopStringCriteria`, which reads token ids only, so decoding makes no text.

    Raises:
        UserError: if the tokenizer's vocabulary cannot write one of the strings.
    """
    if not strings:
        return None
    from transformers import StopStringCriteria

    # ---- Refuse at the start of the run what no response could hold ----
    prefix = _writable_prefix(tokenizer)
    for string in strings:
        _check_writable(tokenizer, string, prefix)

    # transformers reads each token behind a prefix, as in the middle of a text.
    class Criteria(StopStringCriteria):
        """transformers' own, with a text in front of each token that this vocabulary can write."""

        @staticmethod
        def clean_tokenizer_vocab(
            tokenizer: Any, static_prefix: str = prefix, stop_string_matching_mode: str | None = None
        ) -> Any:
            return StopStringCriteria.clean_tokenizer_vocab(tokenizer, static_prefix, stop_string_matching_mode)

    criteria: Any = Criteria(tokenizer, list(strings))

    def stop_check(ids: Tensor) -> Tensor:
        is_stopped: Tensor = criteria(ids, None)  # [M]
        return is_stopped

    return stop_check


def _writable_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text that the tokenizer reads back as it is: transformers' own choice, or else a token's text."""
    # "abcdef" is what transformers takes itself.
    for text in ("abcdef", *islice(_ordinary_texts(tokenizer), PREFIXES_TRIED)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens: Any = tokenizer.convert_ids_to_tokens(ids)
        if ids and text in tokenizer.convert_tokens_to_string(tokens):
            return text
    raise UserError(
        f"model.sampling.stop_strings: the tokenizer {tokenizer.name_or_path!r} reads no text back as it was, so no"
        " string can be found in what it writes; remove the key"
    )


def _ordinary_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    special = set(tokenizer.all_special_ids)
    for token_id in sorted(tokenizer.get_vocab().values()):
        # Special tokens are split off before a text is read, so they are no context for other tokens.
        if token_id not in special and (text := str(tokenizer.decode([token_id])).strip()):
            yield text


def _check_writable(tokenizer: PreTrainedTokenizerBase, string: str, prefix: str) -> None:
    """Refuse a string whose tokens do not read as it: no response could ever hold it."""
    # Behind the prefix, because a tokenizer may write a string otherwise at the start of a text.
    ids = tokenizer(prefix + string, add_special_tokens=False)["input_ids"]
    written = str(tokenizer.decode(ids, skip_special_tokens=False)).partition(prefix)[2]
    if string not in written:
        raise UserError(
            f"model.sampling.stop_strings: expected strings that the tokenizer {tokenizer.name_or_path!r} can write,"
            f" got {string!r}, which its vocabulary writes as {written!r}; no response would ever end there. Remove it,"
            " or take the tokenizer that belongs to the policy"
        )
