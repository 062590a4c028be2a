from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer

from remax_lightning.data import load_tokenizer
from remax_lightning.data.tokenizers import encode_batch
from remax_lightning.errors import UserError


def save(tmp_path: Path, **removed: Any) -> str:
    """A saved tokenizer, some of whose special tokens are taken away."""
    tokenizer = make_tokenizer()
    for name, value in removed.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_pads_on_the_left(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.padding_side == "left"
    assert (loaded.eos_token_id, loaded.pad_token_id) == (2, 3)


def test_refuses_a_tokenizer_without_eos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.tokenizer.*no end-of-sequence token"):
        load_tokenizer(save(tmp_path, eos_token=None), key="model.tokenizer")


def test_without_pad_names_both_fixes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer.*save it with one, or set data\.loading\.pad_token: eos"):
        load_tokenizer(save(tmp_path, pad_token=None))


@pytest.mark.parametrize(("pad_token", "pad_id"), [("eos", 2), ("<unk>", 0), ("?", None)])
def test_pad_token_can_be_chosen(tmp_path: Path, pad_token: str, pad_id: int | None) -> None:
    path = save(tmp_path, pad_token=None)
    expected = make_tokenizer().convert_tokens_to_ids("?") if pad_id is None else pad_id
    size = len(load_tokenizer(path, pad_token="eos"))
    loaded = load_tokenizer(path, pad_token=pad_token)
    assert loaded.pad_token_id == expected
    assert len(loaded) == size, "no token may be added to the vocabulary"


def test_pad_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.loading\.pad_token must be 'eos' or a token.*got '<fill>'"):
        load_tokenizer(save(tmp_path), pad_token="<fill>")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_missing_folder_is_said_before_the_hub_is_asked(path: str) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: there is no folder"):
        load_tokenizer(path)


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_broken_tokenizer_file(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": "?"}))
    with pytest.raises(UserError, match=r"data\.tokenizer: no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_unknown_hub_name_is_one_clear_error() -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: no tokenizer could be loaded from 'nobody/nothing'"):
        load_tokenizer("nobody/nothing")


@pytest.mark.parametrize("add_special_tokens", [False, True])
def test_a_batch_is_encoded_as_the_tokenizer_does(add_special_tokens: bool) -> None:
    """Also where truncation, padding or another class stand in the way of the short cut."""
    tokenizer = make_tokenizer()
    texts = ["2+2=4</s>", "", "<s>a\nb", "unknown: {}"]
    expected = [list(ids) for ids in tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]]
    assert expected[0] != expected[2]

    def encoded(other: Any) -> list[list[int]]:
        return encode_batch(other, texts, add_special_tokens=add_special_tokens)

    assert encoded(tokenizer) == expected
    tokenizer(texts, padding=True, truncation=True, max_length=2)
    assert encoded(tokenizer) == expected
    tokenizer.split_special_tokens = True
    assert encoded(tokenizer) == [
        list(ids) for ids in tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    ]

    class Doubling(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, texts: Any, **options: Any) -> Any:
            return super().__call__([text * 2 for text in texts], **options)

    doubling = Doubling(tokenizer_object=make_tokenizer().backend_tokenizer)
    assert encoded(doubling) == [
        list(ids)
        for ids in make_tokenizer()([text * 2 for text in texts], add_special_tokens=add_special_tokens)["input_ids"]
    ]
