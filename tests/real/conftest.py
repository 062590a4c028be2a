"""Real parts as fixtures: what cannot be fetched is left out with the reason, and fails in continuous integration."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
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


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """Python of the environment with vLLM. Continuous integration has one."""
    from helpers.vllm_real import PYTHON  # imports the command line, which tests of a GPU do without

    if not PYTHON.exists():
        what = f"there is no {PYTHON}: `make vllm` installs it, with a network"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(what)
    return str(PYTHON)


@pytest.fixture
def tiny(smollm2: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that saves a random policy of some family with SmolLM2's tokenizer, with heads as vLLM takes them."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    def save(family: str, **options: Any) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes, **heads, **ids, **options)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


@pytest.fixture(autouse=True)
def freed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Free what runs with vLLM leave behind: policies in cycles with their trainers, and checkpoints, gigabytes each.

    The suite lets Python search for cycles so rarely that those of ten runs would come together.
    """
    is_vllm = request.node.get_closest_marker("vllm") is not None
    folder: Path | None = request.getfixturevalue("tmp_path") if is_vllm else None
    yield
    if folder is not None:
        gc.collect()
        for checkpoint in folder.rglob("*.ckpt"):
            checkpoint.unlink()
