"""Stop strings: texts that end a response."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.rollout.base import StopCheck

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    prefix = _writable_prefix(tokenizer)
    for string in strings:
        _check_writable(tokenizer, string, prefix)

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
        if token_id not in special and (text := str(tokenizer.decode([token_id])).strip()):
            yield text


def _check_writable(tokenizer: PreTrainedTokenizerBase, string: str, prefix: str) -> None:
    """Refuse a string whose tokens do not read as it: no response could ever hold it."""
    ids = tokenizer(prefix + string, add_special_tokens=False)["input_ids"]
    written = str(tokenizer.decode(ids, skip_special_tokens=False)).partition(prefix)[2]
    if string not in written:
        raise UserError(
            f"model.sampling.stop_strings: expected strings that the tokenizer {tokenizer.name_or_path!r} can write,"
            f" got {string!r}, which its vocabulary writes as {written!r}; no response would ever end there. Remove it,"
            " or take the tokenizer that belongs to the policy"
        )
