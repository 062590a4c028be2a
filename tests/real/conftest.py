"""Real parts as fixtures: what cannot be fetched is left out with the reason, and fails in continuous integration."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from real.fetch import FetchError, fetch
from real.published import TEMPLATES

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.real)


def part(name: str) -> Path:
    """The folder of a real part."""
    try:
        return fetch(name)
    except FetchError as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(error))


@cache
def published_tokenizer(name: str) -> Any:
    """The tokenizer of one of `TEMPLATES`, with its chat template and what it lacks to be trained with."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    published = TEMPLATES[name]
    tokenizer = AutoTokenizer.from_pretrained(part(published.tokenizer))
    if published.template:
        tokenizer.chat_template = (part("templates") / f"{published.template}.jinja").read_text(encoding="utf-8")
    tokens = [token for token in published.tokens if token not in tokenizer.get_vocab()]
    if tokens:
        added = [AddedToken(token, special=True, rstrip=published.rstrip) for token in tokens]
        tokenizer.add_tokens(added, special_tokens=True)
    if published.eos:
        tokenizer.eos_token = published.eos
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[str], Any]:
    return published_tokenizer


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: weights in float32, tokenizer, chat template."""
    return part("smollm2")
