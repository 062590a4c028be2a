"""Assigns to each token of a response its part of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_texts(tokenizer: Any, ids: Sequence[int], text: str) -> list[str]:
    """Return one string per token; their concatenation is `text`.

    If several tokens encode one character, as in byte-level tokenizers, the last one gets the character and the others
    are empty. Special tokens are empty, too.

    Args:
        tokenizer: the tokenizer that decoded the text.
        ids: the response's tokens, `[R]`.
        text: the response, without special tokens.
    """
    pieces: list[str] = []
    written = start = stop = 0  # characters assigned so far; tokens `start` to `stop` are the context
    for end in range(1, len(ids) + 1):
        # Some tokenizers decode a token differently at the start of a text, so the tokens of the last piece are decoded
        # along with it. Decoding the whole prefix would be quadratic in the length.
        context = len(tokenizer.decode(ids[start:stop], skip_special_tokens=True))
        piece = tokenizer.decode(ids[start:end], skip_special_tokens=True)[context:]
        complete = bool(piece) and text.startswith(piece, written)  # false for part of a character
        pieces.append(piece if complete else "")
        if complete:
            written, start, stop = written + len(piece), stop, end
    if pieces:
        pieces[-1] += text[written:]
    return pieces
