"""Wrong keys are told before torch is imported, in the words of the whole check, and nothing right is refused."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import subprocess
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_origin

import pytest
import torch
import yaml
from helpers.cli import are_releases_described, in_folder, misread, remax_parser, small_config, write_config
from jsonargparse import ArgumentParser
from jsonargparse._parameter_resolvers import get_signature_parameters
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LRScheduler

from remax_lightning import cli_run, cli_schema
from remax_lightning.cli_arguments import unreadable_configs
from remax_lightning.cli_help import RUNS
from remax_lightning.cli_keys import refuse_wrong_keys, wrong_keys
from remax_lightning.cli_schema import explain_type, shipped_signatures
from remax_lightning.cli_signatures import describe_types
from remax_lightning.data import PromptDataModule
from remax_lightning.errors import Range, UserError, above, at_least, ranges_of
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.modules import ReMaxModule
from remax_lightning.rewards import FunctionReward
from remax_lightning.rollout import SamplingConfig
from remax_lightning.shipped_configs import config_names

COMPLETE = [name for name in config_names() if "/" not in name and name != "base"]
OVERLAYS = [name for name in config_names() if "/" in name]
FUNCTION = "remax_lightning.rewards.verifiers.exact_match"
PLAIN: dict[str, Any] = {"model": {"policy": "owner/name", "reward": FUNCTION}, "data": {"path": "rows.jsonl"}}


def early(folder: Path, config: Any, *options: str, subcommand: str = "fit") -> dict[str, str]:
    """What is told of a configuration before torch is imported."""
    path = folder / "early.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return wrong_keys([subcommand, "--config", str(path), *options], shipped_signatures())


def with_model(**values: Any) -> dict[str, Any]:
    return PLAIN | {"model": PLAIN["model"] | values}


# What is right


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPLETE)
def test_a_shipped_configuration_is_right(name: str) -> None:
    is_remax = not any(stage in name for stage in ("sft", "reward_model"))
    prefixes = ("strategies/", "loggers/", *(("presets/", "overlays/") if is_remax else ()))
    prefixes += ("gpus/",) if is_remax and name not in ("demo", "pipeline") else ()  # they place a reward model
    overlays = [other for other in OVERLAYS if other.startswith(prefixes)]
    # The keys of an overlay are the same for every subcommand: one of them reads each alone, the others all together.
    cases = [("fit", (overlay,)) for overlay in overlays] + list(itertools.product(RUNS, [(), overlays]))
    for subcommand, further in cases:
        names = [part for config in (name, *further) for part in ("--config", config)]
        assert wrong_keys([subcommand, *names], shipped_signatures()) == {}, names


OWN = {
    "a module": {"model": {"class_path": "my.Module", "init_args": {"anything": 1}}, "data": {"path": "x"}},
    "a reward": with_model(reward={"class_path": "my_rewards.DigitReward", "init_args": {"anything": 1}}),
    "its name alone": with_model(
        reward="MyReward", optimizer={"class_path": "my.Optimizer", "init_args": {"anything": 1}}
    ),
    "parts": with_model(reward=[FUNCTION, {"class_path": "mine.Reward", "init_args": {"x": 1}}, "HTTPReward"]),
    "a callback": PLAIN | {"trainer": {"callbacks": [{"class_path": "mine.Callback", "init_args": {"x": 1}}]}},
    "callbacks by name": PLAIN | {"trainer": {"callbacks": ["EarlyStopping", "CollapseDetector"]}},
    "a strategy": PLAIN | {"trainer": {"strategy": {"class_path": "mine.Strategy", "init_args": {"x": 1}}}},
    "an engine": with_model(rollout={"class_path": "mine.Engine", "init_args": {"x": 1}}),
    "a baseline": with_model(advantage={"baseline": {"class_path": "mine.Baseline", "init_args": {"x": 1}}}),
    "files of groups": PLAIN | {"trainer": "trainer.yaml", "model": "model.yaml"},
    "a file of a group within": with_model(sampling="sampling.yaml", reward="reward.yaml"),
    "numbers as text": with_model(kl_coef="1e-3", sampling={"temperature": "0.5", "num_samples": "2"}),
    "null": with_model(reference=None, rollout=None, policy={"path": "p", "lora": None}),
    "the saved form": with_model() | {"ckpt_path": None, "seed_everything": True},
    "groups without keys": with_model(kl={}, rest={}) | {"samples": {}, "other": {}},
    "numbers of devices": PLAIN | {"trainer": {"devices": [0, 1], "precision": 16, "val_check_interval": 0.5}},
    "limits": PLAIN
    | {
        "trainer": {
            "max_steps": "-1",
            "max_epochs": "4",
            "limit_val_batches": "0.5",
            "devices": "0,1",
            "max_time": {"days": 1},
            "val_check_interval": "00:00:10:00",
        }
    },
    "the name of a file": PLAIN
    | {"trainer": {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"filename": "{step}"}}]}},
}


@pytest.mark.parametrize("case", OWN)
def test_what_only_the_parser_can_judge_is_left_to_it(case: str, tmp_path: Path) -> None:
    assert early(tmp_path, OWN[case]) == {}


@pytest.mark.parametrize(
    "options",
    [
        ("--model.policy=owner/other", "--model.policy.lora.r", "8"),
        ("--model.reward", "HTTPReward", "--model.reward.url=http://localhost"),
        ("--model.reward.init_args.arguments", "{word: please}"),
        ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/reward"),
        ("--trainer.callbacks+={class_path: EarlyStopping, init_args: {monitor: x}}",),
        ("--config", "presets/verl", "--config", "loggers/wandb", "--trainer.logger.project=x"),
        ("--model", "SFTModule", "--data", "SFTDataModule", "--data.response_column=answer"),
        ("--trainer.strategy=ddp", "--trainer.devices", "2", "--trainer.max_time", "00:01:00:00"),
        ("--model.optimizer.init_args.lr=1e-5", "--model.optimizer.weight_decay=0.1"),
        ("--model.optimizer=Adam", "--model.optimizer.amsgrad=true"),
        ("--config", "model: {kl_coef: 0.1}\nseed_everything: 3"),
        ("--config", "a_file_that_is_not_there.yaml", "--model.kl_coeff=3"),  # told before any key is looked at
        ("--trainer.max_steps=-5", "--trainer.max_steps=5"),  # the last one counts
        ("--trainer.max_steps=1e3",),
        ("--data.batch_size=0", "--data.batch_size=4", "--model.kl.clamp=null"),
        ("--data.micro_batch_size=5", "--data.batch_size=10", "--data.micro_batch_size=null"),
        ("--data.micro_batch_size=5", "--data.batch_size=10"),
        ("--model.advantage.baseline", "Tracker", "--model.advantage.baseline.decay=0.5"),
        ("--trainer.strategy=ddp_spawn", "--trainer.strategy", "{class_path: mine.Strategy}"),
        ("--model.optimizer=SGD", "--model.optimizer.momentum=-1", "--model.optimizer=Adam"),  # it has no such key
        ("--print_config", "--model.kl_coeff=3"),
        ("--model.help", "SFTModule"),
    ],
    ids=lambda options: " ".join(options)[:40],
)
def test_options_that_are_right_or_unclear_are_left_to_the_parser(options: tuple[str, ...], tmp_path: Path) -> None:
    assert early(tmp_path, PLAIN, *options) == {}


def values_for(types: list[Any]) -> list[Any]:
    words = [str(choice) for kind in types if isinstance(kind, dict) for choice in kind.get("choices", [])]
    numbers = [0, 1, -3, 2.5, 1000.0, True, False, None]
    return [*numbers, "many", "4", "1e3", "1e-3", "0.5", "true", "null", "no", "1_000", "0x10", "nan", "~", "", *words]


@pytest.mark.parametrize("kind", [ReMaxModule, PromptDataModule, Trainer, ModelConfig, LoRAConfig, SamplingConfig])
def test_no_value_is_refused_that_jsonargparse_takes(kind: type) -> None:
    checked = set()
    for argument in get_signature_parameters(kind):
        types = describe_types(argument.annotation)
        if str(types) in checked or explain_type(object(), types) is None:
            continue
        checked.add(str(types))
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--x", type=argument.annotation)
        for value in values_for(types):
            try:
                parser.parse_object({"x": value})
            except Exception:
                continue
            assert explain_type(value, types) is None, (argument.name, value)


# What is wrong: `misread` compares every mistake in the tests of the parser with what is told early


WRONG: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "several": (
        {"model": {"policy": "p", "kl_coeff": 1, "sampling": {"top_k": "all"}},
         "trainer": {"max_stepz": 3}},
        {
            "model.kl_coeff": "there is no such key; did you mean kl_coef?",
            "model.sampling.top_k": "expected a whole number, got all",
            "trainer.max_stepz": "there is no such key; did you mean max_steps?",
            "model.reward": "missing, and there is no default; set it in the YAML or on the command line",
        },
    ),
    "a part of a sum": (
        with_model(reward=[FUNCTION, {"class_path": "HTTPReward", "init_args": {"urll": "x"}}]),
        {"model.reward.init_args.parts.HTTPReward.init_args.urll": "there is no such key; did you mean url?"},
    ),
    "a part by a name": (
        with_model(
            reward={
                "class_path": "WeightedReward",
                "init_args": {"parts": {"len": {"class_path": "FunctionReward", "init_args": {"funktion": "f"}}}},
            }
        ),
        {"model.reward.init_args.parts.len.init_args.funktion": "there is no such key; did you mean function?"},
    ),
    "a callback in a list": (
        PLAIN | {"trainer": {"callbacks": ["RunProgress", {"class_path": "SampleDump", "init_args": {"every": 1}}]}},
        {
            "trainer.callbacks.1.init_args.every": "there is no such key; the keys are every_n_steps, num_samples,"
            " folder"
        },
    ),
    "a class of another file": (
        {"model": {"class_path": "SFTModule", "init_args": {"policy": "p", "kl_coef": 1}},
         "data": {"class_path": "SFTDataModule", "init_args": {"path": "p"}}},
        {"model.kl_coef": "there is no such key; the keys are policy, reward, tokenizer, "},
    ),
    "a choice": (
        with_model(advantage={"baseline": "gredy"}),
        {"model.advantage.baseline": "expected one of 'greedy', 'none', "},
    ),
    "ranges of the trainer": (
        PLAIN | {"trainer": {"max_steps": -5, "accumulate_grad_batches": 0, "limit_val_batches": 1.5,
                             "max_time": {"minute": 5}},
                 "seed_everything": -1},
        {
            "seed_everything": "expected a whole number from 0 to 4294967295",
            "trainer.accumulate_grad_batches": "expected a whole number from 1, got 0",
            "trainer.limit_val_batches": "expected a share from 0.0 to 1.0, or a whole number of batches from 0, got",
            "trainer.max_steps": "expected -1 (no limit), or a whole number from 0, got -5",
            "trainer.max_time": "expected a duration DD:HH:MM:SS, or {days: ..., ",
        },
    ),
    "a range of an optimizer": (
        with_model(optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": -1e-5}}),
        {"model.optimizer.init_args.lr": "expected a number from 0, got -1e-05"},
    ),
    "ranges of this package's own classes": (
        {
            "model": PLAIN["model"] | {
                "kl_coef": -1, "sampling": {"temperature": -1}, "stall_timeout": 0,
                "reward": {"class_path": "HTTPReward", "init_args": {"url": "http://localhost", "concurrency": 0}},
                "lr_scheduler": {"class_path": "WarmupCosine", "init_args": {"min_ratio": 2}},
            },
            "data": PLAIN["data"] | {"batch_size": 0, "selection": {"oversample": 0}},
            "evaluation": {"pass_at_k": [1, 0]},
            "samples": {"every_n_steps": -1},
            "trainer": {"callbacks": [{"class_path": "CollapseDetector", "init_args": {"window": 1}}]},
        },
        {
            "data.batch_size": "must be at least 1, got 0",
            "data.selection.oversample": "must be at least 1 (rollout batches), got 0",
            "evaluation.pass_at_k": "must be numbers of at least 1, got [1, 0]",
            "model.kl_coef": "must be 0 or more, got -1",
            "model.lr_scheduler.init_args.min_ratio": "must be between 0 and 1, got 2",
            "model.reward.init_args.concurrency": "must be at least 1, got 0",
            "model.sampling.temperature": "must be above 0 (the greedy response is decoded anyway, as the baseline), ",
            "model.stall_timeout": "must be null or above 0 (seconds), got 0",
            "samples.every_n_steps": "must be 0 (off) or more, got -1",
            "trainer.callbacks.0.init_args.window": "must be at least 2 (optimizer steps), got 1",
        },
    ),
    "numbers beside others": (
        {
            "model": PLAIN["model"] | {"sampling": {"max_response_length": 8, "min_response_length": 9}},
            "data": PLAIN["data"] | {"micro_batch_size": 5},  # of a batch of 64 by default
        },
        {
            "data.micro_batch_size": "must divide data.batch_size 64, got 5; choose a divisor",
            "model.sampling.min_response_length": "must be at most model.sampling.max_response_length 8, got 9",
        },
    ),
    "a range of a baseline": (
        with_model(advantage={"baseline": {"class_path": "Tracker", "init_args": {"decay": 2}}}),
        {"model.advantage.baseline.init_args.decay": "must be between 0 and 1, got 2"},
    ),
    "numbers that are none": (
        with_model(kl_coef=float("nan")) | {"collapse": {"max_kl": float("inf")}},
        {
            "collapse.max_kl": "must be a finite number, got inf",
            "model.kl_coef": "must be a finite number, got nan",
        },
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_all_that_is_wrong_is_told_by_its_full_key(case: str, tmp_path: Path, capsys: Any) -> None:
    config, expected = WRONG[case]
    told = early(tmp_path, config)
    if are_releases_described():
        assert list(told) == list(expected)
    else:  # keys of the libraries' classes are left to the parser
        assert set(told) <= set(expected)
    for key, text in told.items():
        assert text.startswith(expected[key])
    said = misread(config, tmp_path, capsys)
    assert [line for line in (f"{key}: {text}" for key, text in told.items()) if line not in said] == []


IN_ELEMENTS = {
    "of a user's class": (
        {"class_path": "my_rewards.DigitReward", "init_args": {"scalee": 1.0}},
        "model.reward.init_args.parts.b.init_args.scalee: there is no such key; did you mean scale?",
    ),
    "of its value": (
        {"class_path": "my_rewards.DigitReward", "init_args": {"scale": "big"}},
        "model.reward.init_args.parts.b.init_args.scale: expected a number, got big",
    ),
    "of another kind": (
        {"class_path": "remax_lightning.SFTModule"},
        "model.reward.init_args.parts.b: Import path remax_lightning.SFTModule does not correspond to a subclass of",
    ),
    "that is not there": (
        {"class_path": "nowhere.Mine"},
        "model.reward.init_args.parts.b: cannot import nowhere.Mine: there is no module 'nowhere'",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_ELEMENTS)
def test_the_parser_names_the_element_that_is_wrong(
    case: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    element, expected = IN_ELEMENTS[case]
    right = {"class_path": "FunctionReward", "init_args": {"function": FUNCTION}}
    reward = {"class_path": "WeightedReward", "init_args": {"parts": {"a": right, "b": element}}}
    with in_folder(tmp_path, plugins=True):
        said = misread(with_model(reward=reward), tmp_path, capsys)
    assert said.startswith(expected)
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "hint"),
    [("mine.yaml", "did you mean --config mine.yaml?"), ("presets/verl", "did you mean --config presets/verl?"),
     ("model.kl_coef=3", "options begin with --")],
)  # fmt: skip
def test_a_word_that_is_no_option_is_told(word: str, hint: str, tmp_path: Path) -> None:
    assert early(tmp_path, PLAIN, word) == {word: f"is no option; {hint}"}
    alone = wrong_keys(["fit", word], shipped_signatures())
    assert alone.pop(word) == f"is no option; {hint}"
    assert bool(alone) == ("--config" not in hint)  # what is missing may stand in the file


def test_a_run_without_any_option_is_told_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"^fit: there is no configuration; give --config FILE_OR_NAME, or see remax"):
        refuse_wrong_keys(["fit"])


@pytest.mark.slow
def test_null_on_the_command_line_is_the_null_of_a_file(tmp_path: Path, policy_path: Path) -> None:
    """At any depth: groups, classes and plain values within the module, with or without their `init_args`."""
    config = small_config(tmp_path, policy_path)
    config["model"] |= {"policy": {"path": str(policy_path), "lora": {"r": 4}}, "kl": {"clamp": 3.0}, "reference": None}
    config["model"]["reward"]["init_args"]["timeout"] = 5.0
    path = write_config(tmp_path / "run.yaml", config)
    options = ["--model.policy.lora=null", "--model.init_args.kl.clamp", "null", "--model.rollout=null"]
    options += ["--model.reward.timeout=~", "--trainer.logger=null", "--data.val_path", "null"]
    model = remax_parser().parse_args(["fit", "--config", path, *options]).fit.model.init_args
    assert model.policy.lora is None
    assert model.policy.path == str(policy_path)
    assert model.kl.clamp is None
    assert model.rollout is None
    assert model.reward.init_args.timeout is None
    assert model.reward.init_args.function.endswith("exact_match")
    assert wrong_keys(["fit", "--config", path, *options], shipped_signatures()) == {}


def test_a_name_that_is_no_file_is_told_as_always(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is neither a file 'presets/verll' nor a shipped configuration"):
        early(tmp_path, PLAIN, "--config", "presets/verll")


UNREADABLE: dict[str, tuple[str, str]] = {
    "a value that is cut off": ("model: {policy: p\ndata:\n", "run.yaml, line 2, column 5: not valid YAML (expected "),
    "a colon too many": ("model:\n  kl_coef: : 3\n", "run.yaml, line 2, column 12: not valid YAML (mapping values are"),
    "a tab": ("model:\n\tkl_coef: 3\n", "run.yaml, line 2, column 1: not valid YAML (found character '\\t' that"),
    "a key that stands twice": ("data: {}\ndata: {}\n", "run.yaml, the key 'data' stands twice, in lines 1 and 2"),
    "no text": ("\ud800", "run.yaml: no text in UTF-8"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_is_no_yaml_is_told_first(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, expected = UNREADABLE[case]
    (tmp_path / "run.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as told:
        refuse_wrong_keys(["fit", "--config", "run.yaml", "--model.kl_coeff=3"])
    assert str(told.value).startswith(expected)
    assert "\n" not in str(told.value)
    assert ("indent with spaces" in str(told.value)) == (case == "a tab")


MISSING_FILES = {
    "mien.yaml": "config: there is no file 'mien.yaml'; did you mean mine.yaml?",
    "configs/verl.yaml": "config: there is no file 'configs/verl.yaml'; there is no folder 'configs' either",
    "verl.yaml": "config: there is no file 'verl.yaml'; did you mean --config presets/verl?",
    "runs": "config: 'runs' is a folder; give a YAML file in it",
    "{model: {policy": "--config, line 1, column 16: not valid YAML",
}


@pytest.mark.parametrize("name", MISSING_FILES)
def test_a_configuration_that_is_no_file_is_told_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(PLAIN))
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for command in (["fit", "--config", "mine.yaml", "--config", name], ["test", f"--config={name}", "--data.pth=3"]):
        with pytest.raises(UserError) as told:
            refuse_wrong_keys(command)
        assert str(told.value).startswith(MISSING_FILES[name])


def test_a_pipe_is_left_to_the_parser(tmp_path: Path) -> None:
    """What was read here would be gone, as of `--config <(sed ... mine.yaml)`."""
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    assert list(unreadable_configs(["fit", "--config", str(pipe)])) == []


def test_numbers_on_the_command_line_are_checked_as_those_of_files(tmp_path: Path) -> None:
    options = ("--data.batch_size", "0", "--model.sampling.temperature=-1e-3", "--evaluation.pass_at_k=[0]")
    told = early(tmp_path, PLAIN, *options)
    assert told.pop("model.sampling.temperature").endswith(", got -0.001")
    assert told == {
        "data.batch_size": "must be at least 1, got 0",
        "evaluation.pass_at_k": "must be numbers of at least 1, got [0]",
    }


# The ranges, which stand in annotations alone: the classes refuse what the command line does

ARGUMENTS: dict[str, Any] = {
    "path": "x", "tokenizer": "x", "policy": "x", "reward_model": "x", "reward": FUNCTION, "function": FUNCTION,
    "url": "http://localhost", "urls": ["http://localhost"], "model": "x", "tasks": {"chain_sum": {}},
}  # fmt: skip


def ranges() -> list[tuple[str, str, Range]]:
    """Class, argument and range of every number that has one."""
    content = shipped_signatures()
    paths = json.loads(cli_schema.SIGNATURES.read_text())["parameters"]
    arguments = [(path, item) for path in paths for item in (content.described(path) or {}).items()]
    return [(path, name, parameter.range) for path, (name, parameter) in arguments if parameter.range is not None]


@pytest.mark.slow(0.3)
def test_every_class_refuses_what_is_out_of_the_ranges_in_its_annotations() -> None:
    known = ranges()
    assert len(known) > 100
    for path, name, allowed in known:
        module, _, kind_name = path.rpartition(".")
        kind = getattr(importlib.import_module(module), kind_name)
        needed = {key: value for key, value in ARGUMENTS.items() if key in inspect.signature(kind).parameters}
        if issubclass(kind, LRScheduler):
            needed["optimizer"] = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        if path.endswith("TimedReward"):
            needed["reward"] = FunctionReward(FUNCTION)
        bad = allowed.low if allowed.is_above else allowed.low - 1
        function = kind if is_dataclass(kind) else kind.__init__
        is_list = get_origin(ranges_of(function)[name][1]) is tuple
        with pytest.raises(UserError, match=rf"{name} must be "):
            kind(**needed | {name: [bad] if is_list else bad})


@pytest.mark.parametrize(
    ("allowed", "right", "wrong", "words"),
    [
        (at_least(1), [1, 2.5], [0, float("nan"), float("inf")], "at least 1"),
        (at_least(0, zero="off"), [0, 3], [-1], "0 (off) or more"),
        (at_least(0, below=1), [0, 0.99], [1, -0.1], "0 or more and below 1"),
        (at_least(1, at_most=10**6), [1, 10**6], [0, 10**6 + 1], "between 1 and 1,000,000"),
        (above(0, at_most=1), [1e-9, 1], [0, 1.01], "above 0 and at most 1"),
        (above(0.5, below=1, note="share"), [0.6], [0.5, 1], "above 0.5 and below 1"),
    ],
)
def test_a_range_says_what_it_takes(allowed: Range, right: list[float], wrong: list[float], words: str) -> None:
    assert [value for value in [*right, None, "text", True, []] if allowed.explain(value)] == []
    assert allowed.explain(right) is None
    for value in wrong:
        told = allowed.explain(value)
        assert told is not None
        assert told.startswith(f"must be {words}")
        assert told.endswith(f", got {value}")
        assert ("and finite" in told) == (value in (float("inf"), float("-inf")) or value != value)
        assert str(allowed.explain([*right, value])).startswith(f"must be numbers of {words}")


def test_a_number_of_another_type_is_refused_from_python() -> None:
    with pytest.raises(TypeError, match=r"^model\.sampling\.num_samples must be a whole number, got str 'many'"):
        SamplingConfig(num_samples="many")  # type: ignore[arg-type]


# The signatures


@pytest.mark.slow(0.3)
def test_the_shipped_signatures_are_those_of_this_code() -> None:
    from remax_lightning.cli_signatures import shipped_content

    shipped, fresh = json.loads(cli_schema.SIGNATURES.read_text()), shipped_content(cli_run.CALLBACKS)
    fresh = json.loads(json.dumps(fresh))
    hint = "stale: run python docs/generate_configuration.py"
    if shipped["releases"] != fresh["releases"]:  # with other releases of the libraries, what is this package's own
        for content in (shipped, fresh):
            del content["releases"]
            content["parameters"] = {
                path: value for path, value in content["parameters"].items() if path not in content["libraries"]
            }
    assert shipped == fresh, hint


def test_classes_of_another_release_of_their_library_are_left_to_the_parser(tmp_path: Path) -> None:
    content = json.loads(cli_schema.SIGNATURES.read_text())
    content["releases"]["lightning"] = "1.0.0"
    signatures = cli_schema.ShippedSignatures(content)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(with_model(kl_coeff=1) | {"trainer": {"max_stepz": 3}}))
    assert list(wrong_keys(["fit", "--config", str(path)], signatures)) == ["model.kl_coeff"]


def test_code_that_someone_is_changing_is_not_judged_by_the_signatures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, signatures = tmp_path / "config.py", tmp_path / "signatures.json"
    code.write_text("old = 1\n")
    signatures.touch()
    monkeypatch.setattr(cli_schema, "SIGNATURES", signatures)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert cli_schema.is_current()  # as in a clone
    later = (code.stat().st_mtime + 3600,) * 2
    os.utime(code, later)
    assert not cli_schema.is_current()  # who knows
    # ---- After a pull, which wrote this file alone; then someone edits it ----
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=tmp_path, check=True)
    assert cli_schema.is_current()
    code.write_text("new = 1\n")
    os.utime(code, later)
    assert not cli_schema.is_current()


@pytest.mark.slow(0.3)
def test_a_valid_run_is_parsed_as_before(tmp_path: Path, policy_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small_config(tmp_path, policy_path)))
    parsed = remax_parser().parse_args(["fit", "--config", str(path)])
    assert parsed.fit.data.init_args.max_prompt_length == 16


@pytest.mark.parametrize(
    ("options", "key"),
    [(["--trainer.max_steps"], "trainer.max_steps"), (["--model.kl_coef", "--trainer.max_steps", "3"], "model.kl_coef"),
     (["--ckpt_path"], "ckpt_path")],
)  # fmt: skip
def test_an_option_without_its_value_is_told_alone(options: list[str], key: str, tmp_path: Path) -> None:
    assert early(tmp_path, PLAIN, *options) == {key: "expected a value behind the option, got nothing; give one"}


@pytest.mark.parametrize("words", [["--config"], ["--config="], ["--config", "--model.kl_coef", "0.1"]])
def test_config_without_a_file_is_told_alone(words: list[str]) -> None:
    assert list(wrong_keys(["fit", *words], shipped_signatures())) == ["config"]


@pytest.mark.parametrize(
    ("key", "expected"),
    [("model.policy", "a folder or a hub name"), ("model.reward", "a class, or the dotted path of a function"),
     ("export.folder", "a folder"), ("ckpt_path", "the path of a checkpoint, or last")],
)  # fmt: skip
def test_an_unset_variable_is_told(key: str, expected: str, tmp_path: Path) -> None:
    text = f"expected {expected}, got ''; an unset variable leaves it empty"
    assert early(tmp_path, PLAIN, f"--{key}", "") == early(tmp_path, PLAIN, f"--{key}=") == {key: text}
