"""Stop strings are found in tokens where they are found in text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_tokenizer

from remax_lightning.errors import UserError
from remax_lightning.rollout.base import stop_string_check


def test_without_strings_there_is_no_check() -> None:
    assert stop_string_check(make_tokenizer(), ()) is None


@pytest.mark.parametrize("text", ["abc ##", "abc #", "x\nQ:", "x\nQ: a", "Q:", "##"])
def test_a_response_is_ended_when_its_last_token_completes_a_string(text: str) -> None:
    tokenizer = make_tokenizer(bos=False)
    ended = stop_string_check(tokenizer, ("##", "\nQ:"))
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ended(ids).tolist() == [text.endswith(("##", "\nQ:"))]


def digits_tokenizer() -> Any:
    """A vocabulary for arithmetic: no letter is in it."""
    from tokenizers import Regex, Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *"0123456789+=;\n"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def test_a_vocabulary_without_letters_is_searched_too() -> None:
    tokenizer = digits_tokenizer()
    ended = stop_string_check(tokenizer, (";", "=1\n"))
    texts = {"12;": True, "12": False, "1;2": False, "2=1\n": True, "2=2\n": False}
    assert {text: bool(ended(torch.tensor([tokenizer(text)["input_ids"]]))) for text in texts} == texts


@pytest.mark.parametrize("string", ["x", ";x", "x;", "\nQ:"])
def test_a_string_that_the_vocabulary_cannot_write_is_refused(string: str) -> None:
    with pytest.raises(UserError, match=r"^model\.sampling\.stop_strings: .*can write, got"):
        stop_string_check(digits_tokenizer(), (";", string))
