"""What a configuration may leave out: a path alone, a function alone, and the learning rate of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.cli import in_folder, remax_parser

from remax_lightning import ReMaxModule, RewardModelModule, SFTModule
from remax_lightning.cli_shorthand import default_rate
from remax_lightning.models import LoRAConfig, ModelConfig

FUNCTION = "remax_lightning.rewards.verifiers.exact_match"
SHORT = {"model": {"policy": "owner/name", "reward": FUNCTION}, "data": {"path": "rows.jsonl"}}


def parsed(folder: Path, config: dict[str, Any], *options: str) -> Any:
    """The module's arguments that the command reads from a configuration and options."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    with in_folder(folder):
        return remax_parser().parse_args(["fit", "--config", str(path), *options]).fit.model.init_args


@pytest.mark.parametrize("nested", [False, True])
def test_a_path_and_a_function_stand_for_their_groups(nested: bool, tmp_path: Path) -> None:
    model = SHORT["model"] | {"reference": "owner/start"}
    if nested:
        model = {"class_path": "ReMaxModule", "init_args": model}
    module = parsed(tmp_path, SHORT | {"model": model})
    assert (module.policy.path, module.reference.path) == ("owner/name", "owner/start")
    assert module.policy.gradient_checkpointing is False
    assert module.reward.class_path.endswith("FunctionReward")
    assert module.reward.init_args.function == FUNCTION


def test_options_of_the_command_do_too_and_come_later(tmp_path: Path) -> None:
    options = ("--model.policy", "owner/other", "--model.policy.dtype=bfloat16", "--model.reward=my_module.my_function")
    module = parsed(tmp_path, SHORT, *options)
    assert (module.policy.path, module.policy.dtype) == ("owner/other", "bfloat16")
    assert module.reward.init_args.function == "my_module.my_function"


def test_classes_stay_classes(tmp_path: Path) -> None:
    name = "remax_lightning.rewards.HTTPReward"
    module = parsed(tmp_path, SHORT, "--model.reward", name, "--model.reward.url", "http://localhost")
    assert module.reward.class_path == name
    config = SHORT | {"model": SHORT["model"] | {"reward": {"class_path": name, "init_args": {"url": "http://host"}}}}
    assert parsed(tmp_path, config).reward.init_args.url == "http://host"


@pytest.mark.parametrize("name", ["PairedEngine", "VLLMEngine"])
def test_engines_are_known_by_their_names(name: str, tmp_path: Path) -> None:
    arguments = {"urls": ["http://localhost:8000"]} if name == "VLLMEngine" else {}
    config = SHORT | {"model": SHORT["model"] | {"rollout": {"class_path": name, "init_args": arguments}}}
    module = parsed(tmp_path, config)
    assert module.rollout.class_path == f"remax_lightning.rollout.{name}"
    if arguments:
        assert module.rollout.init_args.urls == arguments["urls"]
    assert parsed(tmp_path, SHORT, "--model.rollout", "PairedEngine").rollout.class_path.endswith("PairedEngine")


@pytest.mark.parametrize(
    ("model", "options", "rate"),
    [
        ({}, (), 1e-6),
        ({"policy": {"path": "p", "lora": {"r": 4}}}, (), 1e-5),
        ({"policy": {"path": "p", "lora": {}}}, (), 1e-5),
        ({}, ("--model.policy.lora.r=4",), 1e-5),
        ({"policy": {"path": "p", "lora": None}}, (), 1e-6),
        ({"policy": {"path": "p", "lora": {"r": 4}}}, ("--model.optimizer.init_args.lr=3e-4",), 3e-4),
        ({"policy": {"path": "p", "lora": {"r": 4}}, "optimizer": {"class_path": "torch.optim.AdamW"}}, (), 1e-5),
    ],
)
def test_an_adapter_starts_with_ten_times_the_rate_unless_one_is_set(
    model: dict[str, Any], options: tuple[str, ...], rate: float, tmp_path: Path
) -> None:
    module = parsed(tmp_path, SHORT | {"model": SHORT["model"] | model}, *options)
    assert module.optimizer.init_args.lr == rate


@pytest.mark.parametrize(("lora", "rate"), [(None, 1e-5), ({"r": 2}, 1e-4)])
def test_the_rate_is_that_of_the_stage(lora: Any, rate: float, tmp_path: Path) -> None:
    stage = {"class_path": "SFTModule", "init_args": {"policy": {"path": "p", "lora": lora}}}
    module = parsed(
        tmp_path, {"model": stage, "data": {"class_path": "SFTDataModule", "init_args": {"path": "r.jsonl"}}}
    )
    assert module.optimizer.init_args.lr == rate


@pytest.mark.parametrize(
    ("trainer", "options", "epochs"),
    [
        ({}, (), 1),
        ({"max_steps": 10}, (), -1),
        ({"max_time": "00:01:00:00"}, (), -1),
        ({"max_steps": 10, "max_epochs": 3}, (), 3),
        ({}, ("--trainer.max_steps=10",), -1),
        ({"max_steps": 10}, ("--trainer.max_epochs", "2"), 2),
        ({"max_steps": -1}, (), 1),
    ],
)
def test_one_epoch_is_the_length_unless_another_is_asked_for(
    trainer: dict[str, Any], options: tuple[str, ...], epochs: int, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SHORT | {"trainer": trainer}))
    with in_folder(tmp_path):
        assert remax_parser().parse_args(["fit", "--config", str(path), *options]).fit.trainer.max_epochs == epochs


@pytest.mark.parametrize("kind", [ReMaxModule, SFTModule, RewardModelModule])
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_python_and_the_command_line_start_with_one_rate(kind: Any, lora: Any) -> None:
    source = ModelConfig("owner/name", lora=None if lora is None else LoRAConfig(**lora))
    name = "reward_model" if kind is RewardModelModule else "policy"
    module = kind(**{name: source} | ({"reward": FUNCTION} if kind is ReMaxModule else {}))
    [group] = module.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    config = {"model": {"class_path": kind.__name__, "init_args": {name: {"path": "owner/name", "lora": lora}}}}
    assert default_rate([config]) == pytest.approx(group["lr"])
