"""Passes whose last MLP runs only for the tokens that are read, against passes in which it runs for all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from helpers.reward_models import PLAIN, PROMPTS, RESPONSES, ROWS, loaded, save_classifier
from helpers.six_responses import RESPONSES as SIX
from helpers.six_responses import model_of, pass_with_gradient, rollout_of
from torch import Tensor, nn

from remax_lightning.config import SamplingConfig
from remax_lightning.models import last_mlp
from remax_lightning.models import log_probs as statistics_module
from remax_lightning.models.forward import HeadSearch
from remax_lightning.models.last_mlp import last_mlp_obstacle, skip_unread_tokens
from remax_lightning.models.loading import enable_gradient_checkpointing
from remax_lightning.models.log_probs import policy_statistics, response_statistics
from remax_lightning.rewards import pooling
from remax_lightning.sharding import decoder_layers, unwrap_peft
from remax_lightning.tools.plan.activation_memory import shapes_only

FAMILIES = ("llama", "qwen2", "gpt2", "opt", "gemma2", "cohere", "granite", "lfm2", "mixtral", "gpt_oss")
COUNTED = sum(map(len, SIX))
TEXTS = COUNTED + 2 * (3 + 6 + 1)
"""Tokens of six responses, and with their prompts."""


MORE: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mixtral": {"num_local_experts": 4, "experts_implementation": "eager"},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "experts_implementation": "eager"},
}


def made(family: str) -> Any:
    if family not in MORE:
        return model_of(family)
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = CONFIG_MAPPING[family](**sizes, **MORE[family], intermediate_size=64, vocab_size=96, pad_token_id=3)
    return AutoModelForCausalLM.from_config(config).eval()


class Entering:
    """Counts the tokens that enter a part of each layer, layer by layer."""

    def __init__(self, model: Any, name: str) -> None:
        self.tokens: list[int] = []
        layers = [layer.get_submodule(name) for layer in decoder_layers(model)]
        self.hooks = [layer.register_forward_pre_hook(self._count) for layer in layers]

    def _count(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        self.tokens.append(inputs[0].numel() // inputs[0].shape[-1])


def all_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every token of a model run through its last MLP."""
    monkeypatch.setitem(last_mlp._obstacles, model, "test")


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradient_are_those_of_all_tokens(
    family: str, has_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_head:  # as where a strategy shards it
        monkeypatch.setattr(statistics_module, "find_head", lambda model: HeadSearch(None, "test"))
    # In double precision transformers' own attention, which these two have, makes NaN of padding.
    single = family in ("gemma2", "gpt_oss")
    model, tolerance = (made(family), 1e-5) if single else (made(family).double(), 1e-12)
    found = [pass_with_gradient(model, packed=packed) for packed in (True, False)]
    assert last_mlp_obstacle(model) == ""
    all_tokens(model, monkeypatch)
    for (log_probs, gradients), packed in zip(found, (True, False), strict=True):
        expected, expected_gradients = pass_with_gradient(model, packed=packed)
        torch.testing.assert_close(log_probs, expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(gradients, expected_gradients, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("family", "name"), [("llama", "mlp.down_proj"), ("gpt2", "mlp.c_proj"), ("opt", "fc2")])
def test_the_last_mlp_runs_for_counted_tokens_alone(family: str, name: str) -> None:
    model = model_of(family)
    with torch.no_grad():
        policy_statistics(model, rollout_of(), SamplingConfig())  # a first pass runs a few tokens before
    entering = Entering(model, name)
    with torch.no_grad():
        policy_statistics(model, rollout_of(extra_left=3), SamplingConfig())
    assert entering.tokens == [TEXTS, COUNTED]
    policy_statistics(model, rollout_of(), SamplingConfig(), packed=False)
    assert entering.tokens[2:] == [6 * 11, COUNTED]


def test_in_the_middle_of_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = get_peft_model(tiny_model("opt"), LoraConfig(target_modules=["fc1", "fc2"], init_lora_weights=False))
    assert last_mlp_obstacle(model) == ""
    found = response_statistics(model, rollout_of().prompt, rollout_of().sampled).log_probs
    expected = response_statistics(model.merge_and_unload(), rollout_of().prompt, rollout_of().sampled).log_probs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "name"), [("llama", "mlp.down_proj"), ("opt", "fc2")])
def test_a_layer_that_is_recomputed_runs_for_all_tokens(family: str, name: str) -> None:
    """The backward pass would recompute it for all, and torch refuses what has another shape then."""
    plain, model = tiny_model(family), tiny_model(family)
    enable_gradient_checkpointing(model)
    model.train()
    with torch.no_grad():
        policy_statistics(model, rollout_of(), SamplingConfig())
    entering = Entering(model, name)
    found, gradients = pass_with_gradient(model, packed=True)
    assert entering.tokens[:2] == [TEXTS, TEXTS]
    expected, expected_gradients = pass_with_gradient(plain, packed=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)
    del entering.tokens[:]
    with torch.no_grad():  # a pass without a backward pass recomputes nothing
        policy_statistics(model, rollout_of(), SamplingConfig())
    assert entering.tokens == [TEXTS, COUNTED]


def test_a_layer_in_a_wrapper_of_torch_is_recomputed_for_all_tokens() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    plain, model = tiny_model("llama"), tiny_model("llama")
    apply_activation_checkpointing(model, check_fn=lambda module: module in list(model.model.layers))
    with torch.no_grad():
        assert last_mlp_obstacle(model) == ""
    found, expected = pass_with_gradient(model, packed=False), pass_with_gradient(plain, packed=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# Models of another kind


class Mixing(nn.Module):
    """A norm behind the last layer that reads the other tokens, too."""

    def forward(self, states: Tensor) -> Tensor:
        return states + states.mean(1, keepdim=True)


def unnamed() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=96)).eval()
    model._no_split_modules = []
    return model


def mixing() -> Any:
    model = tiny_model("llama")
    model.model.norm = Mixing()
    return model


def repeated() -> Any:
    model = tiny_model("llama")
    model.model.layers[0] = model.model.layers[1]
    return model


def tokens_first() -> Any:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    class TokensFirst(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
            states = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)[0]
            return states + self.mlp(self.post_attention_layernorm(states).transpose(0, 1)).transpose(0, 1)

    model = tiny_model("llama")
    model.model.layers[-1].__class__ = TokensFirst
    return model


def virtual_tokens() -> Any:
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def router_loss() -> Any:
    """Compares what the router of every layer says with the mask of all tokens, where there is a mask."""
    model = made("mixtral")
    model.config.output_router_logits = True
    return model


def two_inputs() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=96)).eval()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (unnamed, "it has none by a known name"),
        (mixing, "other tokens are read behind it (they differ by "),
        (repeated, "a pass goes through it 2 times"),
        (tokens_first, "other tokens are read behind it (they differ by "),
        (virtual_tokens, "it makes (2, 10) outputs of (2, 6) tokens"),
        (router_loss, "a pass over some of the tokens fails (RuntimeError: "),
        (two_inputs, "a pass over some of the tokens fails (RuntimeError: "),
    ],
)
def test_models_of_another_kind_run_all_tokens_and_say_so_once(
    make: Any, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics_module, "find_head", lambda model: HeadSearch(None, "test"))
    model = make()
    with caplog.at_level(logging.INFO, last_mlp.__name__), torch.no_grad():
        found = [policy_statistics(model, rollout_of(), SamplingConfig()).log_probs for _ in range(2)]
    (said,) = [record.getMessage() for record in caplog.records if record.name == last_mlp.__name__]
    assert f"{type(unwrap_peft(model)).__name__}: every token runs through its last MLP, because {reason}" in said
    all_tokens(model, monkeypatch)
    with torch.no_grad():
        expected = policy_statistics(model, rollout_of(), SamplingConfig()).log_probs
    assert all(torch.equal(one, expected) for one in found)


def test_what_a_probe_hooks_is_free_again_after_an_error() -> None:
    model = tiny_model("llama")
    expected = model(input_ids=torch.arange(8)[None]).logits
    assert last_mlp_obstacle(model) == ""
    with pytest.raises(KeyError), skip_unread_tokens(model, torch.tensor([7])):
        raise KeyError
    assert torch.equal(model(input_ids=torch.arange(8)[None]).logits, expected)


def test_the_plan_needs_no_values() -> None:
    with shapes_only():
        model = model_of("llama")
        entering = Entering(model, "mlp.down_proj")
        assert last_mlp_obstacle(model) == ""
        del entering.tokens[:]
        with skip_unread_tokens(model, torch.tensor([3, 7])):
            model(input_ids=torch.zeros(1, 8, dtype=torch.long))
        assert "fails" in last_mlp_obstacle(two_inputs())
    assert entering.tokens == [8, 2]


# Reward models


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("family", "name"), [("llama", "mlp.down_proj"), ("opt", "fc2")])
def test_a_reward_model_runs_it_for_the_last_token_alone(
    family: str, name: str, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = loaded(save_classifier(tmp_path, tiny_config(family)), template=PLAIN, batch_size=batch_size)
    assert reward._pooling is pooling.pool_last_token
    entering = Entering(reward.model, name)
    scores = reward.score(PROMPTS, RESPONSES, ROWS)
    assert entering.tokens[1::2] == [batch_size] * (len(PROMPTS) // batch_size)
    assert min(entering.tokens[::2]) > batch_size
    all_tokens(reward.model, monkeypatch)
    torch.testing.assert_close(scores, reward.score(PROMPTS, RESPONSES, ROWS), atol=1e-5, rtol=0)
    assert entering.tokens[-1] > batch_size
