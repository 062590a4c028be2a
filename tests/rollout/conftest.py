"""A policy, and small servers with vLLM's endpoints that hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
from conftest import make_tokenizer
from helpers.training import save_policy
from helpers.vllm_server import FakeVLLM


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def loaded(policy: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy).eval()


@pytest.fixture
def model(loaded: Any) -> Any:
    return deepcopy(loaded)


@pytest.fixture
def serve(loaded: Any) -> Iterator[Callable[..., FakeVLLM]]:
    servers: list[FakeVLLM] = []

    def start(**faults: Any) -> FakeVLLM:
        servers.append(FakeVLLM(loaded, make_tokenizer(), **faults).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()
