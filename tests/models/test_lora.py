"""Adapters: what they are made of, what of the policy they leave alone, and the way back to their start."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from helpers.payloads import RunsCode
from helpers.training import save_policy

from remax_lightning.errors import UserError
from remax_lightning.models import LoRAConfig, ModelConfig, initial_adapter

IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("trained")
    model = adapted(base, LoRAConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"]))
    moved(model)
    model.save_pretrained(folder)
    return str(folder)


def adapted(base: str, lora: LoRAConfig, **options: Any) -> Any:
    return ModelConfig(base, lora=lora, **options).load("model.policy")


def moved(model: Any) -> None:
    """Give the adapter in training random weights."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(base: str) -> None:
    model = adapted(base, LoRAConfig(r=3))
    names = trainable(model)
    assert len(names) == 2 * 2 * 7  # two matrices, two layers, every projection of attention and of the rest
    assert {value.shape[0] for name, value in names.items() if ".lora_A." in name} == {3}
    assert not any("lm_head" in name for name in names)
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def test_chosen_layers_are_adapted(base: str) -> None:
    names = trainable(adapted(base, LoRAConfig(target_modules=["q_proj", "v_proj"])))
    assert {name.split(".")[-4] for name in names} == {"q_proj", "v_proj"}
    assert len(names) == 2 * 2 * 2


def test_the_update_counts_alpha_over_r_fold(base: str) -> None:
    model = adapted(base, LoRAConfig(r=2, alpha=6, target_modules=["o_proj"]))
    moved(model)
    plain = tiny_model("llama")
    for name, value in trainable(model).items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            up = model.get_parameter(name.replace("lora_A", "lora_B"))
            plain.get_submodule(layer).weight.data += 3 * up.detach() @ value.detach()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def test_an_adapter_is_drawn_from_the_seed_alone(base: str) -> None:
    """Not from what was drawn before, which differs between strategies; and it takes nothing from what comes after."""
    torch.manual_seed(3)
    first = trainable(adapted(base, LoRAConfig()))
    following = torch.rand(1)
    torch.manual_seed(3)
    torch.rand(7)
    second = trainable(adapted(base, LoRAConfig()))
    torch.manual_seed(3)
    ModelConfig(base).load("model.policy")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.rand(1), following)
    torch.manual_seed(4)
    other = trainable(adapted(base, LoRAConfig()))
    assert not torch.equal(first[next(iter(first))], other[next(iter(other))])


def test_at_start_is_the_base_under_a_new_adapter(base: str) -> None:
    model = adapted(base, LoRAConfig())
    moved(model)
    now, names = logits(model), trainable(model).keys()
    with initial_adapter(model):
        assert torch.equal(logits(model), logits(tiny_model("llama")))
    assert torch.equal(logits(model), now)
    assert not torch.allclose(now, logits(tiny_model("llama")))
    assert trainable(model).keys() == names


def test_at_start_is_the_adapter_as_it_came(base: str, trained: str) -> None:
    model = adapted(base, LoRAConfig(path=trained))
    start, names = logits(model), trainable(model)
    assert not torch.allclose(start, logits(tiny_model("llama")))
    assert {value.shape[0] for name, value in names.items() if ".lora_A." in name} == {3}  # its own rank
    assert all(".default." in name for name in names)
    with torch.no_grad():
        for parameter in names.values():
            parameter.add_(0.5)
    now = logits(model)
    with initial_adapter(model):
        assert torch.equal(logits(model), start)
        assert not trainable(model)
    assert torch.equal(logits(model), now)
    assert not torch.allclose(now, start)
    assert trainable(model).keys() == names.keys()


def test_the_way_back_is_taken_after_an_error_too(base: str, trained: str) -> None:
    for lora in (LoRAConfig(), LoRAConfig(path=trained)):
        model = adapted(base, lora)
        moved(model)
        now, names = logits(model), trainable(model).keys()
        with pytest.raises(RuntimeError, match="out of memory"), initial_adapter(model):
            raise RuntimeError("out of memory")
        assert torch.equal(logits(model), now)
        assert trainable(model).keys() == names


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("path", [False, True])
def test_gradient_checkpointing_changes_no_gradient(path: bool, base: str, trained: str) -> None:
    """With a frozen embedding a checkpointed layer may get inputs without gradient, and silently have none itself."""
    gradients = []
    for checkpointing in (False, True):
        lora = LoRAConfig(path=trained) if path else LoRAConfig(r=2)
        model = adapted(base, lora, gradient_checkpointing=checkpointing).train()
        moved(model)
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == checkpointing
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(value.grad is not None and value.grad.abs().max() > 0 for value in trainable(model).values())
        gradients.append({name: value.grad for name, value in trainable(model).items()})
        assert all(value.grad is None for value in model.parameters() if not value.requires_grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.slow(0.3)
def test_the_adapter_is_of_the_precision_that_is_trained_in(base: str) -> None:
    """A base of 16 bits under bf16-mixed: the adapter has 32, which small updates need. Under bf16-true all have 16."""
    model = adapted(base, LoRAConfig(), dtype="bfloat16")
    assert {value.dtype for value in trainable(model).values()} == {torch.float32}
    assert {value.dtype for value in model.parameters() if not value.requires_grad} == {torch.bfloat16}
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert {value.dtype for value in adapted(base, LoRAConfig()).parameters()} == {torch.bfloat16}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("options", "message"), [
    ({"r": 0}, r"model\.policy\.lora\.r must be at least 1, got 0"),
    ({"alpha": 0}, r"model\.policy\.lora\.alpha must be above 0, got 0"),
    ({"dropout": 1.0}, r"model\.policy\.lora\.dropout must be 0 or more and below 1, got 1\.0"),
    ({"target_modules": []}, r"model\.policy\.lora\.target_modules must be null or at least one name"),
    ({"path": "somewhere", "r": 4}, r"model\.policy\.lora: r, alpha.* come from the adapter at path 'somewhere'"),
])  # fmt: skip
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRAConfig(**options)


def test_layers_that_are_not_there_are_named(base: str) -> None:
    with pytest.raises(UserError, match=r"model\.policy\.lora: cannot adapt LlamaForCausalLM: .*q_porj"):
        adapted(base, LoRAConfig(target_modules=["q_porj"]))


@pytest.mark.slow(0.3)
def test_what_is_no_adapter_is_refused(base: str, trained: str, tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model

    for path, message in (
        (str(tmp_path / "nowhere"), r"model\.policy\.lora\.path: there is no folder '.*nowhere'"),
        (base, r"model\.policy\.lora\.path: .* is not an adapter"),
    ):
        with pytest.raises(UserError, match=message):
            adapted(base, LoRAConfig(path=path))
    other = get_peft_model(tiny_model("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    other.save_pretrained(tmp_path / "ia3")
    with pytest.raises(UserError, match=r"expected a LoRA adapter, got IA3 in"):
        adapted(base, LoRAConfig(path=str(tmp_path / "ia3")))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_changes_its_base_is_refused(start: str, base: str, tmp_path: Path) -> None:
    """It is loaded twice, which changed the base twice: the policy was another one than that of PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"an adapter that leaves its base as it is, got init_lora_weights '{start}'"):
        adapted(base, LoRAConfig(path=str(tmp_path)))


def test_an_adapter_of_another_model_is_refused(trained: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_model("llama").config
    config.num_hidden_layers = 3
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot load the adapter .* into LlamaForCausalLM: it has no .*layers\.2"):
        adapted(str(tmp_path), LoRAConfig(path=trained))


@pytest.mark.parametrize("other", [{"lora": LoRAConfig()}, {"quantization": "nf4"}])
def test_a_frozen_base_does_not_start_from_scratch(base: str, other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.policy\.from_scratch must be false with model\.policy\.(lora|quanti)"):
        ModelConfig(base, from_scratch=True, **other).load("model.policy")


def test_code_in_a_saved_adapter_is_named_and_not_run(base: str, trained: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(trained, folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": RunsCode(tmp_path / "ran")}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"cannot load the adapter .* holds code \(posix\.system\)") as error:
        adapted(base, LoRAConfig(path=str(folder)))
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()
