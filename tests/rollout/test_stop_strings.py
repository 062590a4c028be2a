"""Stop strings are found in tokens where they are found in text."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tokenizer

from remax_lightning.rollout.stop_strings import stop_string_check


def test_without_strings_there_is_no_check() -> None:
    assert stop_string_check(make_tokenizer(), ()) is None


@pytest.mark.parametrize("text", ["abc ##", "abc #", "x\nQ:", "x\nQ: a", "Q:", "##"])
def test_a_response_is_ended_when_its_last_token_completes_a_string(text: str) -> None:
    tokenizer = make_tokenizer(bos=False)
    ended = stop_string_check(tokenizer, ("##", "\nQ:"))
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ended(ids).tolist() == [text.endswith(("##", "\nQ:"))]
