"""A response reads, and is tokenized, as it stands behind its prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer

from remax_lightning.data import SFTDataModule
from remax_lightning.data.formatting import PromptFormatter, encode_text
from remax_lightning.data.tokenizers import hidden_ids, load_tokenizer, response_texts


def sentencepiece(**special: Any) -> Any:
    """A tokenizer as Llama 2, Mistral and Yi have it: a space in front of a text, one stripped when it is decoded."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127)), "▁4", "▁a", "\n", "=4", "<0xC3>", "<0xA9>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = BPE(vocabulary, [("▁", "4"), ("▁", "a"), ("=", "4")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>", **special
    )


@pytest.mark.parametrize(
    ("prompt", "pieces", "text"),
    [
        ("Q: 2+2? Answer:", ["▁4"], " 4"),
        ("Q: 2+2? Answer:", ["▁", "▁4"], "  4"),
        ("Q: 2+2? Answer:", ["▁4", "</s>"], " 4"),
        ("def f(x):\n", ["▁", "▁", "▁", "▁a"], "    a"),
        ("12", ["3"], "3"),
        ("ros", ["<0xC3>", "<0xA9>", "▁a"], "é a"),
        ("ros", ["<0xC3>"], "\ufffd"),
        ("12", [], ""),
    ],
)
def test_sentencepiece_keeps_the_space_in_front_of_a_response(prompt: str, pieces: list[str], text: str) -> None:
    tokenizer = sentencepiece()
    prompt_ids = PromptFormatter(tokenizer).encode([PromptFormatter(tokenizer).text({"prompt": prompt}, "row 1")])[0]
    ids = tokenizer.convert_tokens_to_ids(pieces)
    hidden = hidden_ids(tokenizer, [2], skip_special_tokens=True)
    other = encode_text(tokenizer, ["x"])[0]
    # Two prompts with two responses: each is read behind its own prompt.
    texts = response_texts(tokenizer, [prompt_ids, other], [ids, [], ids, ids], hidden)
    assert texts == [text, "", text, text]


@pytest.mark.parametrize("clean_up", [False, True])
def test_a_response_keeps_the_spaces_that_a_tokenizer_would_clean_up(clean_up: bool) -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

    words = [*"x=,1!.", "do", "n't"]
    tokenizer = Tokenizer(Unigram([("<unk>", 0.0), ("</s>", 0.0), *((f"▁{word}", -1.0) for word in words)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=clean_up
    )
    response = " x = 1 , do n't ! ."
    assert response_texts(fast, encode_text(fast, ["x"]), encode_text(fast, [response])) == [response]


def test_special_tokens_are_context_but_no_text_unless_asked_for() -> None:
    tokenizer = sentencepiece(additional_special_tokens=["<think>", "</think>", "[/INST]"])
    prompt = encode_text(tokenizer, ["hi[/INST]"])[0]
    answer = [*encode_text(tokenizer, ["<think>2+2 is 4</think>4"])[0], 2]
    read = {
        skip: response_texts(tokenizer, [prompt], [answer], hidden_ids(tokenizer, [2], skip_special_tokens=skip))[0]
        for skip in (True, False)
    }
    assert read[True].replace(" ", "") == "2+2is44"
    assert read[False].replace(" ", "") == "<think>2+2is4</think>4"


@pytest.mark.parametrize("text", ["4", " 4", "    a", "x", "\n4", ""])
@pytest.mark.parametrize("start", ["", "hi"])
def test_a_response_right_behind_a_special_token_reads_as_it_was_written(start: str, text: str) -> None:
    """There SentencePiece puts a space in front of it, as at the beginning of a text: the response has none."""
    tokenizer = sentencepiece(additional_special_tokens=["[/INST]"])
    prompt, whole = (encode_text(tokenizer, [f"{start}[/INST]{end}"])[0] for end in ("", text))
    assert whole[: len(prompt)] == prompt
    assert response_texts(tokenizer, [prompt], [whole[len(prompt) :]]) == [text]


def test_ends_are_no_text_and_an_ordinary_token_that_ends_a_response_is() -> None:
    tokenizer = make_tokenizer()
    ids = [*tokenizer("ab", add_special_tokens=False)["input_ids"], 2]
    newline = tokenizer.convert_tokens_to_ids("\n")
    for skip in (True, False):
        hidden = hidden_ids(tokenizer, [2, newline], skip_special_tokens=skip)
        assert response_texts(tokenizer, [[20]], [ids, [*ids[:2], newline]], hidden) == ["ab", "ab\n"]


def test_a_prompt_that_the_decoder_rewrites_leaves_the_response_alone() -> None:
    class Joining:
        """Joins an apostrophe to what follows, as transformers' clean-up does."""

        def batch_decode(self, rows: list[list[str]], **options: Any) -> list[str]:
            return [" ".join(row).replace(" ' ", "'") for row in rows]

    assert response_texts(Joining(), [["it", "'"]], [["s", "so"]]) == ["s so"]  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize(
    ("prompt", "response"),
    [("2+2=", "4"), ("x\n", "line"), ("x:", " 4"), ("def f():\n", "    a"), ("b", "\n4"), ("q", "é4")],
)
def test_what_is_imitated_reads_as_it_stands_in_the_file(tmp_path: Path, prompt: str, response: str) -> None:
    sentencepiece().save_pretrained(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "response": response}) + "\n")
    data = SFTDataModule(str(tmp_path / "rows.jsonl"), str(tmp_path), batch_size=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    ids, prompt_ids = batch.response_ids[0].tolist(), batch.prompt_ids[0].tolist()
    tokenizer = load_tokenizer(str(tmp_path))
    assert ids[-1] == 2
    assert tokenizer.decode(prompt_ids + ids, skip_special_tokens=True) == prompt + response
    if (prompt, response) == ("x:", " 4"):
        assert tokenizer.convert_ids_to_tokens(ids) == ["▁4", "</s>"]
