"""Mistakes of all kinds, each as a whole command: it ends with one message that names the place, and with code 2."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import changed, in_folder, message, refused, remax, small_config, write_config

Config = dict[str, Any]
Make = Callable[[Path, Path], Config]
"""Prepares files in a folder, or changes the policy's, and returns what the configuration sets."""


def edit(file: Path, **values: Any) -> None:
    """Change keys of a JSON file; Ellipsis takes one out."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def rows(*lines: Any, name: str = "d.jsonl") -> Make:
    """A data file of these lines: text, or rows."""

    def make(folder: Path, _: Path) -> Config:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / name).write_text(text)
        return {"data__path": name, "data__val_size": 0, "data__batch_size": 1}

    return make


def written(name: str, content: bytes, key: str = "data__path") -> Make:
    def make(folder: Path, _: Path) -> Config:
        (folder / name).write_bytes(content)
        return {key: name}

    return make


def reward(body: str) -> Make:
    """A module of the user's own, with what stands under `f` as the reward function."""

    def make(folder: Path, _: Path) -> Config:
        (folder / "my_mistakes.py").write_text(body)
        return {"model__reward__init_args__function": "my_mistakes.f"}

    return make


def callback(class_path: str, **arguments: Any) -> Make:
    return lambda *_: {"trainer__callbacks": [{"class_path": class_path, "init_args": arguments}]}


def changes(**values: Any) -> Make:
    return lambda *_: values


def reward_model(folder: Path, policy: Path) -> Config:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(policy, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "scorer")
    for file in policy.glob("token*"):
        shutil.copy(file, folder / "scorer")
    return {"model__policy__path": "./scorer"}


def without_eos(_: Path, policy: Path) -> Config:
    edit(policy / "tokenizer_config.json", eos_token=...)
    (policy / "special_tokens_map.json").unlink(missing_ok=True)
    return {}


def negative_eos(_: Path, policy: Path) -> Config:
    (policy / "generation_config.json").write_text('{"eos_token_id": [2, -5]}')
    return {}


def index_of_shards(text: str) -> Make:
    def make(_: Path, policy: Path) -> Config:
        (policy / "model.safetensors").unlink()
        (policy / "model.safetensors.index.json").write_text(text)
        return {}

    return make


def checkpoint(**content: Any) -> Make:
    def make(folder: Path, _: Path) -> Config:
        torch.save(content, folder / "a.saved")
        return {"ckpt_path": "a.saved"}

    return make


SCORES = "def f(prompts, responses, rows): "
MISTAKES: dict[str, tuple[Make, str]] = {
    "a reward model as policy": (reward_model, "model.policy.path: './scorer' lacks 1 weights of LlamaForCausalLM ("),
    "no end-of-sequence token": (without_eos, "has no end-of-sequence token"),
    "a negative one": (negative_eos, "model.policy.path: eos_token_id in generation_config.json must be a token's num"),
    "an index that is a list": (index_of_shards("[]"), "model.policy.path: cannot load"),
    "an index without its files": (
        index_of_shards('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}'),
        "model.policy.path: cannot load",
    ),
    "a file as policy": (written("w", b"x", "model__policy__path"), "model.policy.path: no tokenizer could be loaded "),
    "data in binary": (written("d.jsonl", bytes(range(256))), "d.jsonl, line 1: not valid JSON"),
    "a folder as data": (lambda folder, _: {"data__path": str(folder)}, "data.path: "),
    "no rows": (rows(), "data.path: d.jsonl holds no rows"),
    "a wrong column": (rows({"q": "a"}), "d.jsonl, line 1: there is no column 'prompt'"),
    "a number as prompt": (rows({"prompt": 1}), "d.jsonl, line 1: column 'prompt' must be text or messages, got int"),
    "a prompt twice": (rows('{"prompt": "a", "prompt": "b"}'), "d.jsonl, line 1: column 'prompt' stands twice"),
    "an exception that is none": (
        reward(f"class X(BaseException): pass\n{SCORES}raise X('why')"),
        "f (",
    ),
    "a signature": (reward("def f(): return 1"), "model.reward.init_args.function: my_mistakes.f must take (prompts"),
    "a generator": (reward("def f(prompts, responses, rows):\n    yield 1.0"), "returned a generator"),
    "complex numbers": (reward(f"{SCORES}return [1j] * len(responses)"), "returned '1j' (a complex) at index 0"),
    "a syntax error": (reward("def f(:"), "model.reward.init_args.function: importing the module 'my_mistakes' failed"),
    "a callback that tunes": (
        callback("lightning.pytorch.callbacks.BatchSizeFinder"),
        "trainer.callbacks.0.class_path: expected ",
    ),
    "a monitor's mode": (
        callback("lightning.pytorch.callbacks.ModelCheckpoint", monitor="val/reward", mode="best"),
        "`mode` can be min, max but got best",
    ),
    "an unknown argument": (
        callback("lightning.pytorch.callbacks.EarlyStopping", monitorr="x"),
        "trainer.callbacks.0.init_args.monitorr: there is no such key; did you mean monitor?",
    ),
    "a stage of ZeRO": (
        changes(trainer__strategy={"class_path": "remax_lightning.strategies.ReMaxDeepSpeedStrategy",
                                   "init_args": {"stage": 9}}),
        "trainer.strategy.init_args.stage: expected a stage of ZeRO from 0 to 3, got 9",
    ),
    "a name of files": (
        callback("lightning.pytorch.callbacks.ModelCheckpoint", filename="{step:zz}", every_n_train_steps=1),
        "trainer.callbacks.0.init_args.filename: expected a name with figures in braces",
    ),
    "no such accelerator": (changes(trainer__accelerator="gpu"), "trainer: No supported gpu backend found!"),
    "a dtype": (changes(model__policy__dtype="fp8"), "model.policy.dtype: expected one of"),
    "a negative length": (changes(model__sampling__max_response_length=-4), "model.sampling.max_response_length: must"),
    "a batch beyond the data": (changes(data__batch_size=10**12), "data.batch_size=1000000000000"),
    "no adapter's target": (
        changes(model__policy__lora={"r": 2, "target_modules": ["nothing"]}),
        "model.policy.lora: cannot adapt LlamaForCausalLM",
    ),
    "nobody who scores": (
        changes(model__reward={"class_path": "HTTPReward", "init_args": {"url": "http://127.0.0.1:9/", "retries": 0}}),
        "model.reward: HTTPReward(http://127.0.0.1:9/) gave no scores",
    ),
    "a checkpoint without a step": (
        checkpoint(state_dict={}, global_step="x", **{"pytorch-lightning_version": "2.6.0"}),
        "ckpt_path: 'a.saved' cannot be read",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_message(
    mistake: str, tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = MISTAKES[mistake]
    policy = Path(shutil.copytree(policy_path, tmp_path / "policy"))
    config = small_config(tmp_path, policy)
    values = make(tmp_path, policy)
    sys.modules.pop("my_mistakes", None)
    try:
        said = message(refused(changed(config, **values), tmp_path, capsys))
    finally:
        sys.modules.pop("my_mistakes", None)
    assert expected in said
    assert "bug of remax-lightning" not in said


TOOLS: dict[str, tuple[list[str], str]] = {
    "export of nothing": (["export", "nowhere.ckpt", "out"], "checkpoint: 'nowhere.ckpt' does not exist"),
    "export of a binary file": (["export", "binary", "out"], "checkpoint: 'binary' cannot be read"),
    "export onto its source": (["export", "binary", "binary"], "out must be a new folder"),
    "export with deep YAML": (
        ["export", "a.saved", "out", "--config", "deep"],
        "'deep' cannot be read: deep, line 1",
    ),
    "report of a file": (["report", "binary"], "RUN: binary is a file; expected the folder of a run"),
    "report of an empty folder": (["report", "empty"], "RUN: empty is not a run"),
    "comparison of folders": (["compare", "empty", "empty"], "empty must hold one evaluation.json, got none"),
    "comparison of deep JSON": (["compare", "deep.json", "deep.json"], "is not an evaluation of `remax test`"),
    "an unknown option": (["demo", "--nope"], "unrecognized arguments: --nope"),
    "text for a number": (["plan", "--memory", "lots"], "argument --memory: invalid float value: 'lots'"),
}


@pytest.mark.parametrize("mistake", TOOLS)
def test_a_tools_mistake_ends_with_one_message(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = TOOLS[mistake]
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for name in ("deep", "deep.json", "deep.jsonl"):
        (tmp_path / name).write_text("[" * 3000)
    torch.save({"state_dict": {"policy.a": torch.ones(2)}, "global_step": 1}, tmp_path / "a.saved")
    with in_folder(tmp_path):
        outcome = remax(capsys, *arguments)
    assert outcome.code == 2
    assert outcome.err.count("error: ") == 1
    assert expected in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_paths_and_precisions_that_are_rare_are_no_mistakes(
    tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "Übung 数据\u202e"
    folder.mkdir()
    policy = shutil.copytree(policy_path, folder / "policy")
    config = changed(small_config(folder, policy), trainer__precision="64-true")
    with in_folder(tmp_path):
        outcome = remax(capsys, "fit", "--config", write_config(tmp_path / "run.yaml", config))
    assert outcome.code == 0, outcome.err
    assert (folder / "runs" / "remax" / "version_0" / "policy").is_dir()
