"""The text of each token: together the response's text, whatever the tokenizer does at the edges of a text."""

from __future__ import annotations

import random
from typing import Any

import pytest
from conftest import make_tokenizer

from remax_lightning.callbacks.samples import token_texts

TEXTS = ["", "a", "one two  three", "数学 é 🤖!", "🤖🤖", "line\nline \n", " leading", "e\u0301 \u200d", "<b>"]


def byte_tokenizer() -> Any:
    """Every byte a token, as GPT-2 writes them, and `</s>`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def word_tokenizer() -> Any:
    """Words with their space in front, as SentencePiece writes them: a text's first space is dropped."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pieces = ["▁one", "▁two", "▁", "s", "▁three", "a"]
    vocabulary = {"</s>": 0, **{piece: i + 1 for i, piece in enumerate(pieces)}}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    pieces = token_texts(tokenizer, ids, text)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_of_several_bytes_stands_at_the_last(text: str) -> None:
    tokenizer = byte_tokenizer()
    pieces = pieces_of(tokenizer, [*tokenizer.encode(text), 0])
    expected = [part for letter in text for part in [""] * (len(letter.encode()) - 1) + [letter]]
    assert pieces == [*expected, ""]


def test_bytes_that_are_no_character_add_up_to_the_text_too() -> None:
    tokenizer, chance = byte_tokenizer(), random.Random(0)
    for _ in range(200):
        pieces_of(tokenizer, [chance.randrange(257) for _ in range(chance.randrange(12))])


def test_a_character_cut_by_the_length_limit_is_kept() -> None:
    tokenizer = byte_tokenizer()
    assert pieces_of(tokenizer, tokenizer.encode("a数")[:-1])[0] == "a"


def test_a_space_in_front_of_a_word_belongs_to_it() -> None:
    assert pieces_of(word_tokenizer(), [1, 4, 2, 3, 5, 0]) == ["one", "s", " two", " ", " three", ""]


def test_random_words_add_up_to_the_text() -> None:
    tokenizer, chance = word_tokenizer(), random.Random(0)
    for _ in range(100):
        pieces_of(tokenizer, [chance.randrange(7) for _ in range(8)])


def test_special_tokens_are_empty_wherever_they_stand() -> None:
    tokenizer = make_tokenizer()
    assert pieces_of(tokenizer, [1, *tokenizer.encode("ab", add_special_tokens=False), 2, 2]) == ["", "a", "b", "", ""]
    assert pieces_of(tokenizer, []) == []


def test_a_text_that_was_decoded_otherwise_is_still_whole() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("abc", add_special_tokens=False)
    assert "".join(token_texts(tokenizer, ids, "something else")) == "something else"


def test_the_time_is_linear_in_the_length() -> None:
    class Counting:
        decoded = 0

        def decode(self, ids: list[int], **options: Any) -> str:
            self.decoded += len(ids)
            return "".join(map(chr, ids))

    tokenizer = Counting()
    text = "abcdefgh" * 100
    assert token_texts(tokenizer, [*map(ord, text)], text) == [*text]
    assert tokenizer.decoded < 4 * len(text)


def test_the_first_token_is_read_behind_its_prompt() -> None:
    tokenizer = word_tokenizer()
    assert token_texts(tokenizer, [2, 4, 0], " twos", context=[1, 5]) == [" two", "s", ""]


def test_special_tokens_that_the_text_holds_are_its_own() -> None:
    tokenizer = make_tokenizer()
    ids = [20, 1, 21, 2]
    text = tokenizer.decode(ids[:3], skip_special_tokens=False)
    assert token_texts(tokenizer, ids, text) == [text[0], "<s>", text[-1], ""]
