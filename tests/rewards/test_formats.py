"""Reward models as other projects save them, against those projects' own formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config, tiny_model
from helpers.reward_models import (
    CHAT,
    EOS,
    PROMPTS,
    RESPONSES,
    ROWS,
    TEMPLATE,
    Harmful,
    body_of,
    loaded,
    opts_tokenizer,
    save_adapter,
    save_classifier,
    save_deepspeed_chat,
    save_openrlhf,
)
from oracles import reward_formulas
from safetensors.torch import load_file, save_file
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.rewards import ClassifierReward, DeepSpeedChatConfig
from remax_lightning.rewards.loading import ClassifierSource, tokenizer_location


def ids_of(tokenizer: Any) -> list[list[int]]:
    texts = [f"Human: {p}\nAssistant: {r}{tokenizer.eos_token}" for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    return [tokenizer(text)["input_ids"] for text in texts]


def scores_of(path: str, **options: Any) -> Tensor:
    scores = loaded(path, template=TEMPLATE, batch_size=4, **options).score(PROMPTS, RESPONSES, ROWS)
    assert isinstance(scores, Tensor)
    return scores


def close(scores: Tensor, expected: list[float]) -> None:
    wanted = torch.tensor(expected)
    assert wanted.std() > 0.05
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4)


# DeepSpeed-Chat


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("name", ["rwtranrsformer", "rwtransformer"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_deepspeed_chat_scores_the_token_before_its_padding(tmp_path: Path, family: str, name: str) -> None:
    """OPT's first token is the pad token, and that one does not end the text: `num_padding_at_beginning` is 1."""
    body = body_of(family)
    tokenizer = opts_tokenizer() if family == "opt" else make_tokenizer(pad_is_eos=True)
    v_head = torch.randn(1, 32)
    path = save_deepspeed_chat(tmp_path, body, v_head, tokenizer, name=name)
    num_padding = 1 if family == "opt" else 0
    expected = reward_formulas.deepspeed_chat(body, v_head, ids_of(tokenizer), EOS, num_padding)
    close(scores_of(path, allow_pickle=True), expected)
    said = DeepSpeedChatConfig(num_padding_at_beginning=num_padding, pad_token="eos")
    close(scores_of(path, allow_pickle=True, deepspeed_chat=said), expected)


def test_deepspeed_chat_with_a_pad_token_of_its_own_scores_the_last_token(tmp_path: Path) -> None:
    body, v_head, tokenizer = body_of("llama"), torch.randn(1, 32), make_tokenizer()
    path = save_deepspeed_chat(tmp_path, body, v_head, tokenizer)
    expected = reward_formulas.deepspeed_chat(body, v_head, ids_of(tokenizer), 3, 0)
    with pytest.raises(
        UserError, match=r"deepspeed_chat\.pad_token must say .* tokenizer and .* say '<pad>' and '</s>'"
    ):
        scores_of(path, allow_pickle=True)
    close(scores_of(path, allow_pickle=True, deepspeed_chat=DeepSpeedChatConfig(pad_token="<pad>")), expected)


def test_deepspeed_chat_reads_no_further_than_the_first_end(tmp_path: Path) -> None:
    body, v_head, tokenizer = body_of("llama"), torch.randn(1, 32), make_tokenizer(pad_is_eos=True)
    path = save_deepspeed_chat(tmp_path, body, v_head, tokenizer)
    reward = loaded(path, template="{prompt}{response}", allow_pickle=True)
    rows = [tokenizer("one</s>two</s>")["input_ids"], tokenizer("one")["input_ids"]]
    expected = reward_formulas.deepspeed_chat(body, v_head, rows, EOS, 0)
    assert expected[0] == pytest.approx(expected[1])
    close_to = torch.tensor(expected)
    torch.testing.assert_close(
        reward.score(["one", "one"], ["</s>two</s>", ""], [{}, {}]), close_to, rtol=1e-4, atol=1e-4
    )


def test_a_first_token_that_is_taken_for_padding_is_told(tmp_path: Path) -> None:
    path = save_deepspeed_chat(tmp_path, body_of("opt"), torch.randn(1, 32), opts_tokenizer())
    with pytest.raises(
        UserError, match=r"deepspeed_chat\.num_padding_at_beginning is 0, but texts begin with pad token 2"
    ):
        scores_of(path, allow_pickle=True, deepspeed_chat=DeepSpeedChatConfig(num_padding_at_beginning=0))


def test_the_settings_of_deepspeed_chat_are_for_its_models_alone(tmp_path: Path) -> None:
    path = save_classifier(tmp_path, tiny_config("llama"))
    with pytest.raises(
        UserError, match=r"init_args\.deepspeed_chat: .* was not saved by DeepSpeed-Chat; remove the key"
    ):
        loaded(path, deepspeed_chat=DeepSpeedChatConfig())


def test_the_bin_file_of_deepspeed_chat_needs_the_flag(tmp_path: Path) -> None:
    body, v_head, tokenizer = body_of("llama"), torch.randn(1, 32), make_tokenizer(pad_is_eos=True)
    path = save_deepspeed_chat(tmp_path, body, v_head, tokenizer)
    # Its configuration is a language model's, which says two labels; that is not what is wrong.
    with pytest.raises(
        UserError, match=r"convert the weights to safetensors, or set model\.reward\.init_args\.allow_pickle"
    ):
        scores_of(path)
    torch.save({"rwtranrsformer.x": Harmful(tmp_path / "touched")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot be loaded: .* holds code") as error:
        scores_of(path, allow_pickle=True)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "touched").exists()


def test_an_old_bin_file_is_read_too(tmp_path: Path) -> None:
    body, v_head, tokenizer = body_of("llama"), torch.randn(1, 32), make_tokenizer(pad_is_eos=True)
    path = save_deepspeed_chat(tmp_path, body, v_head, tokenizer)
    expected = scores_of(path, allow_pickle=True)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(scores_of(path, allow_pickle=True), expected)


# OpenRLHF


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("prefix", ["value_head", "score", "reward_head"])
def test_openrlhf_scores_the_last_token_and_may_normalize(tmp_path: Path, prefix: str) -> None:
    body, head = body_of("llama"), torch.randn(1, 32)
    named = {} if prefix == "value_head" else {"value_head_prefix": prefix}
    path = save_openrlhf(tmp_path, body, head, prefix, normalize_reward=False, mean=0.7, std=2.5, **named)
    rows = ids_of(make_tokenizer())
    close(scores_of(path), reward_formulas.openrlhf(body, head, rows, 0.7, 2.5))
    close(scores_of(path, normalize=False), reward_formulas.openrlhf(body, head, rows, None, None))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), ("half", 1.0)])
def test_a_normalization_that_cannot_be_is_refused(tmp_path: Path, mean: Any, std: float) -> None:
    path = save_openrlhf(tmp_path, body_of("llama"), torch.randn(1, 32), "value_head", mean=mean, std=std)
    with pytest.raises(UserError, match=r"config\.json: mean and std, which normalize the score, must be finite"):
        scores_of(path)


# TRL


def test_trls_value_head_has_a_bias(tmp_path: Path) -> None:
    model = tiny_model("llama")
    weight, bias = torch.randn(1, 32), torch.tensor([0.75])
    model.config.save_pretrained(tmp_path)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file({**state, "v_head.summary.weight": weight, "v_head.summary.bias": bias}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    make_tokenizer().save_pretrained(tmp_path)
    expected = reward_formulas.trl_value_head(model.model, weight, 0.75, ids_of(make_tokenizer()))
    close(scores_of(str(tmp_path)), expected)
    close(scores_of(str(tmp_path), normalize=False), expected)


def test_a_reward_model_of_trls_trainer_in_shards(tmp_path: Path) -> None:
    """It is a plain sequence classifier, here in several files."""
    from transformers import AutoModelForSequenceClassification

    path = save_classifier(tmp_path / "whole", tiny_config("qwen2"))
    expected = scores_of(path)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    make_tokenizer(chat_template=CHAT).save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    torch.testing.assert_close(scores_of(str(tmp_path / "shards")), expected)


@pytest.mark.slow(0.3)
def test_shards_of_a_foreign_format_and_a_missing_one(tmp_path: Path) -> None:
    body, v_head, tokenizer = body_of("llama"), torch.randn(1, 32), make_tokenizer(pad_is_eos=True)
    path = save_deepspeed_chat(tmp_path, body, v_head, tokenizer, pickled=False)
    expected = reward_formulas.deepspeed_chat(body, v_head, ids_of(tokenizer), EOS, 0)
    body.float()
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    halves = [dict(list(state.items())[:5]), dict(list(state.items())[5:])]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, tmp_path / name, {"format": "pt"})
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    close(scores_of(path), expected)
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=r"index\.json: there is no file 'model-00002-of-00002\.safetensors'"):
        scores_of(path)


# PEFT


def test_the_tokenizer_of_a_base_is_of_the_revision_of_the_base(tmp_path: Path) -> None:
    """Not of that of the adapter, which is one of another repository."""
    path = save_adapter(tmp_path, base_is_classifier=True, tokenizer=False)
    config = Path(path) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"revision": "of-base"}))
    source = ClassifierSource(path, "model.reward.init_args", revision="of-adapter")
    assert tokenizer_location(source) == (str(tmp_path / "base"), "of-base")
    make_tokenizer().save_pretrained(path)
    assert tokenizer_location(source) == (path, "of-adapter")


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("base_is_classifier", [False, True])
def test_an_adapter_is_merged_with_its_head(tmp_path: Path, base_is_classifier: bool, pickled: bool) -> None:
    path = save_adapter(tmp_path, base_is_classifier=base_is_classifier, tokenizer=not base_is_classifier)
    adapter = load_file(Path(path) / "adapter_model.safetensors")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    changed = 0
    for name, down in adapter.items():
        if "lora_A" in name:
            target = name.removeprefix("base_model.model.").replace("lora_A.", "")
            up = adapter[name.replace("lora_A", "lora_B")]
            weights[target] = reward_formulas.with_lora(weights[target], down, up, 5)
            changed += 1
    assert changed == 4
    body = body_of("llama").double()
    body.load_state_dict({name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")})
    head = adapter["base_model.model.score.weight"]
    expected = reward_formulas.openrlhf(body, head, ids_of(make_tokenizer()), None, None)
    if pickled:
        torch.save(adapter, Path(path) / "adapter_model.bin")
        (Path(path) / "adapter_model.safetensors").unlink()
        with pytest.raises(UserError, match=r"has no safetensors; convert its weights, or set .*\.allow_pickle"):
            scores_of(path)
    close(scores_of(path, allow_pickle=pickled), expected)


@pytest.mark.parametrize("content", ["code", "damaged"])
def test_code_in_an_adapter_is_named_and_not_run(content: str, tmp_path: Path) -> None:
    path = Path(save_adapter(tmp_path, base_is_classifier=True))
    (path / "adapter_model.safetensors").unlink()
    torch.save({"x": Harmful(tmp_path / "touched")}, path / "adapter_model.bin")
    if content == "damaged":
        (path / "adapter_model.bin").write_bytes(b"PK\x03\x04 cut")
    said = "holds code" if content == "code" else "damaged"
    with pytest.raises(UserError, match=rf"init_args\.path: cannot load the adapter .*{said}") as error:
        scores_of(str(path), allow_pickle=True)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "touched").exists()


@pytest.mark.slow
def test_an_adapter_without_a_head_takes_that_of_its_base_or_is_refused(tmp_path: Path) -> None:
    path = save_adapter(tmp_path / "a", base_is_classifier=True, with_head=False)
    assert scores_of(path).isfinite().all()
    path = save_adapter(tmp_path / "b", base_is_classifier=False, with_head=False)
    with pytest.raises(UserError, match=r"has no score head, and neither has its base .*modules_to_save: \[score\]"):
        scores_of(path)


@pytest.mark.slow(0.3)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = save_adapter(tmp_path, base_is_classifier=True)
    weights = load_file(Path(path) / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_A" in name)
    save_file({**weights, name: torch.zeros(3, 7)}, Path(path) / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors does not fit its base .*size mismatch"):
        scores_of(path)
    save_file({key: value for key, value in weights.items() if key != name}, Path(path) / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"does not fit its base .*, which differs from it in .*lora_A"):
        scores_of(path)
    (Path(path) / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights; expected adapter_model"):
        scores_of(path)
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    save_file(weights, Path(path) / "adapter_model.safetensors")
    for base, message in (
        ("./gone", r"'\./gone' cannot be loaded; base_model_name_or_path in .*"),
        (None, "must name"),
    ):
        (Path(path) / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises(UserError, match=message):
            scores_of(path)


# Checkpoints of the wrong shape


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            torch.randn(3, 32),
            r"pytorch_model\.bin: expected v_head\.weight of shape \[1, D\], one score, got \[3, 32\]",
        ),
        (torch.randn(32), r"pytorch_model\.bin: expected v_head\.weight of shape \[1, D\], one score, got \[32\]"),
        (torch.randn(1, 16), r"pytorch_model\.bin: v_head\.weight has shape \[1, 16\], the model .* needs \[1, 32\]"),
    ],
)
def test_a_foreign_head_of_the_wrong_shape_names_file_and_tensor(tmp_path: Path, head: Tensor, message: str) -> None:
    path = save_deepspeed_chat(tmp_path, body_of("llama"), head, make_tokenizer(pad_is_eos=True))
    with pytest.raises(UserError, match=message):
        scores_of(path, allow_pickle=True)


@pytest.mark.slow(0.3)
def test_a_foreign_checkpoint_without_its_head_or_a_layer(tmp_path: Path) -> None:
    body = body_of("llama")
    path = save_deepspeed_chat(tmp_path, body, torch.randn(1, 32), make_tokenizer(pad_is_eos=True), pickled=False)
    state = load_file(tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    save_file({name: value for name, value in state.items() if name != "v_head.weight"}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"has no v_head\.weight, the score head of deepspeed_chat"):
        scores_of(path)
    save_file({name: value for name, value in state.items() if "layers.1.mlp.up" not in name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"without model\.layers\.1\.mlp\.up_proj\.weight"):
        scores_of(path)
    wrong = {**state, "rwtranrsformer.norm.weight": torch.ones(31)}
    save_file(wrong, file, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"model\.safetensors: rwtranrsformer\.norm\.weight has shape \[31\], .* \[32\]"
    ):
        scores_of(path)


def test_weights_that_are_no_dictionary_are_refused(tmp_path: Path) -> None:
    path = save_deepspeed_chat(tmp_path, body_of("llama"), torch.randn(1, 32), make_tokenizer(pad_is_eos=True))
    torch.save([torch.zeros(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: expected a dictionary of tensors by name, got a list"):
        scores_of(path, allow_pickle=True)


@pytest.mark.slow(0.3)
def test_a_foreign_model_is_saved_under_transformers_names(tmp_path: Path) -> None:
    """Transformers would write it back under the names that it was loaded by."""
    path = save_deepspeed_chat(tmp_path, body_of("opt"), torch.randn(1, 32), opts_tokenizer())
    reward = ClassifierReward(path, template=TEMPLATE, allow_pickle=True)
    reward.load(torch.device("cpu"))
    assert reward.model is not None
    reward.model.save_pretrained(tmp_path / "saved")
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert "score.weight" in names
    assert not [name for name in names if name.startswith(("rw", "v_head"))]
