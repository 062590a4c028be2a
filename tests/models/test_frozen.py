"""Where a frozen model is between its passes, with torch's `meta` as a second device that every machine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from torch import nn

from remax_lightning.errors import UserError
from remax_lightning.models.frozen import FrozenModel, Placement
from remax_lightning.sharding import decoder_layers

CPU, OTHER = torch.device("cpu"), torch.device("meta")
IDS = torch.arange(5, 25)[None]


def places(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


def frozen_model(
    model: Any, placement: Placement, device: torch.device, resident: nn.Module | None = None
) -> FrozenModel:
    frozen = FrozenModel(model, placement, "key")
    frozen.place(device, resident)
    return frozen


def test_a_frozen_model_is_in_eval_mode_without_gradients() -> None:
    model = tiny_model("gpt2").train()
    frozen = frozen_model(model, "replicate", CPU)
    assert not model.training
    with frozen.running():
        assert not model(IDS).logits.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_a_place_does_not_run() -> None:
    frozen = FrozenModel(tiny_model("llama"), "cpu", "key")
    with pytest.raises(RuntimeError, match="place"), frozen.running():
        pass


def test_replicate_stays_on_the_device() -> None:
    model = tiny_model("llama")
    frozen = frozen_model(model, "replicate", OTHER)
    assert places(model) == {"meta"}
    with frozen.running():
        assert places(model) == {"meta"}
    assert places(model) == {"meta"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cpu_is_on_the_device_for_its_passes_only(family: str) -> None:
    model, expected = tiny_model(family), tiny_model(family).state_dict()
    frozen = frozen_model(model, "cpu", OTHER)
    kept = {name: value.data_ptr() for name, value in model.state_dict().items()}
    for _ in range(2):
        assert places(model) == {"cpu"}
        with frozen.running():
            assert places(model) == {"meta"}
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    # Nothing changes on the device, so nothing is copied back: the host's tensors are the very same.
    assert {name: value.data_ptr() for name, value in state.items()} == kept


def test_cpu_goes_back_after_an_error_too() -> None:
    model = tiny_model("llama")
    frozen = frozen_model(model, "cpu", OTHER)
    with pytest.raises(RuntimeError, match="out of memory"), frozen.running():
        raise RuntimeError("out of memory")
    assert places(model) == {"cpu"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_part_that_is_read_outside_of_passes_stays_on_the_device(tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama")
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    frozen_model(model, "cpu", OTHER, model.get_output_embeddings())
    there = {name for name, value in model.named_parameters(remove_duplicate=False) if value.is_meta}
    assert there == {"lm_head.weight"} | ({"model.embed_tokens.weight"} if tied else set())


def test_one_process_has_nobody_to_share_with() -> None:
    model = tiny_model("llama")
    with frozen_model(model, "shard", CPU).running():
        assert torch.equal(model(IDS).logits, tiny_model("llama")(IDS).logits)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


def test_a_pass_in_inference_mode_leaves_tensors_that_autograd_takes() -> None:
    """Lightning validates in `inference_mode`, whose tensors a later backward pass must not meet."""
    model = tiny_model("llama")
    frozen = frozen_model(model, "cpu", CPU)
    with torch.inference_mode(), frozen.running():
        hidden = model.base_model(IDS).last_hidden_state
    assert not hidden.is_inference()


@pytest.mark.parametrize("placement", ["cpu", "shard"])
def test_a_quantized_model_stays_where_it_is(placement: str) -> None:
    model = tiny_model("llama")
    model.is_quantized = True
    with pytest.raises(UserError, match=rf"key must be replicate for a quantized model, got {placement}"):
        frozen_model(model, placement, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_layers_are_found(family: str) -> None:
    assert len(decoder_layers(tiny_model(family))) == 2


def test_tied_weights_are_brought_once() -> None:
    model = tiny_model("gpt2")
    frozen = frozen_model(model, "cpu", OTHER)
    for _ in range(2):
        assert model.lm_head.weight is model.transformer.wte.weight
        with frozen.running():
            assert model.lm_head.weight is model.transformer.wte.weight


def test_a_buffer_that_a_pass_has_replaced_is_kept() -> None:
    """As rotary embeddings with dynamic frequencies do; they also note down that they have."""
    model = nn.BatchNorm1d(2)
    frozen = frozen_model(model, "cpu", CPU)
    with frozen.running():
        model.running_mean = torch.tensor([1.0, 2.0])
    assert torch.equal(model.running_mean, torch.tensor([1.0, 2.0]))
    with frozen.running():
        assert torch.equal(model.running_mean, torch.tensor([1.0, 2.0]))
