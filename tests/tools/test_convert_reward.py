"""`remax convert-reward`: the folder it writes is plain transformers and scores as the original does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config, tiny_model
from helpers import reward_models as formats
from helpers.cli import remax
from helpers.reward_models import PROMPTS, RESPONSES, ROWS, loaded, save_classifier
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification


def openrlhf(family: str, folder: Path) -> str:
    return formats.save_openrlhf(
        folder, formats.body_of(family), torch.randn(1, 32), "value_head", normalize_reward=True, mean=0.7, std=2.5
    )


def deepspeed_chat(family: str, folder: Path) -> str:
    tokenizer = formats.opts_tokenizer() if family == "opt" else make_tokenizer(pad_is_eos=True)
    return formats.save_deepspeed_chat(folder, formats.body_of(family), torch.randn(1, 32), tokenizer)


def trl_value_head(_family: str, folder: Path) -> str:
    model = tiny_model("llama")
    model.config.save_pretrained(folder)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.tensor([0.75])}
    save_file({**state, **head}, folder / "model.safetensors", {"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def adapter(_family: str, folder: Path) -> str:
    return formats.save_adapter(folder, base_is_classifier=False)


def classifier(family: str, folder: Path) -> str:
    return save_classifier(folder, tiny_config(family))


SOURCES = [
    (openrlhf, "llama"),
    (openrlhf, "opt"),
    (deepspeed_chat, "llama"),
    (deepspeed_chat, "opt"),
    (trl_value_head, "llama"),
    (adapter, "llama"),
    (classifier, "qwen2"),
]


def scores(path: str, **options: Any) -> Tensor:
    result = loaded(path, batch_size=4, **options).score(PROMPTS, RESPONSES, ROWS)
    assert isinstance(result, Tensor)
    return result


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(("save", "family"), SOURCES, ids=[f"{save.__name__} {family}" for save, family in SOURCES])
def test_the_converted_model_scores_as_the_original(
    save: Any, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source").mkdir()
    source, out = save(family, tmp_path / "source"), tmp_path / "out"
    expected = scores(source, template=formats.TEMPLATE, allow_pickle=True)
    outcome = remax(capsys, "convert-reward", source, str(out), "--allow_pickle", "--template", formats.TEMPLATE)
    assert outcome.code == 0, outcome.err
    assert "Converted the reward model" in outcome.out
    torch.testing.assert_close(scores(str(out)), expected, rtol=1e-4, atol=1e-4)
    _, report = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {file.suffix for file in out.iterdir()} >= {".safetensors", ".json"}
    assert not list(out.glob("adapter*"))
    names = set(load_file(out / "model.safetensors"))
    assert not [name for name in names if name.startswith(("rw", "v_head", "value_head"))]


def test_a_full_folder_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = save_classifier(tmp_path / "source", tiny_config("llama")), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    outcome = remax(capsys, "convert-reward", source, str(out))
    assert (outcome.code, (out / "mine.txt").read_text()) == (2, "mine")
    assert "is not empty; give another folder, or --overwrite" in outcome.err
    assert remax(capsys, "convert-reward", source, str(out), "--overwrite").code == 0
    assert not (out / "mine.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--template", "{prompt}"], "--template: expected a text with {prompt}, {response} and {eos}"),
        (["--deepspeed_chat.pad_token", "eos"], "was not saved by DeepSpeed-Chat; remove the option"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_classifier(tmp_path / "source", tiny_config("llama"))
    outcome = remax(capsys, "convert-reward", source, str(tmp_path / "out"), *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_language_model_is_no_reward_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    outcome = remax(capsys, "convert-reward", str(tmp_path / "source"), str(tmp_path / "out"))
    assert outcome.code == 2
    assert "expected a reward model with one label" in outcome.err
    assert not (tmp_path / "out").exists()
