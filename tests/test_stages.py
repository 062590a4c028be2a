"""The three stages by the command alone, from one file of preferences, and what it says of mistakes on the way."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tokenizer, tiny_config
from helpers.cli import changed, in_folder, message, refused, remax, write_config
from helpers.reward_models import save_classifier
from helpers.training import write_rows

from remax_lightning.evaluation.intervals import mean_figure
from remax_lightning.rewards import ClassifierReward
from remax_lightning.tasks.addition import policy_config
from remax_lightning.tasks.dialogues import train_tokenizer

Config = dict[str, Any]
START = "\n\nHuman: what is {n}+{n}?\n\nAssistant:"
PAIRS = [{"chosen": START.format(n=n) + f" {2 * n}", "rejected": START.format(n=n) + " no idea"} for n in range(60)]
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "max_steps": 2,
    "val_check_interval": 2,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
PAGE = (Path(__file__).parents[1] / "docs" / "stages.md").read_text()
LOADING = {"stage_split": [2, 4, 4]}


def trainer(folder: Path) -> Config:
    return {**TRAINER, "logger": {"init_args": {"save_dir": str(folder / "runs")}}}


def data(kind: str, path: str, **options: Any) -> Config:
    common = {"path": path, "val_size": 4, "batch_size": 4, "max_prompt_length": 64, "loading": LOADING}
    return {"class_path": kind, "init_args": common | options}


def reward_config(folder: Path, model: Path | str, path: str) -> Config:
    return {
        "trainer": trainer(folder),
        "model": {"class_path": "RewardModelModule", "init_args": {"reward_model": {"path": str(model)}}},
        "data": data("PreferenceDataModule", path, max_length=128),
        "export": {"folder": str(folder / "reward"), "monitor": "val/accuracy"},
    }


@pytest.mark.slow
def test_from_preferences_to_an_aligned_policy(
    tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "hh.jsonl", PAIRS)
    policy = {"path": str(policy_path)}
    first = {
        "trainer": trainer(tmp_path),
        "model": {"class_path": "SFTModule", "init_args": {"policy": policy, "packing": True}},
        "data": data("SFTDataModule", path, response_column="chosen", max_response_length=32),
        "export": {"folder": str(tmp_path / "sft"), "monitor": "val/perplexity", "mode": "min"},
    }
    second = reward_config(tmp_path, tmp_path / "sft" / "best", path)
    third = {
        "trainer": trainer(tmp_path),
        "model": {
            "policy": {"path": str(tmp_path / "sft" / "best")},
            "reference": {"path": str(tmp_path / "sft" / "best")},
            "reward": {"class_path": "ClassifierReward", "init_args": {"path": str(tmp_path / "reward" / "best")}},
            "sampling": {"max_response_length": 4},
        },
        "data": data("PromptDataModule", path),
        "export": {"folder": str(tmp_path / "aligned")},
    }
    with in_folder(tmp_path):
        for number, config in enumerate((first, second, third)):
            ended = remax(capsys, "fit", "--config", write_config(tmp_path / f"{number}.yaml", config))
            assert ended.code == 0, ended.err
        config = str(tmp_path / "1.yaml")
        again = remax(capsys, "validate", "--config", config, "--model.init_args.tokenizer", str(policy_path))
        assert again.code == 0, again.err
        written = remax(capsys, "predict", "--config", config, "--predictions.path", "scores.jsonl")
        assert written.code == 0, written.err
    assert (tmp_path / "aligned" / "best" / "model.safetensors").exists()
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 4
    assert {"chosen_reward", "rejected_reward", "prompt"} <= set(scores[0])
    reward = ClassifierReward(str(tmp_path / "reward" / "best"))
    reward.load(torch.device("cpu"))
    assert reward._text_template == "{prompt}{response}{eos}"


@pytest.mark.slow
def test_the_yaml_of_the_docs_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second, third, deepspeed_chat = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for texts in ([second], [third], [third, deepspeed_chat]):
        arguments = []
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.yaml").write_text(text)
            arguments += ["--config", str(tmp_path / f"{number}.yaml")]
        printed = remax(capsys, "fit", *arguments, "--print_config")
        assert printed.code == 0, printed.err
        assert yaml.safe_load(printed.out)["data"]["init_args"]["loading"]["stage_split"] == [2, 4, 4]


@pytest.fixture
def config(tmp_path: Path, policy_path: Path) -> Config:
    return reward_config(tmp_path, policy_path, write_rows(tmp_path / "pairs.jsonl", PAIRS))


def with_pairs(*pairs: Any, **values: Any) -> Callable[[Config, Path], Config]:
    def change(config: Config, folder: Path) -> Config:
        path = write_rows(folder / "pairs.jsonl", [PAIRS[0], *pairs])
        return changed(
            config,
            **{"data__init_args__path": path, "data__init_args__loading": {}, "data__init_args__val_size": 0, **values},
        )

    return change


def with_classifier(**options: Any) -> Callable[[Config, Path], Config]:
    def change(config: Config, folder: Path) -> Config:
        path = save_classifier(folder / "start", tiny_config("llama"), make_tokenizer(), **options)
        return changed(config, model__init_args__reward_model__path=path)

    return change


def mixed(config: Config, folder: Path) -> Config:
    """The tokenizer of another model: the same size, other numbers."""
    shutil.copytree(config["model"]["init_args"]["reward_model"]["path"], folder / "other")
    file = folder / "other" / "tokenizer.json"
    description = json.loads(file.read_text())
    numbers = description["model"]["vocab"]
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
    file.write_text(json.dumps(description))
    return changed(config, model__init_args__tokenizer=str(folder / "other"))


def broken(config: Config, folder: Path) -> Config:
    """A reward model of DeepSpeed-Chat whose head scores three things."""
    save_classifier(folder / "start", tiny_config("llama"), make_tokenizer())
    (folder / "start" / "model.safetensors").unlink()
    weights = {"v_head.weight": torch.zeros(3, 32), "rwtranrsformer.norm.weight": torch.zeros(32)}
    torch.save(weights, folder / "start" / "pytorch_model.bin")
    model = {"path": str(folder / "start"), "allow_pickle": True}
    return changed(config, model__init_args__reward_model=model)


EQUAL = {"prompt": "1+1=", "chosen": "2", "rejected": "2"}
MISTAKES: dict[str, tuple[Callable[[Config, Path], Config], list[str]]] = {
    "equal sides": (with_pairs(EQUAL), ["pairs.jsonl, line 2: 'chosen' and 'rejected' are equal"]),
    "no common prompt": (
        with_pairs({"chosen": START.format(n=1) + " 2", "rejected": START.format(n=2) + " 4"}),
        ["pairs.jsonl, line 2: ", "the transcripts do not share a prompt"],
    ),
    "empty prompt": (
        with_pairs({"prompt": " ", "chosen": "a", "rejected": "b"}),
        ["pairs.jsonl, line 2: the prompt in column 'prompt' is empty"],
    ),
    "long prompt": (
        with_pairs(
            {"prompt": "1" * 90, "chosen": "a", "rejected": "b"}, data__init_args__loading={"long_prompts": "error"}
        ),
        ["pairs.jsonl, line 2: 91 tokens, over data.max_prompt_length=64"],
    ),
    "missing column": (
        with_pairs({"prompt": "1", "chosen": "a"}),
        ["pairs.jsonl, line 2: there is no column 'rejected' (data.pair_columns.rejected); the columns are"],
    ),
    "missing margin": (
        with_pairs(data__init_args__pair_columns={"margin": "gap"}),
        ["pairs.jsonl, line 1: there is no column 'gap' (data.pair_columns.margin)"],
    ),
    "more than one label": (with_classifier(num_labels=2), ["model.reward_model.path: ", "a head for 2 labels"]),
    "a head of the wrong shape": (
        broken,
        ["model.reward_model.path: ", "pytorch_model.bin: expected v_head.weight of shape [1, D]", "got [3, 32]"],
    ),
    "mixed tokenizers": (mixed, ["model.tokenizer ", "is not the one of model.reward_model", "2 tokens have other"]),
    "shares that are none": (
        lambda config, folder: changed(config, data__init_args__loading={"stage_split": [2, 0, 4]}),
        ["data.loading.stage_split leaves nothing for PreferenceDataModule, got [2, 0, 4]"],
    ),
    "two shares": (
        lambda config, folder: changed(config, data__init_args__loading={"stage_split": [2, 4]}),
        ["data.loading.stage_split: "],
    ),
    "a margin below 0": (
        lambda config, folder: changed(config, model__init_args__margin=-1.0),
        ["model.margin: must be 0 or more, got -1.0"],
    ),
    "an unknown key": (
        lambda config, folder: changed(config, model__init_args__centring_coef=0.1),
        ["model.centring_coef: there is no such key; did you mean centering_coef?"],
    ),
    "a model that is not there": (
        lambda config, folder: changed(config, model__init_args__reward_model__path="./nowhere"),
        ["there is no folder './nowhere'"],
    ),
    "longer than the model": (
        lambda config, folder: changed(config, data__init_args__max_length=300),
        ["data.max_length 300 is more than the 256 positions that the reward model has"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_the_command_with_one_message(
    mistake: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing trained, nothing overwritten: an earlier reward model stays."""
    change, parts = MISTAKES[mistake]
    earlier = tmp_path / "reward" / "best"
    earlier.mkdir(parents=True)
    for name in ("config.json", "kept"):
        (earlier / name).touch()
    said = message(refused(change(config, tmp_path), tmp_path, capsys))
    for part in parts:
        assert part in said
    assert sorted(path.name for path in (tmp_path / "reward").rglob("*")) == ["best", "config.json", "kept"]


# On real text, where GSM8K is at hand: a reward model of solutions that were right or wrong.

GSM8K = Path(os.environ.get("REMAX_GSM8K", Path(__file__).parents[2] / "shared" / "data" / "gsm8k"))
SOLUTIONS = GSM8K / "example_model_solutions.jsonl"
HELD_OUT = 200


def gsm8k_pairs() -> list[list[dict[str, str]]]:
    """For each question pairs of solutions by language models, one with the right answer and one with a wrong one."""
    found = []
    for line in SOLUTIONS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by: dict[bool, list[str]] = defaultdict(list)
        for solution in row.values():
            if isinstance(solution, dict):
                by[solution["is_correct"]].append(" " + solution["solution"])
        prompt = f"Question: {row['question']}\nSolution:"
        pairs = [{"prompt": prompt, "chosen": a, "rejected": b} for a in by[True] for b in by[False] if a != b]
        found += [pairs] if pairs else []
    random.Random(0).shuffle(found)
    return found


def gsm8k_stages(folder: Path, path: str) -> Iterator[dict[str, Any]]:
    """The configurations, one after the other."""
    common = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    common |= {"limit_val_batches": 0, "max_epochs": 100, "gradient_clip_val": 1.0}
    common |= {"logger": {"init_args": {"save_dir": str(folder / "logs")}}}
    limits = {"max_prompt_length": 200, "loading": {"stage_split": [2, 6, 2]}}
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2.0e-3}}
    yield {
        "trainer": common | {"max_steps": 60},
        "model": {
            "class_path": "SFTModule",
            "init_args": {"policy": {"path": str(folder / "policy"), "from_scratch": True}, "optimizer": adamw},
        },
        "data": {
            "class_path": "SFTDataModule",
            "init_args": {
                "path": path,
                "response_column": "chosen",
                "batch_size": 16,
                "max_response_length": 300,
                **limits,
            },
        },
        "export": {"folder": str(folder / "sft"), "best": False},
    }
    yield {
        "trainer": common | {"max_steps": 250},
        "model": {
            "class_path": "RewardModelModule",
            "init_args": {
                "reward_model": {"path": str(folder / "sft/last")},
                "optimizer": adamw | {"init_args": {"lr": 1.0e-3, "weight_decay": 0.1}},
                "lr_scheduler": {"class_path": "WarmupCosine", "init_args": {"warmup_steps": 20}},
                "normalize": False,
            },
        },
        "data": {
            "class_path": "PreferenceDataModule",
            "init_args": {"path": path, "batch_size": 16, "max_length": 500, **limits},
        },
        "export": {"folder": str(folder / "reward"), "best": False},
    }
    yield {
        "trainer": common | {"max_steps": 2},
        "model": {
            "policy": {"path": str(folder / "sft/last")},
            "reference": {"path": str(folder / "sft/last")},
            "reward": {"class_path": "ClassifierReward", "init_args": {"path": str(folder / "reward/last")}},
            "sampling": {"max_response_length": 32},
        },
        "data": {"class_path": "PromptDataModule", "init_args": {"path": path, "batch_size": 4, **limits}},
        "export": {"folder": str(folder / "aligned"), "best": False},
    }


@pytest.mark.slow(50)
@pytest.mark.skipif(not SOLUTIONS.exists(), reason=f"there is no {SOLUTIONS}; REMAX_GSM8K names another folder")
def test_a_reward_model_tells_right_solutions_from_wrong_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    """Better than chance on questions that it has not seen, with a model of a fifth of a million weights.

    It does not check the sums, and is not said to: right and wrong solutions are also told by how they are written, how
    long they are and which model seems to have written them.
    """
    pairs = gsm8k_pairs()
    train = [pair for question in pairs[HELD_OUT:] for pair in question]
    path = write_rows(tmp_path / "preferences.jsonl", train)
    tokenizer = train_tokenizer((text for pair in train for text in pair.values()), vocab_size=1024, longest=512)
    tokenizer.save_pretrained(tmp_path / "policy")
    config = policy_config(tokenizer)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 128, 2
    config.head_dim = 16
    config.save_pretrained(tmp_path / "policy")
    with in_folder(tmp_path):
        for number, stage in enumerate(gsm8k_stages(tmp_path, path)):
            ended = remax(capsys, "fit", "--config", write_config(tmp_path / f"{number}.yaml", stage))
            assert ended.code == 0, ended.err
    reward = ClassifierReward(str(tmp_path / "reward/last"), batch_size=64)
    reward.load(torch.device("cpu"))
    right = []
    for question in pairs[:HELD_OUT]:
        prompts = [pair["prompt"] for pair in question]
        chosen, rejected = (
            reward.score(prompts, [p[side] for p in question], [{}] * len(question)) for side in ("chosen", "rejected")
        )
        right.append((chosen > rejected).float().tolist())
    accuracy = mean_figure(right, 1000)
    record_property("accuracy", accuracy._asdict())
    print(f"accuracy on held-out questions: {accuracy}")
    assert accuracy.low is not None
    assert accuracy.low > 0.5
    assert (tmp_path / "aligned/last/model.safetensors").exists()
