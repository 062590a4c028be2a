"""What a configuration may leave out: a path, function or class alone, and the learning rate of an adapter."""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.cli import changed, in_folder, misread, remax_parser, small_config, write_config

from remax_lightning import ReMaxModule, RewardModelModule, SFTModule, rollout
from remax_lightning.cli_run import RemaxCLI, run
from remax_lightning.cli_shorthand import default_rate, our_classes
from remax_lightning.errors import UserError
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.strategies import ReMaxDeepSpeedStrategy

FUNCTION = "remax_lightning.rewards.verifiers.exact_match"
SHORT = {"model": {"policy": "owner/name", "reward": FUNCTION}, "data": {"path": "rows.jsonl"}}


def parsed_run(folder: Path, config: dict[str, Any], *options: str) -> Any:
    """What the command reads from a configuration and options."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    with in_folder(folder):
        return remax_parser().parse_args(["fit", "--config", str(path), *options]).fit


def parsed(folder: Path, config: dict[str, Any], *options: str) -> Any:
    """The module's arguments in it."""
    return parsed_run(folder, config, *options).model.init_args


@pytest.mark.slow
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


@pytest.mark.slow
def test_lists_and_parts_of_rewards_may_be_functions(tmp_path: Path) -> None:
    judge = {"class_path": "JudgeReward", "init_args": {"url": "http://host/v1", "model": "m"}}
    reward = parsed(tmp_path, SHORT | {"model": SHORT["model"] | {"reward": [FUNCTION, judge, FUNCTION]}}).reward
    assert reward.class_path.endswith("WeightedReward")
    assert list(reward.init_args.parts) == ["exact_match", "JudgeReward", "exact_match_2"]
    assert reward.init_args.parts["exact_match_2"].init_args.function == FUNCTION
    timed = {"class_path": "TimedReward", "init_args": {"reward": FUNCTION}}
    weighted = {"class_path": "WeightedReward", "init_args": {"parts": {"a": timed}}}
    reward = parsed(tmp_path, SHORT | {"model": SHORT["model"] | {"reward": weighted}}).reward
    assert reward.init_args.parts["a"].init_args.reward.init_args.function == FUNCTION


def test_arguments_beside_a_class_are_named(tmp_path: Path) -> None:
    part = {"class_path": "FunctionReward", "function": FUNCTION}
    weighted = {"class_path": "WeightedReward", "init_args": {"parts": {"a": part}}}
    with pytest.raises(UserError) as caught:
        parsed(tmp_path, SHORT | {"model": SHORT["model"] | {"reward": weighted}})
    key = "model.reward.init_args.parts.a"
    expected = f"{key}.function: arguments of a class stand under init_args; write {key}.init_args.function"
    assert str(caught.value) == expected


@pytest.mark.slow(0.3)
def test_options_of_the_command_do_too_and_come_later(tmp_path: Path) -> None:
    options = ("--model.policy", "owner/other", "--model.policy.dtype=bfloat16", "--model.reward=my_module.my_function")
    module = parsed(tmp_path, SHORT, *options)
    assert (module.policy.path, module.policy.dtype) == ("owner/other", "bfloat16")
    assert module.reward.init_args.function == "my_module.my_function"


@pytest.mark.slow
def test_classes_stay_classes(tmp_path: Path) -> None:
    name = "remax_lightning.rewards.HTTPReward"
    module = parsed(tmp_path, SHORT, "--model.reward", name, "--model.reward.url", "http://localhost")
    assert module.reward.class_path == name
    config = SHORT | {"model": SHORT["model"] | {"reward": {"class_path": name, "init_args": {"url": "http://host"}}}}
    assert parsed(tmp_path, config).reward.init_args.url == "http://host"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PairedEngine", "VLLMEngine"])
def test_engines_are_known_by_their_names(name: str, tmp_path: Path) -> None:
    arguments = {"urls": ["http://localhost:8000"]} if name == "VLLMEngine" else {}
    config = SHORT | {"model": SHORT["model"] | {"rollout": {"class_path": name, "init_args": arguments}}}
    module = parsed(tmp_path, config)
    package, _, attribute = module.rollout.class_path.rpartition(".")
    assert getattr(import_module(package), attribute) is getattr(rollout, name)
    if arguments:
        assert module.rollout.init_args.urls == arguments["urls"]
    assert parsed(tmp_path, SHORT, "--model.rollout", "PairedEngine").rollout.class_path.endswith("PairedEngine")


@pytest.mark.slow
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


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(("lora", "rate"), [(None, 1e-5), ({"r": 2}, 1e-4)])
def test_the_rate_is_that_of_the_stage(lora: Any, rate: float, tmp_path: Path) -> None:
    stage = {"class_path": "SFTModule", "init_args": {"policy": {"path": "p", "lora": lora}}}
    module = parsed(
        tmp_path, {"model": stage, "data": {"class_path": "SFTDataModule", "init_args": {"path": "r.jsonl"}}}
    )
    assert module.optimizer.init_args.lr == rate


@pytest.mark.slow
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


# Names of our classes


def test_every_class_that_a_configuration_may_name_is_known_by_its_name() -> None:
    names = our_classes()
    assert set(names) >= {
        *("ReMaxModule", "SFTDataModule", "HTTPReward", "PairedEngine", "HuggingFaceEngine", "WarmupCosine"),
        *(
            "ReMaxDeepSpeedStrategy",
            "ReMaxFSDP2Strategy",
            "TrackioLogger",
            "CollapseDetector",
            "RunProgress",
            "Tracker",
        ),
    }
    assert not set(names) & {"Reward", "RolloutEngine", "KLConfig", "Scores", "ModelConfig"}
    for name, path in names.items():
        module, _, attribute = path.rpartition(".")
        assert attribute == name
        assert inspect.isclass(getattr(import_module(module), name))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["name", "class_path", "full path"])
@pytest.mark.parametrize("where", ["file", "option"])
def test_an_engine_and_a_strategy_are_taken_by_name(form: str, where: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"rollout": "HuggingFaceEngine", "strategy": "ReMaxFSDP2Strategy"}
    if form == "full path":
        values = {key: our_classes()[name] for key, name in values.items()}
    if form != "name":
        values = {key: {"class_path": name} for key, name in values.items()}
    config, options = SHORT | {"trainer": {}}, []
    if where == "file":
        config = config | {"model": SHORT["model"] | {"rollout": values["rollout"]}}
        config["trainer"] = {"strategy": values["strategy"]}
    else:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
        options = ["--model.rollout", texts["rollout"], f"--trainer.strategy={texts['strategy']}"]
    run = parsed_run(tmp_path, config, *options)
    assert run.model.init_args.rollout.class_path.endswith(".HuggingFaceEngine")
    assert run.trainer.strategy.class_path == "remax_lightning.strategies.ReMaxFSDP2Strategy"


@pytest.mark.slow
def test_names_stand_in_lists_and_groups_too(tmp_path: Path) -> None:
    long = {"class_path": "FunctionReward", "init_args": {"function": FUNCTION}}
    reward = {"class_path": "WeightedReward", "init_args": {"parts": {"long": long}}}
    config = SHORT | {
        "model": SHORT["model"]
        | {"reward": reward, "lr_scheduler": {"class_path": "WarmupLinear", "init_args": {"warmup_steps": 3}}},
        "trainer": {"callbacks": ["KLMonitor", {"class_path": "SampleDump", "init_args": {"num_samples": 1}}]},
    }
    run = parsed_run(tmp_path, config)
    assert [callback.class_path.rpartition(".")[2] for callback in run.trainer.callbacks] == ["KLMonitor", "SampleDump"]
    assert run.model.init_args.lr_scheduler.class_path.endswith(".WarmupLinear")
    assert run.model.init_args.reward.init_args.parts["long"].class_path.endswith(".FunctionReward")


@pytest.mark.slow(0.3)
def test_text_that_happens_to_be_the_name_of_a_class_stays_text(tmp_path: Path) -> None:
    data = {"path": "Throughput", "prompt_column": "PairedEngine"}
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs", "name": "Evaluation"},
    }
    run = parsed_run(tmp_path, SHORT | {"data": data, "trainer": {"logger": logger}})
    assert (run.data.init_args.path, run.data.init_args.prompt_column) == ("Throughput", "PairedEngine")
    assert run.trainer.logger.init_args.name == "Evaluation"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"model": {"rollout": "PairdEngine"}},
            "model.rollout: there is no class 'PairdEngine'; did you mean PairedEngine?",
        ),
        ({"model": {"rollout": {"class_path": "PairdEngine"}}}, "did you mean PairedEngine?"),
        ({"model": {"reward": {"class_path": "HTPReward"}}}, "did you mean HTTPReward?"),
        ({"trainer": {"strategy": "ReMaxDeepSpedStrategy"}}, "did you mean ReMaxDeepSpeedStrategy?"),
        ({"trainer": {"strategy": "dpp"}}, "trainer.strategy: there is no strategy 'dpp'; did you mean ddp?"),
        ({"trainer": {"callbacks": ["KLMonitr"]}}, "did you mean KLMonitor?"),
        ({"trainer": {"callbacks": [{"class_path": "KLMonitr"}]}}, "did you mean KLMonitor?"),
        ({"model": {"lr_scheduler": {"class_path": "WarmupCosin"}}}, "did you mean WarmupCosine?"),
        ({"model": {"lr_scheduler": "cosine"}}, "there is no class 'cosine'; did you mean WarmupCosine?"),
        ({"model": {"optimizer": "AdamX"}}, "model.optimizer: there is no class 'AdamX'; did you mean Adamax?"),
        ({"model": {"optimizer": "adamw"}}, "did you mean AdamW?"),
        ({"trainer": {"logger": "wandb"}}, "trainer.logger: there is no class 'wandb'; did you mean WandbLogger?\n"),
        ({"trainer": {"logger": {"class_path": "tensorboard"}}}, "did you mean TensorBoardLogger?"),
        (
            {"trainer": {"plugins": "slurm"}},
            "trainer.plugins: there is no class 'slurm'; did you mean SLURMEnvironment?",
        ),
        ({"model": "owner/name"}, "model: there is no class 'owner/name'; write model: {policy: owner/name}, or give"),
        ({"model": "policy"}, "model: there is no class 'policy'; write model: {policy: policy}, or give a class"),
        ({"model": "ReMaxModul"}, "model: there is no class 'ReMaxModul'; did you mean ReMaxModule?"),
        ({"data": "rows.jsonl"}, "data: there is no class 'rows.jsonl'; write data: {path: rows.jsonl}, or give"),
        ({"data": "my_rows.Rows"}, "data: cannot import my_rows.Rows: there is no module 'my_rows'; put my_rows.py"),
        ({"trainer": {"callbacks": ["EarlyStop"]}}, "there is no class 'EarlyStop'; did you mean EarlyStopping?"),
    ],
)
def test_a_name_that_is_none_of_ours_is_told_with_the_nearest(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SHORT | {
        key: value if isinstance(value, str) else SHORT.get(key, {}) | value for key, value in change.items()
    }
    assert said in misread(config, tmp_path, capsys)


@pytest.mark.slow
def test_a_name_of_lightning_for_deepspeed_stands_for_our_strategy(tmp_path: Path, policy_path: Path) -> None:
    """Lightning's own refuses a CPU, and divides the loss of several micro-batches twice."""

    class MadeOnly(RemaxCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    trainer = {"strategy": "deepspeed_stage_2", "accelerator": "cpu", "accumulate_grad_batches": 2}
    path = write_config(tmp_path / "run.yaml", changed(small_config(tmp_path, policy_path), trainer=trainer))
    with in_folder(tmp_path):
        strategy = run(["fit", "--config", path], MadeOnly).trainer.strategy
    assert isinstance(strategy, ReMaxDeepSpeedStrategy)
    assert not strategy.zero_stage_3
