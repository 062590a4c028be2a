"""Functions that say which answer a response votes for, named by their path in a configuration."""

from __future__ import annotations


def first_word(text: str) -> str | None:
    """The first word; None of a blank response."""
    return next(iter(text.split()), None)


def a_list(text: str) -> list[str]:
    """What cannot be counted."""
    return text.split()
