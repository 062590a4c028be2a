"""From a whole conversation, prompt and response, to token ids: a reward model reads in every stage what it learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, is_chat: bool = False
) -> list[list[int]]:
    """Return the token ids of each conversation.

    Plain text gets the special tokens of the tokenizer. A chat template has written its own, so it gets none. Where
    either spells out the first or the last of them, it stands there once.

    Args:
        tokenizer: the reward model's.
        texts: prompt and response, and what a template puts around them, as one text.
        is_chat: whether a chat template wrote the texts.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=not is_chat, return_attention_mask=False, verbose=False)
    first, last = (tokenizer.bos_token_id, tokenizer.cls_token_id), (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return [_once(list(ids), first, last) for ids in encoded["input_ids"]]


def _once(ids: list[int], first: tuple[int | None, ...], last: tuple[int | None, ...]) -> list[int]:
    if len(ids) > 1 and ids[0] == ids[1] and ids[0] in first:
        ids = ids[1:]
    return ids[:-1] if len(ids) > 1 and ids[-1] == ids[-2] and ids[-1] in last else ids
