"""Which models let their head be read, how it is read, and why not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import nn

from remax_lightning.errors import UserError
from remax_lightning.models.forward import find_head, hidden_states, required_head

IDS = torch.randint(0, 96, (3, 9), generator=torch.Generator().manual_seed(5))
MASK = torch.ones(3, 9, dtype=torch.bool)
MASK[0, :4] = False

FORMS: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "llama": ({}, 1.0, None),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2}, 1.0, None),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 16}, 1.0, None),  # projects hidden states before the head
    "phi": ({}, 1.0, None),  # the head has a bias
    "gemma2": ({"head_dim": 16, "final_logit_softcapping": 5.0}, 1.0, 5.0),
    "recurrent_gemma": ({"lru_width": 32, "logits_soft_cap": 4.0}, 1.0, 4.0),
    "cohere": ({"logit_scale": 0.3}, 0.3, None),
    "granite": ({"logits_scaling": 4.0}, 0.25, None),  # divides
    "hyperclovax": ({"logits_scaling": 4.0}, 4.0, None),  # multiplies by the same key
}


def make(family: str, **options: Any) -> Any:
    """A random model of any family of transformers, in training mode."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    sizes = {"intermediate_size": 64, "max_position_embeddings": 128, "vocab_size": 96}
    taken = ids if family == "gpt2" else {**small, **ids, **sizes}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**taken, "vocab_size": 96, **options})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else parameter.add_(0.1)
    return model.train()


def logits_of_head(model: Any) -> torch.Tensor:
    """What hidden states and head make together, in float64."""
    head = find_head(model).head
    with torch.no_grad():
        logits = hidden_states(model, IDS, MASK).double() @ head.weight.double().T
    logits = head.scale * (logits if head.bias is None else logits + head.bias.double())
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


@pytest.mark.parametrize("family", FORMS)
def test_head_and_hidden_states_make_the_logits_of_the_model(family: str) -> None:
    options, scale, cap = FORMS[family]
    model = make(family, **options)
    head, reason = find_head(model)
    assert (head.scale, head.soft_cap, reason) == (scale, cap, "")
    assert (head.bias is not None) == (family == "phi")
    assert model.training  # as it was
    assert not model.get_output_embeddings()._forward_hooks
    model.eval()
    positions = (MASK.long().cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        inputs = {"input_ids": IDS, "attention_mask": MASK.long(), "position_ids": positions}
        expected = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits_of_head(model)[MASK], expected[MASK].double(), atol=2e-5, rtol=1e-5)
    assert expected.abs().max() > 0.3


def test_the_weights_are_those_of_now() -> None:
    model = tiny_model("llama")
    before = find_head(model).head.weight
    model.lm_head.weight = nn.Parameter(before.detach() + 1)
    assert find_head(model).head.weight is model.lm_head.weight


def test_a_model_is_tried_once() -> None:
    model = tiny_model("llama")
    find_head(model)
    calls: list[int] = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    find_head(model)
    assert calls == []


def test_16_bit_models_have_their_head_read_too() -> None:
    for options in ({"logit_scale": 0.3}, {"logit_scale": 0.0625}):
        model = make("cohere", **options).to(torch.bfloat16)
        assert find_head(model).head.scale == options["logit_scale"]
    assert find_head(make("gemma2", head_dim=16).to(torch.bfloat16)).head.soft_cap == 30.0


# Why not


def shift(model: Any) -> None:
    """Let the model add something to its logits of which its configuration says nothing."""
    original = type(model).forward

    class Shifted(type(model)):  # type: ignore[misc]
        def forward(self, *inputs: Any, **options: Any) -> Any:
            output = original(self, *inputs, **options)
            output.logits = output.logits - 0.01 * torch.arange(output.logits.shape[-1])
            return output

    model.__class__ = Shifted


def unused(model: Any) -> None:
    """Let the model make its logits of something else than its last hidden states."""
    model.model.norm.register_forward_hook(lambda module, inputs, output: output)
    model.lm_head = nn.Linear(32, 96, bias=False)
    original = type(model).forward

    class Other(type(model)):  # type: ignore[misc]
        def forward(self, *inputs: Any, **options: Any) -> Any:
            output = original(self, *inputs, **options)
            output.logits = self.lm_head(torch.ones_like(output.logits[..., :32]))
            return output

    model.__class__ = Other


def broken(model: Any) -> None:
    model.base_model.forward = lambda **options: None


def hooked(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, output: output)


def hooked_outside(model: Any) -> None:
    model.register_forward_pre_hook(lambda module, inputs: None)


def placeholder(model: Any) -> None:
    model.lm_head.weight.ds_id = 0  # what ZeRO-3 marks its parameters with
    model.lm_head.weight.data = torch.empty(0)


def sharded(model: Any) -> None:
    class Shard(nn.Parameter):
        pass

    model.lm_head.weight = Shard(model.lm_head.weight.data)


def flattened(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flatten()[:100])


def not_linear(model: Any) -> None:
    class Quantized(nn.Linear):
        pass

    model.lm_head.__class__ = Quantized


def no_head(model: Any) -> None:
    model.get_output_embeddings = lambda: None


@pytest.mark.parametrize(("change", "reason"), [
    (shift, "it changes its logits in an unknown way"),
    (unused, "its output embedding does not read its last hidden states"),
    (broken, r"the probe of its head failed \(AttributeError"),
    (hooked, "its Linear has hooks"),
    (hooked_outside, "its LlamaForCausalLM has hooks"),
    (placeholder, "its output embedding is sharded or quantized"),
    (sharded, "its output embedding is sharded or quantized"),
    (flattened, "its output embedding is sharded or on the meta device"),
    (not_linear, r"its output embedding is a .*\.Quantized"),
    (no_head, "it has no separate body and output embedding"),
])  # fmt: skip
def test_a_head_that_cannot_be_read(change: Any, reason: str) -> None:
    model = tiny_model("llama")
    change(model)
    found = find_head(model)
    assert found.head is None
    with pytest.raises(UserError, match=rf"model\.kl\.estimator .* of model\.policy, which cannot be read: {reason}"):
        required_head(model, "model.policy")


def test_a_configuration_that_does_not_say_the_truth_is_not_believed() -> None:
    model = make("cohere", logit_scale=0.3)
    model.logit_scale = 0.31
    assert find_head(model).head is None
    model = make("llama")
    model.config.final_logit_softcapping = 30.0  # of which the model knows nothing
    assert find_head(model).head.soft_cap is None


def test_the_log_says_once_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="remax_lightning.models.forward"):
        model = make("llama")
        for _ in range(3):
            find_head(model)
        handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output)
        for _ in range(3):
            find_head(model)
        handle.remove()
    assert [record.getMessage() for record in caplog.records] == [
        "LlamaForCausalLM: logits are computed a few tokens at a time",
        "LlamaForCausalLM: every training pass computes all logits at once, because its Linear has hooks, which reading"
        " the weights would skip",
    ]


@pytest.mark.parametrize(("targets", "reads"), [("q_proj", True), ("lm_head", False)])
def test_adapters_in_the_body_are_read_and_on_the_head_are_not(targets: str, reads: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("llama"), LoraConfig(target_modules=[targets], init_lora_weights=False))
    if not reads:
        assert find_head(model).reason == "its output embedding is a peft.tuners.lora.layer.Linear"
        return
    model.eval()
    positions = (MASK.long().cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=MASK.long(), position_ids=positions).logits
        with model.disable_adapter():
            without = model(input_ids=IDS, attention_mask=MASK.long(), position_ids=positions).logits
    torch.testing.assert_close(logits_of_head(model)[MASK], expected[MASK].double(), atol=2e-5, rtol=1e-5)
    assert (expected - without)[MASK].abs().max() > 1e-3


def test_virtual_prompt_tokens_are_noticed() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert find_head(model).head is None
