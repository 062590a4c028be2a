"""Text that the policy did not write: responses of the data set, and pieces of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from remax_lightning.data.chat_templates import ChatRenderer
from remax_lightning.data.conversations import content_text
from remax_lightning.types import Prompt, PromptBatch, Responses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def response_texts(rows: Sequence[dict[str, Any]], column: str) -> list[str | None]:
    """Return each row's response: text, or the last of its messages, the assistant's; None where there is none."""
    return [_response_text(row.get(column)) for row in rows]


def _response_text(value: Any) -> str | None:
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        value = content_text(value[-1])
    if not isinstance(value, str) or not value.strip():
        return None
    return value.encode(errors="replace").decode()  # half an emoji stops tokenizers


def tokenize_responses(
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    prompt: PromptBatch,
    texts: Sequence[str | None],
    max_length: int,
) -> Responses:
    """Return texts as responses to the prompts, an empty one for None.

    They are tokenized as the supervised stage does it: apart from the prompt, after messages as the chat template
    writes them, with the token behind that ends a turn.

    Args:
        tokenizer: the policy's.
        policy: whose positions have to be enough for prompt and response.
        prompt: `B` prompts.
        texts: `B` responses.
        max_length: tokens that are kept of each, from its beginning.
    """
    renderer = ChatRenderer(tokenizer)
    known: list[tuple[Prompt, str]] = []
    for prompt_text, text in zip(prompt.prompts, texts, strict=True):
        if text is not None:
            start = prompt_text if isinstance(prompt_text, Prompt) else Prompt(prompt_text)
            known.append((start, renderer.response(start, {"role": "assistant", "content": text})))
    encoded = iter(renderer.response_ids([start for start, _ in known], [text for _, text in known]))
    rows: list[list[int]] = []
    for text, length in zip(texts, prompt.prompt_mask.sum(1).tolist(), strict=True):
        ids = [] if text is None else next(encoded)
        rows.append(ids[: min(max_length, _max_positions(policy) - length)])
    width, device = max(1, *map(len, rows)), prompt.prompt_ids.device
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[place < len(row) for place in range(width)] for row in rows], device=device)
    return Responses(padded, mask, ~mask.any(1), [text or "" for text in texts])


def split_text(
    tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel, text: str, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Return a text in pieces, the token ids of each with those that stand before it.

    That is the beginning-of-sequence token. Without one it is the last token of the piece before, so that every token
    but the text's first is predicted once.

    Args:
        tokenizer: the policy's.
        policy: whose positions have to be enough for a piece.
        text: the text.
        max_length: tokens of a piece.
    """
    (ids,) = _tokenize(tokenizer, [text])
    before = tokenizer.bos_token_id
    if before is not None:
        ids = [int(before), *ids]
    length = min(max_length, _max_positions(policy) - 1)
    starts = range(0, len(ids) - 1, length)
    return [([ids[start] if before is None else int(before)], ids[start + 1 : start + 1 + length]) for start in starts]


def piece_to_batch(piece: tuple[list[int], list[int]], device: torch.device) -> tuple[PromptBatch, Responses]:
    """Return a piece as a prompt and its response."""
    prompt, response = (torch.tensor([ids], device=device) for ids in piece)
    masks = [torch.ones_like(ids, dtype=torch.bool) for ids in (prompt, response)]
    return PromptBatch(prompt, masks[0], [""], [{}]), Responses(response, masks[1], ~masks[1].any(1), [""])


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _max_positions(policy: PreTrainedModel) -> int:
    return int(getattr(policy.config.get_text_config(), "max_position_embeddings", None) or 2**31)
