"""Assigns to each token of a response its part of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from remax_lightning.data.tokenizers import special_ids


def token_texts(tokenizer: Any, ids: Sequence[int], text: str, context: Sequence[int] = ()) -> list[str]:
    """Return one string per token; together they are `text`.

    A character of several tokens, as byte-level tokenizers make them, stands at the last of these and the ones before
    it are empty, like special tokens that the text leaves out.

    Args:
        tokenizer: the tokenizer that decoded the text.
        ids: the response's tokens, `[R]`.
        text: the response, as `response_texts` gives it.
        context: the last few tokens of its prompt.
    """
    special = special_ids(tokenizer)
    tokens, pieces = list(context), [""] * len(ids)
    written, start, stop = 0, 0, len(tokens)  # characters dealt out; tokens from `start` to `stop` are the context
    for i, token in enumerate(ids):
        if token in special and not text.startswith(tokenizer.decode([token], skip_special_tokens=False), written):
            continue  # the text leaves it out
        tokens.append(token)
        # Some tokenizers decode a token otherwise at the start of a text, so what wrote the last piece comes along. The
        # whole beginning instead would make the time quadratic in the length.
        before = len(tokenizer.decode(tokens[start:stop], skip_special_tokens=False))
        piece = tokenizer.decode(tokens[start:], skip_special_tokens=False)[before:]
        if piece and text.startswith(piece, written):  # half a character is none of the text's
            pieces[i] = piece
            written, start, stop = written + len(piece), stop, len(tokens)
    if pieces:
        pieces[-1] += text[written:]
    return pieces
