"""What a user of Lightning and Hugging Face writes in a script: strings, functions, rows in memory, a plain Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from remax_lightning import (
    PromptDataModule,
    ReMaxModule,
    SamplingConfig,
    SFTDataModule,
    SFTModule,
    UserError,
    default_callbacks,
)
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.rewards import FunctionReward, WeightedReward

ROWS = [{"prompt": f"{word} and"} for word in ("one", "two", "three", "four")]


def letters(prompts: Any, responses: Any, rows: Any) -> list[float]:
    return [float(len(set(response))) for response in responses]


def brevity(prompts: Any, responses: Any, rows: Any) -> list[float]:
    return [-float(len(response)) for response in responses]


def fit(module: Any, data: Any, folder: Path, **options: Any) -> Trainer:
    trainer = Trainer(
        max_steps=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=folder,
        enable_model_summary=False, callbacks=default_callbacks(), **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


@pytest.fixture(scope="module")
def policy(policy_path: Path) -> str:
    return str(policy_path)


def make(policy: Any, **options: Any) -> ReMaxModule:
    options = {"reward": letters, "sampling": SamplingConfig(max_response_length=6)} | options
    return ReMaxModule(policy=policy, **options)


@pytest.fixture(scope="module")
def trained(policy: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, ReMaxModule, Path]:
    """A run of a path, a function and rows in memory, with its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    module = make(policy)
    trainer = fit(module, PromptDataModule(data=ROWS, tokenizer=policy, batch_size=2, max_prompt_length=32), folder)
    path = folder / "last.ckpt"
    trainer.save_checkpoint(path)
    return trainer, module, path


@pytest.mark.slow
def test_a_path_a_function_and_rows_train_with_the_callbacks_of_the_command(trained: Any) -> None:
    trainer, *_ = trained
    assert trainer.global_step == 1
    assert "train/reward" in trainer.logged_metrics
    assert list(Path(trainer.default_root_dir).rglob("policy/last/model.safetensors"))


def test_without_a_reference_the_kl_is_measured_to_the_start_of_the_policy(trained: Any) -> None:
    _, module, _ = trained
    start = ReMaxModule(policy=module.policy_source, reward=letters).reference_source
    assert start is not None
    assert start.path == module.policy_source.path
    assert module.reference is not module.policy
    assert make(module.policy_source.path, kl_coef=0.0).reference_source is None


def test_the_module_of_a_checkpoint_has_its_weights_and_settings(trained: Any) -> None:
    _, module, path = trained
    loaded = ReMaxModule.load_from_checkpoint(path)
    assert (loaded.sampling, loaded.kl_coef) == (module.sampling, module.kl_coef)
    expected = module.policy.state_dict()
    assert all(torch.equal(value, expected[name].cpu()) for name, value in loaded.policy.state_dict().items())
    assert not loaded.training


@pytest.mark.slow
def test_its_responses_are_those_of_the_trained_module(trained: Any) -> None:
    _, module, path = trained
    prompts = [row["prompt"] for row in ROWS]
    loaded = ReMaxModule.load_from_checkpoint(str(path))
    assert loaded.generate(prompts) == module.generate(prompts, batch_size=3)
    sampled = loaded.generate(prompts, greedy=False, seed=1)
    assert sampled == loaded.generate(prompts, greedy=False, seed=1) != loaded.generate(prompts, greedy=False, seed=2)


@pytest.mark.slow(0.3)
def test_greedy_responses_are_transformers_own(trained: Any) -> None:
    _, _, path = trained
    module = ReMaxModule.load_from_checkpoint(path)
    ids = module.tokenizer("two and", return_tensors="pt").input_ids
    out = module.policy.generate(
        ids,
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=module.eos_ids(),
        pad_token_id=module.tokenizer.pad_token_id,
    )
    assert module.generate(["two and"]) == [module.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)]


@pytest.mark.slow
def test_a_loaded_module_cannot_train_without_a_reward(trained: Any, policy: str, tmp_path: Path) -> None:
    _, _, path = trained
    data = PromptDataModule(data=ROWS, tokenizer=policy, batch_size=2, max_prompt_length=32)
    with pytest.raises(UserError, match=r"load_from_checkpoint\(path, reward=\.\.\.\)"):
        fit(ReMaxModule.load_from_checkpoint(path), data, tmp_path)
    fit(ReMaxModule.load_from_checkpoint(path, reward=letters), data, tmp_path)


@pytest.mark.slow
def test_an_adapter_is_loaded_around_its_base(policy: str, tmp_path: Path) -> None:
    module = make(ModelConfig(policy, lora=LoRAConfig(r=2)), optimizer=lambda p: torch.optim.SGD(p, lr=10.0))
    trainer = fit(module, PromptDataModule(data=ROWS, tokenizer=policy, batch_size=2, max_prompt_length=32), tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ReMaxModule.load_from_checkpoint(tmp_path / "last.ckpt")
    prompts = [row["prompt"] for row in ROWS]
    assert loaded.policy_source.lora == LoRAConfig(r=2)
    assert loaded.generate(prompts) == module.generate(prompts)


@pytest.mark.slow(0.3)
def test_a_checkpoint_without_arguments_says_what_to_give(trained: Any, tmp_path: Path) -> None:
    _, module, path = trained
    old = torch.load(path, weights_only=True)
    del old["hyper_parameters"]
    torch.save(old, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"policy=\.\.\."):
        ReMaxModule.load_from_checkpoint(tmp_path / "old.ckpt")
    loaded = ReMaxModule.load_from_checkpoint(tmp_path / "old.ckpt", policy=module.policy_source.path)
    assert torch.equal(loaded.policy.lm_head.weight, module.policy.lm_head.weight.cpu())


def test_a_list_of_rewards_is_their_sum_with_a_name_for_each(policy: str) -> None:
    reward = make(policy, reward=[letters, brevity, FunctionReward(brevity)]).reward
    assert isinstance(reward, WeightedReward)
    assert list(reward.parts) == ["letters", "brevity", "brevity_2"]
    assert reward.score(["x"], ["aab"], [{}]).reward.tolist() == [2.0 - 3.0 - 3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": torch.nn.Linear(1, 1)}, "policy must be a folder, a hub name or a ModelConfig, got Linear"),
        ({"policy": {"path": "a", "lora": None}}, r"policy must .* got dict: write ModelConfig\(path=..., lora=...\)"),
        ({"policy": None}, "policy must be .* got NoneType"),
        ({"reference": 3}, "reference must be .* got int"),
        ({"reward": 3}, "reward must be a Reward, a function, its dotted path, or a list of these, got int 3"),
        ({"reward": WeightedReward}, r"got the class WeightedReward; call it: WeightedReward\(...\)"),
        ({"reward": [letters, 3]}, r"reward\[1\] must be"),
        ({"reward": []}, "reward must be"),
    ],
)
def test_a_wrong_argument_is_a_type_error_that_names_it(policy: str, options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(**{"policy": policy} | options)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(("kind", "name"), [(ReMaxModule, "PromptBatch"), (SFTModule, "SupervisedBatch")])
def test_a_plain_loader_is_refused_with_the_data_module_to_take(
    kind: Any, name: str, policy: str, tmp_path: Path
) -> None:
    module = kind(policy=policy, reward=letters)
    with pytest.raises(UserError, match=rf"batches of type {name}, got dict .*DataModule\(data=rows\)"):
        fit(module, DataLoader(ROWS, batch_size=2), tmp_path)


@pytest.mark.slow
def test_supervised_fine_tuning_is_loaded_without_a_reward(policy: str, tmp_path: Path) -> None:
    rows = [row | {"response": "yes"} for row in ROWS]
    data = SFTDataModule(data=rows, tokenizer=policy, batch_size=2, max_prompt_length=32)
    module = SFTModule(policy=policy, sampling=SamplingConfig(max_response_length=6))
    fit(module, data, tmp_path).save_checkpoint(tmp_path / "sft.ckpt")
    loaded = SFTModule.load_from_checkpoint(tmp_path / "sft.ckpt")
    assert loaded.reward is None
    assert loaded.generate(["one and"]) == module.generate(["one and"])
