"""Which part of a response's text each of its tokens wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_texts(tokenizer: Any, ids: Sequence[int], text: str) -> list[str]:
    """Return one string per token; together they are `text`.

    A character of several tokens, as byte-level tokenizers make them, stands at the last of these and the ones before
    it are empty, like special tokens, which the text leaves out.

    Args:
        tokenizer: that the text was decoded with.
        ids: the response's tokens, `[R]`.
        text: the response, without special tokens.
    """
    pieces: list[str] = []
    written = start = stop = 0  # characters dealt out; tokens from `start` to `stop` are the context
    for end in range(1, len(ids) + 1):
        # Some tokenizers decode a token otherwise at the start of a text, so what wrote the last piece comes along. The
        # whole beginning instead would make the time quadratic in the length.
        context = len(tokenizer.decode(ids[start:stop], skip_special_tokens=True))
        piece = tokenizer.decode(ids[start:end], skip_special_tokens=True)[context:]
        whole = bool(piece) and text.startswith(piece, written)  # half a character is none of the text's
        pieces.append(piece if whole else "")
        if whole:
            written, start, stop = written + len(piece), stop, end
    if pieces:
        pieces[-1] += text[written:]
    return pieces
