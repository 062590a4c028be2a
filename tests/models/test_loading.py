"""Loading, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, tiny_config, tiny_model
from helpers.payloads import RunsCode

from remax_lightning.errors import UserError
from remax_lightning.models import LoRAConfig, ModelConfig, freeze


def test_weights_are_those_of_the_folder(policy_path: Path) -> None:
    loaded = ModelConfig(str(policy_path)).load("model.policy")
    expected = tiny_model("llama").state_dict()
    assert loaded.dtype == torch.float32
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name])


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    """A reward model has no output embedding, a base model neither; tied embeddings are saved once."""
    for family, name in (("llama", "scorer"), ("llama", "base"), ("opt", "tied")):
        model = tiny_model(family)
        if name == "base":
            model = model.model
        elif name == "scorer":
            from transformers import AutoModelForSequenceClassification

            model.config.num_labels, model.config.pad_token_id = 1, 0
            model = AutoModelForSequenceClassification.from_config(model.config)
        model.save_pretrained(tmp_path / name)
        source = ModelConfig(str(tmp_path / name))
        if name == "tied":
            source.load("model.policy")
        else:
            with pytest.raises(UserError, match=r"model\.policy\.path: .* lacks 1 weights of Llama\w+ \(lm_head"):
                source.load("model.policy")


def test_dtype_follows_the_default_unless_given(policy_path: Path) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert ModelConfig(str(policy_path)).load("model.policy").dtype == torch.bfloat16
        assert ModelConfig(str(policy_path), dtype="float32").load("model.policy").dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_dropout_is_off_unless_wanted(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    assert config.resid_pdrop > 0
    config.save_pretrained(tmp_path)
    model = ModelConfig(str(tmp_path), from_scratch=True).load("model.policy").train()
    ids = torch.arange(5, 25)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    noisy = ModelConfig(str(tmp_path), from_scratch=True, disable_dropout=False).load("model.policy").train()
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)


def test_from_scratch_needs_a_configuration_only(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    torch.manual_seed(0)
    first = ModelConfig(str(tmp_path), from_scratch=True).load("model.policy")
    torch.manual_seed(1)
    other = ModelConfig(str(tmp_path), from_scratch=True).load("model.policy")
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    with pytest.raises(UserError, match=r"model\.policy\.path: cannot load"):
        ModelConfig(str(tmp_path)).load("model.policy")


def test_gradient_checkpointing_changes_no_gradient(policy_path: Path) -> None:
    ids = torch.arange(5, 25)[None]
    gradients = []
    for checkpointing in (False, True):
        model = ModelConfig(str(policy_path), gradient_checkpointing=checkpointing).load("model.policy").train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == checkpointing
        model(ids, labels=ids).loss.backward()
        gradients.append(model.lm_head.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_pickled_weights_need_consent(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load"):
        ModelConfig(str(tmp_path)).load("model.policy")
    loaded = ModelConfig(str(tmp_path), allow_pickle=True).load("model.policy")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("content", ["code", "damaged"])
def test_pickled_code_is_named_and_torchs_advice_to_run_it_is_not(content: str, tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    torch.save({"x": RunsCode(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    if content == "damaged":
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02no weights")
    with pytest.raises(UserError, match=r"^model\.policy\.path: cannot load .*: a pickled weight file in it") as error:
        ModelConfig(str(tmp_path), allow_pickle=True).load("model.policy")
    assert "weights_only" not in str(error.value)
    assert ("holds code (posix.system), which is not run" in str(error.value)) == (content == "code")
    assert not (tmp_path / "ran").exists()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.reference\.path: there is no folder '.*nowhere'"):
        ModelConfig(str(tmp_path / "nowhere")).load("model.reference")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.policy\.path: cannot load"):
        ModelConfig(str(tmp_path)).load("model.policy")


def test_freeze(policy_path: Path) -> None:
    model = freeze(ModelConfig(str(policy_path)).load("model.reference").train())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.policy\.path: .* is an adapter.*model\.policy\.lora\.path"):
        ModelConfig(str(tmp_path)).load("model.policy")


def test_the_home_folder_may_be_written_as_a_tilde(
    policy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves it in YAML files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").symlink_to(policy_path)
    assert ModelConfig("~/mine").load("model.policy").config.model_type == "llama"
    assert LoRAConfig(path="~/adapter").path == str(tmp_path / "adapter")
    assert ModelConfig("~nobody-of-this-name/mine").path == "~nobody-of-this-name/mine"
    with pytest.raises(UserError, match=f"there is no folder '{tmp_path}/gone'"):
        ModelConfig("~/gone").load("model.policy")
