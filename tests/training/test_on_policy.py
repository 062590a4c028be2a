"""The check before the first step: it passes what is right in every precision, and names what separates drawing from
training."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_model
from helpers.doctor import blind_to_padding
from helpers.training import Recorder, fit, make_trainer, prompt_data, remax_module, save_policy, weights_of
from torch import Tensor, nn

from remax_lightning.config import SamplingConfig
from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig
from remax_lightning.models.lora import LoRAConfig
from remax_lightning.rollout import AutoEngine, GenerationOutput, GenerationRequest, HuggingFaceEngine, PairedEngine
from remax_lightning.training.config_checks import check_rope
from remax_lightning.training.on_policy import judge_gaps, measure_gaps
from remax_lightning.training.worker import RolloutWorker

TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def prepared_worker(engine: Any = None, **sampling: Any) -> RolloutWorker:
    worker = RolloutWorker(engine or AutoEngine(), SamplingConfig(**{"max_response_length": 12} | sampling))
    worker.prepare(make_tokenizer(), [2], torch.device("cpu"), unused_ids=(94, 95))
    return worker


def check(model: Any, engine: Any = None, *, random_layers: bool = False, **sampling: Any) -> None:
    worker = prepared_worker(engine, **sampling)
    gaps = measure_gaps(model.train(), worker)
    judge_gaps(gaps, model, worker, is_16_bit=False, random_layers=random_layers)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("engine", [PairedEngine, HuggingFaceEngine])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7, "top_p": 0.8, "processed_log_probs": True, "min_response_length": 3}, {"num_samples": 3}],
    ids=str,
)
def test_a_plain_model_differs_by_rounding(family: str, engine: Any, sampling: dict[str, Any]) -> None:
    model = model_without_dropout(family)
    gaps = measure_gaps(model.train(), prepared_worker(engine(), **sampling))
    assert max(gaps) < 1e-3
    assert model.training


def model_without_dropout(family: str) -> Any:
    from remax_lightning.models.loading import zero_dropout

    model = tiny_model(family)
    config = copy.deepcopy(model.config)
    zero_dropout(config)
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    return fresh


class Noise(nn.Module):
    """A layer that is random in train mode and says so nowhere."""

    def forward(self, values: Tensor) -> Tensor:
        return values + torch.randn_like(values) if self.training else values


@pytest.mark.slow(0.3)
def test_a_random_layer_is_named_unless_it_was_asked_for() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = Noise()
    with pytest.raises(UserError, match=r"in train mode LlamaForCausalLM .* layer model\.layers\.1\.mlp\.act_fn dep"):
        check(model)
    check(model, random_layers=True)


@pytest.mark.slow(0.3)
def test_a_router_that_jitters_is_noticed() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4, router_jitter_noise=0.1))
    with pytest.raises(UserError, match=r"in train mode MixtralForCausalLM .* the layer model\.layers\.0\.mlp"):
        check(model)


def test_a_model_that_reads_padding() -> None:
    model = tiny_model("llama")
    with blind_to_padding(model), pytest.raises(UserError, match=r"model\.policy: .* a prompt with padding"):
        check(model)


class OtherTemperature(PairedEngine):
    """Draws at temperature 3 and says what it drew with."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        return super().generate(model, replace(request, sampling=replace(request.sampling, temperature=3.0)))


class BlindEngine(PairedEngine):
    """Takes padding for tokens."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        return super().generate(model, replace(request, prompt_mask=torch.ones_like(request.prompt_mask)))


class StaleEngine(PairedEngine):
    """Draws with other weights than the policy has now."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        stale = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in stale.parameters():
                parameter.add_(0.1)
        return super().generate(stale, request)


class StaleGreedyEngine(StaleEngine):
    """The same, and says nothing of log-probs."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        return super().generate(model, replace(request, return_log_probs=False))


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    ("engine", "what"),
    [
        (OtherTemperature, "sampled tokens"),
        (BlindEngine, "sampled tokens"),
        (StaleEngine, "sampled tokens"),
        (StaleGreedyEngine, "greedy tokens"),
    ],
)
def test_an_engine_that_draws_from_another_policy(engine: Any, what: str) -> None:
    with pytest.raises(UserError, match=rf"model\.rollout: {engine.__name__} draws {what} .* model\.check_on_policy"):
        check(tiny_model("llama"), engine())


class SilentTemperature(OtherTemperature):
    """Draws at another temperature, and says nothing of log-probs; the greedy tokens are right."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        return super().generate(model, replace(request, return_log_probs=False))


class SilentWide(PairedEngine):
    """Does not know top-k, and says nothing of log-probs."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        sampling = replace(request.sampling, top_k=0)
        return super().generate(model, replace(request, sampling=sampling, return_log_probs=False))


class Silent(PairedEngine):
    """Draws what the policy draws, and says nothing of log-probs."""

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        return super().generate(model, replace(request, return_log_probs=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "sampling", "how"),
    [
        (SilentTemperature, {}, "whose mean log-prob is .* standard errors from"),
        (SilentWide, {"top_k": 3}, "which LlamaForCausalLM would not draw"),
    ],
)
def test_samples_without_log_probs_are_judged_by_how_likely_they_are(
    engine: Any, sampling: dict[str, Any], how: str
) -> None:
    with pytest.raises(UserError, match=rf"{engine.__name__} draws sampled tokens {how}"):
        check(spread_model(), engine(), **sampling)
    for options in ({}, {"top_k": 3}, {"top_p": 0.5, "temperature": 0.7}, {"min_response_length": 4}):
        check(spread_model(), Silent(), **options)
    assert measure_gaps(spread_model().train(), prepared_worker(Silent())).likelihood > 0, "else nothing was measured"


def spread_model() -> Any:
    """A model that is surer of some tokens than of others: a random one draws all alike at every temperature."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


class Skipped(nn.Module):
    """A layer that one pass in seven leaves out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: Tensor) -> Tensor:
        return values * 0 if self.training and torch.rand([]) < 0.15 else self.layer(values)


def test_a_layer_that_is_seldom_left_out_is_noticed() -> None:
    """One pass would miss it in most runs: a model that draws random numbers is looked at several times."""
    model = tiny_model("llama")
    model.model.layers[1].mlp = Skipped(model.model.layers[1].mlp)
    with pytest.raises(UserError, match="in train mode LlamaForCausalLM"):
        check(model)


class DropPath(nn.Module):
    """Stochastic depth as vision models have it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, values: Tensor) -> Tensor:
        return values if not self.training or torch.rand([]) >= self.rate else values * 0


class Functional(nn.Module):
    """Drops by a function, at a rate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embd_drop_rate, self.eps = 0.5, 0.5

    def forward(self, values: Tensor) -> Tensor:
        return torch.nn.functional.dropout(values, self.embd_drop_rate, self.training)


def test_layers_that_are_random_by_their_kind_are_silenced() -> None:
    """Whatever a configuration calls them: torch's types, stochastic depth, and rates for functions."""
    from remax_lightning.models.loading import silence_random_layers

    layers = nn.ModuleList([nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.Dropout1d(0.5), DropPath(0.5), Functional()])
    layers.append(nn.MultiheadAttention(4, 1, dropout=0.5, batch_first=True))
    silence_random_layers(layers.train())
    values = torch.randn(2, 8, 4)
    for layer in layers:
        outputs = [layer(*[values] * (3 if isinstance(layer, nn.MultiheadAttention) else 1)) for _ in range(4)]
        first, *others = [output[0] if isinstance(output, tuple) else output for output in outputs]
        assert all(torch.equal(first, other) for other in others), layer
    assert layers[4].eps == 0.5


RANDOM = {
    "phimoe": {"num_local_experts": 4},
    "mixtral": {"num_local_experts": 4, "router_jitter_noise": 0.1},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32, "layerdrop": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2, "emb_pdrop": 0.3},
}


@pytest.mark.parametrize("family", RANDOM)
def test_what_is_random_in_train_mode_is_off_in_a_loaded_policy(family: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(TINY | RANDOM[family]))).save_pretrained(tmp_path)
    policy: Any = ModelConfig(str(tmp_path)).load("model.policy").train()
    ids = torch.randint(4, 96, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        trained = policy(ids, use_cache=False).logits
        drawn = policy.eval()(ids, use_cache=False).logits
    torch.testing.assert_close(trained, drawn, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rope", "positions", "limit"),
    [
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 256, 32),
        ({"rope_type": "dynamic", "factor": 4.0}, 32, 32),
        ({"rope_type": "linear", "factor": 4.0}, 32, None),
        ({"rope_type": "default"}, 32, None),
    ],
)
def test_texts_stay_below_the_length_where_rotary_embeddings_change(
    rope: dict[str, Any], positions: int, limit: int | None
) -> None:
    model = tiny_model("llama")
    model.config.rope_parameters = {"rope_theta": 100.0, **rope}
    model.config.max_position_embeddings = positions
    check_rope(model, 24, 8)
    if limit is None:
        check_rope(model, 240, 80)
    else:
        with pytest.raises(UserError, match=f"more than {limit} tokens, where the rotary embeddings"):
            check_rope(model, 25, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "lora"), [("32-true", False), ("32-true", True), ("bf16-mixed", False), ("64-true", True)]
)
def test_a_run_is_the_same_with_and_without_the_check(precision: str, lora: bool, tmp_path: Path) -> None:
    """No random number, no timer and no gradient of the run is touched."""
    path = save_policy(tmp_path / "policy")
    source = ModelConfig(path, lora=LoRAConfig(r=2) if lora else None)
    weights = []
    for checked in (True, False):
        torch.manual_seed(3)
        module = remax_module(source, None if lora else path, check_on_policy=checked)
        recorder = Recorder()
        trainer = make_trainer(tmp_path, [recorder], max_steps=2, precision=precision)
        trainer.fit(module, prompt_data(tmp_path, path))
        weights.append((weights_of(module), [output["rollout"].sampled.response_ids for output in recorder.outputs]))
    (first, first_ids), (second, second_ids) = weights
    assert all(torch.equal(a, b) for a, b in zip(first_ids, second_ids, strict=True))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_with_a_stale_engine_ends_before_its_first_step(tmp_path: Path) -> None:
    path = save_policy(tmp_path / "policy")
    with pytest.raises(UserError, match="StaleEngine draws sampled tokens"):
        fit(remax_module(path, rollout=StaleEngine(), check_on_policy=True), prompt_data(tmp_path, path), tmp_path)
