from __future__ import annotations

from typing import Any

import pytest
from conftest import make_tokenizer

from remax_lightning.data.conversations import conversation_ids

BOS, EOS = 1, 2


def tokenizer_with(single: str) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


@pytest.mark.parametrize("single", ["<s> $A", "$A </s>", "<s> $A </s>"])
def test_text_gets_the_special_tokens_and_a_chat_template_has_written_its_own(single: str) -> None:
    tokenizer = tokenizer_with(single)
    (text,) = conversation_ids(tokenizer, ["ab"])
    (chat,) = conversation_ids(tokenizer, ["ab"], is_chat=True)
    inner = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert chat == inner
    assert text == [*([BOS] if "<s>" in single else []), *inner, *([EOS] if "</s>" in single else [])]


@pytest.mark.parametrize("spelled", ["ab", "<s>ab", "ab</s>", "<s>ab</s>"])
def test_what_the_text_spells_out_stands_once(spelled: str) -> None:
    (ids,) = conversation_ids(tokenizer_with("<s> $A </s>"), [spelled])
    assert (ids[0], ids[-1], ids.count(BOS), ids.count(EOS)) == (BOS, EOS, 1, 1)


def test_other_tokens_may_repeat() -> None:
    tokenizer = tokenizer_with("$A")
    assert conversation_ids(tokenizer, ["aab</s>b", "aa", "a"]) == [
        tokenizer(text)["input_ids"] for text in ("aab</s>b", "aa", "a")
    ]
    assert conversation_ids(tokenizer, []) == []
