"""The three stages on real text, where GSM8K is at hand: a reward model of solutions that were right or wrong."""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import in_folder, remax, write_config
from helpers.training import write_rows

from remax_lightning.evaluation.intervals import mean_figure
from remax_lightning.rewards import ClassifierReward
from remax_lightning.tasks.addition import policy_config
from remax_lightning.tasks.dialogues import train_tokenizer

FOLDER = Path(os.environ.get("REMAX_GSM8K", Path(__file__).parents[2] / "shared" / "data" / "gsm8k"))
SOLUTIONS = FOLDER / "example_model_solutions.jsonl"
HELD_OUT = 200

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOLUTIONS.exists(), reason=f"there is no {SOLUTIONS}; REMAX_GSM8K names another folder"),
]


def questions() -> list[list[dict[str, str]]]:
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


def stages(folder: Path, path: str) -> Iterator[dict[str, Any]]:
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


def test_a_reward_model_tells_right_solutions_from_wrong_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    """Better than chance on questions that it has not seen, with a model of a fifth of a million weights.

    It does not check the sums, and is not said to: right and wrong solutions are also told by how they are written, how
    long they are and which model seems to have written them.
    """
    pairs = questions()
    train = [pair for question in pairs[HELD_OUT:] for pair in question]
    path = write_rows(tmp_path / "preferences.jsonl", train)
    tokenizer = train_tokenizer((text for pair in train for text in pair.values()), vocab_size=1024, longest=512)
    tokenizer.save_pretrained(tmp_path / "policy")
    config = policy_config(tokenizer)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 128, 2
    config.head_dim = 16
    config.save_pretrained(tmp_path / "policy")
    with in_folder(tmp_path):
        for number, stage in enumerate(stages(tmp_path, path)):
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
