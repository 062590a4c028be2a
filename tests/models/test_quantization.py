"""A base of 4 bits: where it cannot be had and, where bitsandbytes is installed, what is trained and exported."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from helpers.training import EARLY_ENDS, fit, make_trainer, prompt_data, remax_module, save_policy
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from remax_lightning.callbacks import ExportPolicy
from remax_lightning.errors import UserError
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.strategies import ReMaxDeepSpeedStrategy, ReMaxFSDP2Strategy
from remax_lightning.training.config_checks import check_quantization

QLORA = ModelConfig("policy", quantization="nf4", lora=LoRAConfig(r=4))


def test_without_bitsandbytes_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remax_lightning.models.loading.find_spec", lambda name: None)
    source = ModelConfig(save_policy(tmp_path), quantization="nf4")
    message = r"model\.policy\.quantization is nf4, which needs bitsandbytes: pip install bitsandbytes"
    with pytest.raises(UserError, match=message):
        source.load("model.policy")


def test_4_bits_cannot_be_trained() -> None:
    with pytest.raises(UserError, match=r"model\.policy\.quantization is nf4, .* set model\.policy\.lora"):
        remax_module(ModelConfig("policy", quantization="nf4"))


@pytest.mark.parametrize("strategy", [ReMaxDeepSpeedStrategy(stage=3), ReMaxFSDP2Strategy(), FSDPStrategy()])
def test_strategies_that_cut_weights_up_are_refused(strategy: Any) -> None:
    message = rf"model\.policy\.quantization is nf4, which trainer\.strategy {type(strategy).__name__}"
    with pytest.raises(UserError, match=message):
        check_quantization(QLORA, strategy)
    check_quantization(ModelConfig("policy"), strategy)


@pytest.mark.parametrize("strategy", [ReMaxDeepSpeedStrategy(stage=2), DDPStrategy()])
def test_strategies_that_leave_weights_whole_are_not(strategy: Any) -> None:
    check_quantization(QLORA, strategy)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide enough for blocks of 64 numbers that share a scale."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = list(EARLY_ENDS)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def module(policy: str, **options: Any) -> Any:
    source = ModelConfig(policy, quantization="nf4", lora=LoRAConfig(r=4), gradient_checkpointing=True)
    return remax_module(source, kl_coef=0.05, optimizer=partial(torch.optim.AdamW, lr=1e-2), **options)


@pytest.mark.slow
def test_an_adapter_is_trained_on_4_bits(policy: str, tmp_path: Path) -> None:
    made = module(policy)
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    export = ExportPolicy(str(tmp_path / "out"), best=False)
    data = prompt_data(tmp_path, policy)
    seen = fit(made, data, tmp_path, max_steps=3, callbacks=[saves, export], enable_checkpointing=True)
    layer = made.policy.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.numel() == 64 * 64 / 2
    assert seen.logged[0]["train/kl"] == 0.0
    assert abs(seen.logged[2]["train/kl"]) > 1e-3
    moved = {name for name, value in seen.weights[0].items() if not torch.equal(value, seen.weights[1][name])}
    assert len(moved) == 28
    assert all(".lora_" in name for name in moved)
    assert len(made.state_dict()) == 28
    resumed = make_trainer(tmp_path, max_steps=3)
    resumed.fit(module(policy), prompt_data(tmp_path, policy), ckpt_path=tmp_path / "step=2.ckpt")
    expected = seen.logged[2]["train/loss"]
    assert float(resumed.callback_metrics["train/loss"]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_the_merged_policy_is_that_of_the_4_bits(policy: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = module(policy)
    fit(
        made,
        prompt_data(tmp_path, policy),
        tmp_path,
        callbacks=[ExportPolicy(str(tmp_path / "out"), best=False, merge_adapter=True)],
    )
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        trained = made.policy.train()(input_ids=ids).logits
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "last")(ids).logits
        unquantized = AutoModelForCausalLM.from_pretrained(policy)(ids).logits
    error = (exported - trained).abs().max()
    assert error < 0.01 * trained.abs().max()
    assert error < 0.1 * (exported - unquantized).abs().max()


@pytest.mark.slow(0.3)
def test_a_reference_of_4_bits(policy: str, tmp_path: Path) -> None:
    made = remax_module(policy, ModelConfig(policy, quantization="nf4"))
    seen = fit(made, prompt_data(tmp_path, policy), tmp_path)
    assert made.reference.is_quantized
    assert 0 < abs(seen.logged[0]["train/kl"]) < 1  # what the rounding to 4 bits costs
