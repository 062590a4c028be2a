"""A user's mistake ends the command with one message that names the key and the fix: no traceback, nothing trained."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config, tiny_model
from helpers.cli import changed, in_folder, is_one_message, message, misread, refused, remax, small_config, write_config
from helpers.payloads import RunsCode, fsdp2_folder, lightning_file, zero_folder
from helpers.training import fit, prompt_data, remax_module, save_policy
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from remax_lightning.callbacks import KLMonitor, SampleDump
from remax_lightning.cli_errors import MOVED_NAMES, RENAMED_KEYS, user_error_message
from remax_lightning.config import AdvantageConfig, LossConfig
from remax_lightning.data import LoadingConfig, PromptDataModule
from remax_lightning.errors import UserError, exception_chain
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.modules import WarmupCosine
from remax_lightning.rewards import FunctionReward
from remax_lightning.rollout import PairedEngine, SamplingConfig

Config = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path, policy_path: Path) -> Config:
    return small_config(tmp_path, policy_path)


KEYS = {
    "unknown key of the model": ({"model__kl_coeff": 1}, "model.kl_coeff: there is no such key; did you mean kl_coef?"),
    "unknown key of a group": (
        {"model__advantage__basline": "greedy"},
        "model.advantage.basline: there is no such key; did you mean baseline?",
    ),
    "unknown key of a reward": (
        {"model__reward__init_args__funktion": "f"},
        "model.reward.init_args.funktion: there is no such key; did you mean function?",
    ),
    "unknown key of the optimizer": (
        {"model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lrr": 1e-3}}},
        "model.optimizer.init_args.lrr: there is no such key; did you mean lr?",
    ),
    "unknown key of the strategy": (
        {
            "trainer__strategy": {
                "class_path": "remax_lightning.strategies.ReMaxDeepSpeedStrategy",
                "init_args": {"stagee": 3},
            }
        },
        "trainer.strategy.init_args.stagee: there is no such key; did you mean stage?",
    ),
    "unknown key of the data": ({"data__pathh": "x"}, "data.pathh: there is no such key; did you mean path?"),
    "unknown key of the trainer": (
        {"trainer__max_stepz": 3},
        "trainer.max_stepz: there is no such key; did you mean max_steps?",
    ),
    "unknown key of a callback": (
        {"samples": {"every": 3}},
        "samples.every: there is no such key; the keys are every_n_steps, num_samples, folder",
    ),
    "unknown key at the top": ({"modle": {"kl_coef": 1}}, "modle.kl_coef: there is no such key; did you mean model?"),
    "missing policy": ({"model__policy": ...}, "model.policy.path: missing"),
    "missing reward": ({"model__reward": ...}, "model.reward: missing"),
    "text for a number": ({"model__kl_coef": "high"}, "model.kl_coef: expected a number, got high"),
    "text for a count": ({"data__batch_size": "four"}, "data.batch_size: expected a whole number, got four"),
    "a float for a count": ({"trainer__max_steps": 1e3}, "trainer.max_steps: expected a whole number, got 1000.0"),
    "a fraction": ({"model__sampling__top_k": 1.5}, "model.sampling.top_k: expected a whole number, got 1.5"),
    "an unknown choice": (
        {"model__advantage__baseline": "gredy"},
        "model.advantage.baseline: expected one of 'greedy', 'none', 'batch_mean', 'group_mean', 'leave_one_out', ",
    ),
    "an unknown precision": ({"trainer__precision": "bf17"}, "trainer.precision: expected "),
    "an unknown class": (
        {"model__reward__class_path": "FunctionRewrd"},
        "model.reward: there is no class 'FunctionRewrd'; did you mean FunctionReward?",
    ),
    "an unknown class like none of ours": (
        {"model__reward__class_path": "Xyzzy"},
        "model.reward: there is no class 'Xyzzy'; give a class of remax_lightning, or a path such as my_module.MyClass",
    ),
    "a class of another kind": (
        {"model__reward__class_path": "remax_lightning.SFTModule"},
        "remax_lightning.SFTModule does not correspond to a subclass of Reward",
    ),
    "a module that is not there": (
        {"trainer__callbacks": [{"class_path": "nowhere.Mine"}]},
        (
            "trainer.callbacks.0: cannot import nowhere.Mine: there is no module 'nowhere'; put nowhere.py into the"
            " current folder"
        ),
    ),
    "a class path beside its arguments": (
        {"data__class_path": "PromptDataModule"},
        "data: write the arguments of the class under init_args, beside class_path",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", KEYS)
def test_a_wrong_key_or_value_is_named(
    mistake: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, expected = KEYS[mistake]
    assert expected in misread(changed(config, **values), tmp_path, capsys)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("mistake", ["unknown key of the model", "missing reward", "a module that is not there"])
def test_the_command_ends_with_that_message(
    mistake: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, expected = KEYS[mistake]
    assert expected in message(refused(changed(config, **values), tmp_path, capsys))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.kl_coeff", "3"], "model.kl_coeff: there is no such key; did you mean kl_coef?"),
        (["--model.kl_coef", "abc"], "model.kl_coef: expected a number, got abc"),
        (["--trainer.max_step", "3"], "trainer.max_step: there is no such key; did you mean max_steps?"),
        (["--samples.every", "3"], "samples.every: there is no such key"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_so_it_is_on_the_command_line(
    arguments: list[str], expected: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in misread(config, tmp_path, capsys, *arguments)


NOT_FINITE = {
    "the module": ({"model__kl_coef": float("nan")}, (), "model.kl_coef: must be a finite number, got nan"),
    "a group": ({"model__kl": {"loss_coef": float("inf")}}, (), "model.kl.loss_coef: must be a finite number, got inf"),
    "the optimizer": (
        {"model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": float("inf")}}},
        (),
        "model.optimizer.init_args.lr: must be a finite number, got inf",
    ),
    "a list": (
        {"model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, float("nan")]}}},
        (),
        "model.optimizer.init_args.betas[1]: must be a finite number, got nan",
    ),
    "a callback": ({"collapse__max_kl": float("-inf")}, (), "collapse.max_kl: must be a finite number, got -inf"),
    "the trainer": ({"trainer__gradient_clip_val": float("nan")}, (), "trainer.gradient_clip_val: must be a finite"),
    "free options": (
        {"model__reward__init_args__arguments": {"scales": {"first": float("nan")}}},
        (),
        "model.reward.init_args.arguments.scales.first: must be a finite number, got nan",
    ),
    "the command line": ({}, ("--model.kl_coef", ".nan"), "model.kl_coef: must be a finite number, got nan"),
    "more than a float holds": ({}, ("--model.kl_coef", "1e999"), "model.kl_coef: must be a finite number, got inf"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NOT_FINITE)
def test_numbers_are_finite(case: str, config: Config, tmp_path: Path, capsys: Any) -> None:
    values, arguments, expected = NOT_FINITE[case]
    assert expected in misread(changed(config, **values), tmp_path, capsys, *arguments)


@pytest.mark.slow
def test_all_numbers_that_are_not_finite_are_named(config: Config, tmp_path: Path, capsys: Any) -> None:
    values = {"model__kl_coef": float("nan"), "kl_monitor__stop_kl": float("inf")}
    said = misread(changed(config, **values), tmp_path, capsys)
    assert "model.kl_coef: must be" in said
    assert "kl_monitor.stop_kl: must be" in said


GROUPS = {
    "sampling": SamplingConfig,
    "advantage": AdvantageConfig,
    "loss": LossConfig,
    "rollout": PairedEngine,
    "loading": LoadingConfig,
}


def renamed_keys() -> list[Any]:
    """Every row of the table, under its group of the model: the old key, a value of its kind, the new key."""
    values = {"truncate_log_probs": True, "truncated": "mask", "normaliser": "tokens", "record": False, "keep_slots": 0}
    values["bad_pairs"] = "drop"
    rows = []
    for dotted, new in RENAMED_KEYS.items():
        group, _, old = dotted.partition(".")
        if new in inspect.signature(GROUPS[group]).parameters:
            rows.append(pytest.param(group, old, values[old], new, id=dotted))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("group", "old", "value", "new"), renamed_keys())
@pytest.mark.parametrize("command_line", [False, True])
def test_a_renamed_key_is_refused_with_its_new_name(
    group: str,
    old: str,
    value: Any,
    new: str,
    command_line: bool,
    config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values: Config = {}
    section = f"data.{group}" if group == "loading" else f"model.{group}"
    if group == "rollout":
        values = {"model__rollout": {"class_path": "remax_lightning.rollout.PairedEngine", "init_args": {}}}
        section += ".init_args"
    arguments = [f"--{section}.{old}", str(value).lower()] if command_line else []
    if not command_line:
        values[f"{section.replace('.', '__')}__{old}"] = value
    said = misread(changed(config, **values), tmp_path, capsys, *arguments)
    assert said.strip() == f"{section}.{old}: was renamed; write {section}.{new}"


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("old", MOVED_NAMES)
def test_a_name_that_moved_is_refused_with_its_new_place(
    old: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = MOVED_NAMES[old]
    module, _, name = new.rpartition(".")
    assert importlib.util.find_spec(new if name.islower() else module) is not None
    name = ".Something" if name.islower() else ""
    said = misread(changed(config, model__reward__class_path=f"{old}{name}"), tmp_path, capsys)
    assert f"was moved; write {new}" in said


@pytest.mark.slow
def test_a_function_that_moved_is_refused_with_its_new_place(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = "remax_lightning.tools.dialogues.true_score"
    outcome = refused(changed(config, model__reward__init_args__function=old), tmp_path, capsys)
    assert f"{old} was moved; write remax_lightning.tasks.dialogues.true_score" in message(outcome)


class Beginning:
    """Begins runs without the command: what it makes of a configuration is made here, of the same values."""

    def __init__(self, folder: Path, policy: Path) -> None:
        self.folder, self.policy = folder, str(policy)

    def __call__(self, *, data: Config | None = None, trainer: Config | None = None, **module: Any) -> None:
        """Fit with these options of the data module, the trainer and `ReMaxModule`."""
        options = {"policy": ModelConfig(self.policy), "reference": ModelConfig(self.policy)} | module
        rows = [f"{n}+{n}=" for n in range(16)]
        sizes = {"batch_size": 4, "max_prompt_length": 16} | (data or {})
        prompts = prompt_data(self.folder, self.policy, rows, **sizes)
        fit(remax_module(**({"kl_coef": 0.05} | options)), prompts, self.folder, **(trainer or {}))


VALUES: dict[str, tuple[Callable[[Beginning], Any], str, str]] = {
    "temperature": (lambda _: SamplingConfig(temperature=0), "model.sampling.temperature must be above 0", "got 0"),
    "kl_coef": (lambda begin: begin(kl_coef=-1), "model.kl_coef must be 0 or more", "got -1"),
    "KL to a start that is random": (
        lambda begin: begin(policy=ModelConfig(begin.policy, from_scratch=True), reference=None),
        "model.policy.from_scratch has random weights",
        "set model.reference, or model.kl_coef",
    ),
    "a policy placed like a reference": (
        lambda begin: begin(policy=ModelConfig(begin.policy, placement="cpu")),
        "model.policy.placement must be replicate, got cpu",
        "trainer.strategy",
    ),
    "an adapter of rank 0": (lambda _: LoRAConfig(r=0), "model.policy.lora.r must be at least 1", "got 0"),
    "an adapter that is not there": (
        lambda begin: begin(policy=ModelConfig(begin.policy, lora=LoRAConfig(path="./nowhere"))),
        "model.policy.lora.path: there is no folder './nowhere'",
        "folder or hub name of an adapter",
    ),
    "4 bits that are to be trained": (
        lambda begin: begin(policy=ModelConfig(begin.policy, quantization="nf4")),
        "model.policy.quantization is nf4",
        "set model.policy.lora",
    ),
    "leave-one-out of one": (
        lambda begin: begin(advantage=AdvantageConfig(baseline="leave_one_out")),
        "model.advantage.baseline leave_one_out needs model.sampling.num_samples of at least 2",
        "got 1",
    ),
    "micro-batch that does not divide": (
        lambda begin: begin(data={"micro_batch_size": 3}),
        "data.micro_batch_size must divide data.batch_size 4, got 3",
        "choose a divisor",
    ),
    "accumulation that does not divide": (
        lambda begin: begin(data={"micro_batch_size": 1}, trainer={"accumulate_grad_batches": 3}),
        "trainer.accumulate_grad_batches is 3, but a rollout batch comes in 4 micro-batches",
        "set trainer.accumulate_grad_batches to 4",
    ),
    "several updates without the surrogate": (
        lambda begin: begin(data={"micro_batch_size": 1}, trainer={"accumulate_grad_batches": 2}),
        "makes 2 updates per rollout",
        "model.loss.kind to clipped",
    ),
    "batch larger than the data": (
        lambda begin: begin(data={"batch_size": 64}),
        "data.batch_size=64",
        "lower data.batch_size or give more rows",
    ),
    "no room for the response": (
        lambda begin: begin(sampling=SamplingConfig(max_response_length=250)),
        "data.max_prompt_length 16 + model.sampling.max_response_length 250 is more than the 256 positions",
        "lower one of them",
    ),
    "schedule": (
        lambda begin: begin(lr_scheduler=partial(WarmupCosine, warmup_steps=-1)),
        "model.lr_scheduler.init_args.warmup_steps must be 0 or more",
        "got -1",
    ),
    "callback": (lambda _: SampleDump(every_n_steps=-1), "samples.every_n_steps must be 0 (off) or more", "got -1"),
    "target without control": (lambda _: KLMonitor(target_kl=1.0), "kl_monitor.target_kl", "adaptive: true"),
    "reward function that is not there": (
        lambda begin: begin(reward=FunctionReward("nowhere.score")),
        "model.reward.init_args.function: 'nowhere.score' names the module 'nowhere', and there is none",
        "Put nowhere.py into",
    ),
    "rounded updates": (
        lambda begin: begin(optimizer=partial(torch.optim.AdamW, lr=1e-6), trainer={"precision": "bf16-true"}),
        "model.optimizer.init_args.lr is 1e-06",
        "Set trainer.precision to bf16-mixed",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", VALUES)
def test_values_that_cannot_be_are_refused(mistake: str, policy_path: Path, tmp_path: Path) -> None:
    begin, problem, fix = VALUES[mistake]
    with pytest.raises(UserError) as error:
        begin(Beginning(tmp_path, policy_path))
    assert problem in str(error.value)
    assert fix in str(error.value)


def of_a_range(name: str) -> tuple[str, str]:
    """Return what the command says of a number out of its range, which it tells by its key."""
    problem, fix = VALUES[name][1:]
    return problem.replace(" must", ": must"), fix


BY_COMMAND: dict[str, tuple[Config, str, str]] = {
    "by the range in a group of options": ({"model__sampling__temperature": 0}, *of_a_range("temperature")),
    "by a range of the module": ({"model__kl_coef": -1}, *of_a_range("kl_coef")),
    "by the range in a class inside the module": (
        {"model__lr_scheduler": {"class_path": "WarmupCosine", "init_args": {"warmup_steps": -1}}},
        *of_a_range("schedule"),
    ),
    "by a range of a callback": ({"samples": {"every_n_steps": -1}}, *of_a_range("callback")),
    "by a group of options, beside another value": (
        {"model__kl": {"reference_mixup_alpha": 0.5}},
        "kl.reference_mixup_alpha must be 1.0 unless model.kl.reference_sync_steps is set",
        "got 0.5",
    ),
    "by the data": ({"data__batch_size": 64}, *VALUES["batch larger than the data"][1:]),
    "by the data, of a path that is not there": ({"data__path": ...}, "data.path: missing", "set it in the YAML"),
    "by the data, of a path without a name": (
        {"data__val_path": " "},
        "data.val_path: expected a file",
        "a folder or a hub name, got ' '",
    ),
    "at the start of the run": (
        {"model__sampling__max_response_length": 250},
        *VALUES["no room for the response"][1:],
    ),
    "by the trainer, of the device": ({"trainer__accelerator": "gpu"}, "trainer: ", "gpu"),
    "by the trainer, of the strategy": (
        {"trainer__strategy": "nothing"},
        "trainer.strategy: there is no strategy 'nothing'; give ddp, ReMaxDeepSpeedStrategy or ReMaxFSDP2Strategy",
        "nothing",
    ),
}
"""A value for each place that refuses some."""


@pytest.mark.slow
@pytest.mark.parametrize("place", BY_COMMAND)
def test_the_command_ends_with_what_is_said_of_a_value(
    place: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "device" in place and gpu_is_there():
        pytest.skip("this machine has one")
    values, problem, fix = BY_COMMAND[place]
    said = message(refused(changed(config, **values), tmp_path, capsys))
    assert problem in said
    assert fix in said


@pytest.mark.slow
def test_a_wrong_key_of_a_logger_in_a_list_is_told_alone(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loggers = [{"class_path": "TensorBoardLogger", "init_args": {"save_dirr": "logs"}}, {"class_path": "CSVLogger"}]
    config = changed(config, trainer__logger=loggers, model__reward="tests.none.of_a_user")
    said = message(refused(config, tmp_path, capsys))
    assert "trainer.logger.0.save_dirr: there is no such key; did you mean save_dir?" in said
    assert "trainer.logger: " not in said


def gpu_is_there() -> bool:
    return torch.cuda.is_available()


GOOD = json.dumps({"prompt": "1+1=", "response": "2"}) + "\n"
LONG = json.dumps({"prompt": "9" * 40}) + "\n"
ROWS: dict[str, tuple[str, str | None, list[str]]] = {
    "missing file": ("nowhere.jsonl", None, ["data.path: there is no file", "nowhere.jsonl"]),
    "empty file": ("rows.jsonl", "", ["data.path", "holds no rows"]),
    "broken line": ("rows.jsonl", GOOD * 2 + '{"prompt": \n', ["rows.jsonl, line 3", "not valid JSON"]),
    "not an object": ("rows.jsonl", GOOD + "[1]\n", ["rows.jsonl, line 2", "expected an object"]),
    "missing column": (
        "rows.jsonl",
        GOOD + '{"question": "1"}\n',
        ["line 2", "'prompt' (data.prompt_column)", "'question'"],
    ),
    "prompt of another type": ("rows.jsonl", GOOD + '{"prompt": 3}\n', ["line 2", "column 'prompt' must be text"]),
    "empty prompt": ("rows.jsonl", GOOD + '{"prompt": " "}\n', ["line 2", "is empty"]),
    "short CSV row": ("rows.csv", "prompt,response\n1,2\n3\n", ["rows.csv, row 2", "expected 2 cells, got 1"]),
    "all prompts too long": (
        "rows.jsonl",
        LONG * 9,
        ["data.max_prompt_length=16", "none is left", "raise the limit"],
    ),
    "unknown ending": ("rows.doc", GOOD, ["data.path", "rows.doc"]),
}
"""By mistake: the file, what it holds, and what is said of it."""


@pytest.mark.parametrize("mistake", ROWS)
def test_rows_that_cannot_be_used_name_file_and_line(mistake: str, policy_path: Path, tmp_path: Path) -> None:
    name, text, parts = ROWS[mistake]
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        PromptDataModule(str(tmp_path / name), str(policy_path), val_size=0, batch_size=4, max_prompt_length=16).setup(
            "fit"
        )
    for part in parts:
        assert part in str(error.value)


@pytest.mark.slow
def test_a_prompt_longer_than_the_limit_stops_where_that_is_asked_for(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD * 9 + LONG)
    values = changed(config, data__path="rows.jsonl", data__loading__long_prompts="error", data__val_size=0)
    said = message(refused(values, tmp_path, capsys))
    assert "rows.jsonl, line 10: " in said
    assert "over data.max_prompt_length=16" in said
    assert "data.loading.long_prompts: drop" in said


def saved_tokenizer(folder: Path, **absent: None) -> str:
    """The path of a policy whose tokenizer lacks a special token."""
    tiny_model("llama").save_pretrained(folder)
    tokenizer = make_tokenizer()
    for name, value in absent.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "fix"),
    [
        ("eos_token", "has no end-of-sequence token, so no response could ever end; save it with an eos_token"),
        ("pad_token", "has no pad token; save it with one, or set data.loading.pad_token: eos"),
    ],
)
def test_a_tokenizer_without_its_tokens(
    token: str, fix: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved_tokenizer(tmp_path / "policy", **{token: None})
    said = message(refused(changed(config, model__policy__path=path), tmp_path, capsys))
    assert said.startswith("model.policy.path: ")  # which the user has set, and the tokenizer follows
    assert fix in said


@pytest.mark.slow
def test_the_advice_on_the_pad_token_works(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved_tokenizer(tmp_path / "policy", pad_token=None)
    values = changed(config, model__policy__path=path, model__reference__path=path, data__loading__pad_token="eos")
    with in_folder(tmp_path):
        outcome = remax(capsys, "fit", "--config", write_config(tmp_path / "run.yaml", values))
    assert outcome.code == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["policy", "reference"])
def test_a_model_that_is_not_there(
    name: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = changed(config, **{f"model__{name}__path": "./nowhere"})
    said = message(refused(values, tmp_path, capsys))
    assert "there is no folder './nowhere'" in said
    assert said.startswith(f"model.{name}.path: ")


@pytest.mark.slow
def test_vocabularies_that_differ(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama", vocab_size=100).save_pretrained(tmp_path / "other")
    said = message(refused(changed(config, model__reference__path=str(tmp_path / "other")), tmp_path, capsys))
    assert said.startswith("model.reference ")
    assert "a vocabulary of 100" in said
    assert "one of 96" in said


@pytest.mark.slow
def test_a_reward_model_with_two_labels(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    settings = tiny_config("llama")
    settings.num_labels = 2
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    reward = {"path": str(tmp_path / "reward"), "template": "{prompt}{response}"}
    values = changed(config, model__reward={"class_path": "ClassifierReward", "init_args": reward})
    said = message(refused(values, tmp_path, capsys))
    assert said.startswith("model.reward.init_args.path: expected a reward model with one label")
    assert "2 labels" in said


REWARDS = """
def nan(prompts, responses, rows): return [float("nan")] * len(responses)
def too_few(prompts, responses, rows): return [0.0] * (len(responses) - 1)
def raises(prompts, responses, rows): raise KeyError("gold")
calls = []
def nan_later(prompts, responses, rows):
    calls.append(1)
    return [float("nan") if len(calls) > 2 else 0.5] * len(responses)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("nan", "returned nan at index 0"),
        ("too_few", "returned scores of shape [7]; expected 8 finite numbers"),
        ("raises", "raised KeyError: 'gold'"),
        ("nan_later", "returned nan at index 0"),
    ],
)
def test_a_reward_that_fails_stops_the_run_and_shows_the_prompt(
    function: str, problem: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_rewards.py").write_text(REWARDS)
    values = changed(config, model__reward__init_args__function=f"broken_rewards.{function}", trainer__max_steps=8)
    values = changed(values, data__val_size=0)
    sys.modules.pop("broken_rewards", None)
    try:
        said = message(refused(values, tmp_path, capsys))
    finally:
        sys.modules.pop("broken_rewards", None)
    assert said.startswith(f"model.reward: FunctionReward(broken_rewards.{function})")
    assert problem in said
    assert "prompt 0" in said


@pytest.mark.slow
@pytest.mark.parametrize("subcommand", ["fit", "validate", "predict"])
def test_a_checkpoint_that_is_not_there(
    subcommand: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = refused(config, tmp_path, capsys, "--ckpt_path", "nowhere.ckpt", subcommand=subcommand)
    assert "ckpt_path: there is no checkpoint 'nowhere.ckpt'" in message(outcome)
    assert not (tmp_path / "runs").exists()
    outcome = refused(config, tmp_path, capsys, "--ckpt_path", "best", subcommand=subcommand)
    assert message(outcome).startswith("ckpt_path: best is known only to a trainer that has trained; give")


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (
        lambda file: lightning_file(file, callbacks=RunsCode(file.with_name("mark"))),
        "holds code (posix.system)",
    ),
    "code in ZeRO's files": (
        lambda path: torch.save(RunsCode(path.with_name("mark")), zero_folder(path, 2) / "checkpoint" / "more.pt"),
        "holds code (posix.system)",
    ),
    "code in FSDP2's table": (
        lambda path: (fsdp2_folder(path) / ".metadata").write_bytes(pickle.dumps(RunsCode(path.with_name("mark")))),
        "holds code (posix.system)",
    ),
    "empty": (lambda file: file.touch(), "cannot be read: it is not a checkpoint, or an incomplete one"),
    "truncated": (
        lambda file: file.write_bytes(lightning_file(file).read_bytes()[:-40]),
        "cannot be read: it is not a checkpoint, or an incomplete one",
    ),
    "foreign": (lambda file: torch.save({"weight": torch.ones(2)}, file), "is no checkpoint of a run"),
    "of another model": (lambda file: lightning_file(file), "is of another model than that of this configuration"),
}


@pytest.mark.slow
@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("mistake", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used_is_named_and_runs_no_code(
    mistake: str, subcommand: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, problem = CHECKPOINTS[mistake]
    make(tmp_path / "a.saved")
    outcome = refused(config, tmp_path, capsys, "--ckpt_path", "a.saved", subcommand=subcommand)
    said = message(outcome)
    assert said.startswith("ckpt_path: 'a.saved")
    assert problem in said
    assert said.count("\n") == 1
    assert "weights_only" not in outcome.err
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow
def test_a_checkpoint_of_the_web_is_refused(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = refused(config, tmp_path, capsys, "--ckpt_path", "http://127.0.0.1:9/a.ckpt")
    assert "ckpt_path: 'http://127.0.0.1:9/a.ckpt' is an address; download it" in message(outcome)


@pytest.mark.slow
def test_a_checkpoint_of_another_family_or_optimizer_is_refused(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_folder(tmp_path):
        path = write_config(tmp_path / "first.yaml", changed(config, trainer__max_steps=1))
        assert remax(capsys, "fit", "--config", path).code == 0
        [file] = (tmp_path / "runs").rglob("*.ckpt")
        shutil.copy(file, tmp_path / "mine.saved")
        shutil.rmtree(tmp_path / "runs")
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    arguments = ("--ckpt_path", "mine.saved")
    said = message(refused(changed(config, model__optimizer=optimizer), tmp_path, capsys, *arguments))
    assert "mine.saved' holds the state of another optimizer than model.optimizer, SGD: they differ in" in said
    other = save_policy(tmp_path / "other", "gpt2")
    values = changed(config, model__policy__path=other, model__reference__path=other)
    for subcommand in ("fit", "test"):
        said = message(refused(values, tmp_path, capsys, *arguments, subcommand=subcommand))
        assert "mine.saved' is of another model than that of this configuration: it lacks " in said
    content = torch.load(tmp_path / "mine.saved", weights_only=True)
    del content["optimizer_states"], content["lr_schedulers"]
    torch.save(content, tmp_path / "mine.saved")
    said = message(refused(config, tmp_path, capsys, *arguments))
    assert "mine.saved' holds weights alone (save_weights_only: true), so training cannot resume from it" in said


@pytest.mark.slow
def test_validation_without_rows_for_it(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = refused(changed(config, data__val_size=0), tmp_path, capsys, subcommand="validate")
    assert "data.val_path must name the rows to validate on" in message(outcome)


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], "the subcommand is missing"), (["--config", "run.yaml"], "is missing")]
)
def test_a_subcommand_is_needed(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = remax(capsys, *arguments)
    assert outcome.code == 2
    assert expected in message(outcome)
    assert "remax --help" in outcome.err


EXITS = {
    "in a callback": "class Stops(Callback):\n    def on_fit_start(self, *_):\n        sys.exit({code})\n",
    "in a constructor": "class Stops(Callback):\n    def __init__(self):\n        exit({code})\n",
    "on import": "sys.exit({code})\nclass Stops(Callback): pass\n",
    "at once": "from os import _exit\nclass Stops(Callback):\n    def on_fit_start(self, *_):\n        _exit({code})\n",
}


DATA = """
import os, sys
from my_data import SquarePrompts
from torch.utils.data import DataLoader

class Rows(list):
    def __getitem__(self, index):
        {row}
        return super().__getitem__(index)

class Mine(SquarePrompts):
    def setup(self, stage):
        {setup}

    def train_dataloader(self):
        return DataLoader(Rows(self.rows), self.batch_size, collate_fn=self.collate, num_workers={workers})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("place", "workers", "body", "expected"), [
    ("setup", 0, "sys.exit(0)", "my_exiting_data.py, line 13, in setup: sys.exit() ended the run (exit code 0)"),
    ("row", 0, "sys.exit(3)", "my_exiting_data.py, line 8, in __getitem__: sys.exit() ended the run (exit code 3)"),
    ("setup", 0, "os._exit(0)", "my_exiting_data.py, line 13, in setup: os._exit() ended the run (exit code 0)"),
    ("row", 0, "os._exit(0)", "my_exiting_data.py, line 8, in __getitem__: os._exit() ended the run (exit code 0)"),
    ("row", 1, "sys.exit(0)", "data: a worker of the data loader exited unexpectedly: code of a dataset called"),
    ("row", 1, "os._exit(0)", "data: a worker of the data loader exited unexpectedly: code of a dataset called"),
    ("row", 1, "raise KeyboardInterrupt", "data: a worker of the data loader exited unexpectedly: code of a dataset"),
])  # fmt: skip
def test_an_exit_in_data_of_the_users_is_no_success(
    place: str, workers: int, body: str, expected: str, config: Config, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # A worker that ends with code 0 shows when the loader looks for it: every 5 seconds.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    bodies = {"setup": "pass", "row": "pass", place: body}
    (tmp_path / "my_exiting_data.py").write_text(DATA.format(workers=workers, **bodies))
    sys.modules.pop("my_exiting_data", None)
    policy = config["model"]["policy"]["path"]
    values = config | {"data": {"class_path": "my_exiting_data.Mine", "init_args": {"tokenizer": policy}}}
    with in_folder(tmp_path, plugins=True):
        outcome = remax(capsys, "fit", "--config", write_config(tmp_path / "run.yaml", values))
    assert outcome.code == 2
    assert is_one_message(outcome)
    assert expected in message(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize("place", EXITS)
def test_sys_exit_in_a_users_code_is_no_success(
    place: str, code: int, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "import sys\nfrom lightning.pytorch import Callback\n" + EXITS[place].format(code=code)
    (tmp_path / "my_exits.py").write_text(source)
    sys.modules.pop("my_exits", None)
    values = changed(config, trainer__callbacks=[{"class_path": "my_exits.Stops"}])
    said = message(refused(values, tmp_path, capsys))
    assert "my_exits.py, line " in said
    function = "os._exit()" if place == "at once" else "sys.exit()"
    assert f"{function} ended the run (exit code {code})" in said


def test_a_ring_of_exceptions_ends() -> None:
    """As TensorBoard's writer makes one on a full disk, which raises the same object again and again."""
    full, failed = OSError(28, "No space left on device"), RuntimeError("the writer has failed")
    full.__context__, failed.__cause__ = failed, full
    assert user_error_message(full) is None
    assert list(exception_chain(full)) == [full, failed]
    failed.__cause__, failed.__context__ = None, UserError("the key is wrong")
    failed.__context__.__context__ = failed
    assert user_error_message(full) == "the key is wrong"


@pytest.mark.slow
def test_a_fault_of_ours_is_one_line_and_a_file_with_the_traceback(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from remax_lightning.training import objective

    monkeypatch.setattr(objective, "remax_advantages", None)
    with in_folder(tmp_path):
        outcome = remax(capsys, "fit", "--config", write_config(tmp_path / "run.yaml", config))
    assert outcome.code == 1
    assert is_one_message(outcome)
    assert "bug of remax-lightning" in message(outcome)
    assert "remax_lightning/" in message(outcome)
    [path] = tmp_path.rglob("traceback.txt")
    assert str(path) in message(outcome)
    assert "Traceback (most recent call last)" in path.read_text()
    assert "not callable" in path.read_text()


@pytest.mark.slow
def test_the_command_itself_ends_with_code_2_and_one_message(config: Config, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", changed(config, model__kl_coef=-1))
    command = [sys.executable, "-c", "from remax_lightning.cli import main; main()", "fit", "--config", path]
    python_path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": python_path}
    )
    assert ended.returncode == 2
    [line] = [line for line in ended.stderr.splitlines() if "error" in line]
    assert line.startswith("remax: error: model.kl_coef: must be 0 or more, got -1")
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "runs").exists()
