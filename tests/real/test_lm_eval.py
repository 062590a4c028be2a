"""lm-eval itself, offline: the command on exported folders, and the callback in a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tokenizer, tiny_model
from helpers.cli import remax
from helpers.loggers import RecordingLogger
from helpers.training import make_trainer, prompt_data, remax_module, save_policy, write_rows
from lightning.pytorch import Callback

from remax_lightning.callbacks import LMEval
from remax_lightning.models import LoRAConfig
from remax_lightning.models.lora import add_adapter

pytestmark = pytest.mark.slow(10)

QUESTIONS = [
    {"question": f"{a}+{b}=", "choices": [str(a + b), str(a * b), f"{a}{b}"], "label": (a + b) % 3}
    for a in range(1, 5)
    for b in range(2, 5)
]


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of a user's own, as a YAML file over rows on this machine."""
    folder = tmp_path_factory.mktemp("task")
    options = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": write_rows(folder / "rows.jsonl", QUESTIONS)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(options))
    return folder / "sums.yaml"


def accuracy(model: Any, count: int = len(QUESTIONS)) -> float:
    """The share of questions whose right answer is the likeliest, computed here."""
    tokenizer, right = make_tokenizer(), 0
    for row in QUESTIONS[:count]:
        scores = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            ids = tokenizer(f"{row['question']}{choice}", add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                log_probs = model(ids).logits.log_softmax(-1)[0, :-1]
            scores.append(float(log_probs.gather(-1, ids[0, 1:, None])[-len(choice) :].sum()))
        right += scores.index(max(scores)) == row["label"]
    return right / count


def test_the_command_measures_model_and_adapter(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer(bos=False).save_pretrained(tmp_path / "policy")
    model = tiny_model("llama", seed=3)
    model.save_pretrained(tmp_path / "policy")
    expected = {"policy": accuracy(model)}
    adapted: Any = add_adapter(model, LoRAConfig(r=2), "model.policy.lora", 0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "adapter")
    make_tokenizer(bos=False).save_pretrained(tmp_path / "adapter")
    expected["adapter"] = accuracy(adapted.eval())
    for name, value in expected.items():
        base = ["--base", str(tmp_path / "policy")] if name == "adapter" else []
        done = remax(capsys, "lm-eval", str(tmp_path / name), "--tasks", str(task), "--device", "cpu", *base)
        assert done.code == 0, done.err
        (figure,) = json.loads((tmp_path / f"{name}_lm_eval.json").read_text())["figures"]["sums"].values()
        assert figure["value"] == pytest.approx(value)
        assert figure["stderr"] == pytest.approx((value * (1 - value) / (len(QUESTIONS) - 1)) ** 0.5)
        assert figure["n"] == len(QUESTIONS)
        assert f"{value:.4f}" in done.out


class Accuracies(Callback):
    """Computes the same at every validation."""

    def __init__(self) -> None:
        self.values: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.values.append((trainer.global_step, accuracy(pl_module.policy, 8)))


def test_the_callback_measures_every_step_of_a_run(task: Path, tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy", seed=3)
    make_tokenizer(bos=False).save_pretrained(tmp_path / "policy")
    module = remax_module(policy)
    logger, accuracies = RecordingLogger(tmp_path), Accuracies()
    trainer = make_trainer(
        tmp_path, [LMEval([str(task)], limit=8), accuracies],
        max_steps=2, max_epochs=-1, limit_val_batches=1, val_check_interval=1, check_val_every_n_epoch=None,
        logger=logger,
    )  # fmt: skip
    trainer.fit(module, prompt_data(tmp_path, policy, batch_size=4))
    assert logger.metrics["lm_eval/sums/acc"] == [(step, pytest.approx(value)) for step, value in accuracies.values]
    assert [step for step, _ in accuracies.values] == [1, 2]
    assert module.policy.training
