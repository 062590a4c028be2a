"""JSON that others wrote, parsed within bounds: rows of data, answers of servers, files beside checkpoints.

Python's parser goes as deep as the stack has room, so that a text may pass in one place and raise in another, and it
tells what is too deep or too long in errors of three kinds. Here whatever cannot be used is a `ValueError`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remax_lightning.errors import UserError

MAX_DEPTH = 64
"""How deep lists and objects may be nested. Conversations with tools reach 12; Python's own limit is near 1000."""


TOO_DEEP = f"nested too deep, more than {MAX_DEPTH} lists and objects"


def load_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: if it is no JSON, is nested deeper than `MAX_DEPTH`, or holds a whole number that is too long to be
            read; the message says which.
    """
    value = parse_json(text)
    if may_be_too_deep(text) and is_too_deep(value):
        raise ValueError(TOO_DEEP)
    return value


def read_json_object(file: Path) -> dict[str, Any]:
    """Return what a JSON file of a model holds, such as its `config.json`.

    Raises:
        UserError: naming the file, if it is no JSON, or no object.
    """
    try:
        value = load_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); complete the download") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected an object of JSON, got {type(value).__name__}; complete the download")
    return value


def parse_json(text: str | bytes, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Do what `load_json` does, for values that the caller checks for their depth.

    Args:
        text: what a file or an answer holds.
        pairs_hook: makes an object of its keys and values, as in `json.loads`.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs_hook)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        digits = sys.get_int_max_str_digits()
        raise ValueError(f"a whole number of more than {digits} digits; write it as text") from None


def may_be_too_deep(text: str | bytes) -> bool:
    """Whether a text has more brackets than the bound; most have fewer, and their values need no look."""
    if isinstance(text, str):
        return text.count("{") + text.count("[") > MAX_DEPTH
    return text.count(b"{") + text.count(b"[") > MAX_DEPTH


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than `MAX_DEPTH`, or hold themselves."""
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, dict | list | tuple):
            if depth == MAX_DEPTH:
                return True
            stack += [(inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item)]
    return False
