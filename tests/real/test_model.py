"""A pretrained model: training with an adapter, and what other programs make of the export."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.training import make_trainer, write_rows
from lightning.pytorch import Callback
from real.published import TOPICS, user

from remax_lightning.callbacks import ExportPolicy
from remax_lightning.data import LoadingConfig, PromptDataModule
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.modules import ReMaxModule
from remax_lightning.rewards import FunctionReward
from remax_lightning.rollout import SamplingConfig
from remax_lightning.types import StepOutput

pytestmark = pytest.mark.slow(20)

ROWS = [{"prompt": [user(f"Write one short sentence about {topic}.")]} for topic in TOPICS]
STEPS = 10


class Training(NamedTuple):
    """A run that is over."""

    module: ReMaxModule
    steps: list[StepOutput]
    figures: dict[str, float]
    log: str
    exported: Path


class Outputs(Callback):
    """Keeps what the steps returned."""

    def __init__(self) -> None:
        self.steps: list[StepOutput] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(outputs)


class Log(logging.Handler):
    """Keeps the messages of the package."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def training(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Ten steps with an adapter towards sentences that sound happy, and a validation after them."""
    pytest.importorskip("vaderSentiment")
    folder = tmp_path_factory.mktemp("training")
    module = ReMaxModule(
        ModelConfig(str(smollm2), lora=LoRAConfig(r=8, alpha=16)),
        FunctionReward("real.rewards.sentiment"),
        sampling=SamplingConfig(max_response_length=20),
        kl_coef=0.01,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
    )
    data = PromptDataModule(
        data=ROWS, val_data=ROWS, tokenizer=str(smollm2), batch_size=len(ROWS), loading=LoadingConfig(cache=False)
    )
    outputs, log = Outputs(), Log()
    package = logging.getLogger("remax_lightning")
    level = package.level
    package.addHandler(log)
    package.setLevel(logging.INFO)
    torch.manual_seed(0)
    export = ExportPolicy(str(folder / "policy"), best=False)
    # An epoch is a step: a validation after each would take as long as the training.
    options = {"max_steps": STEPS, "max_epochs": -1, "limit_val_batches": 1.0, "check_val_every_n_epoch": STEPS + 1}
    trainer = make_trainer(folder, [outputs, export], **options)
    trainer.fit(module, data)
    (figures,) = trainer.validate(module, data, verbose=False)
    package.removeHandler(log)
    package.setLevel(level)
    return Training(module, outputs.steps, figures, "\n".join(log.lines), folder / "policy" / "last")


def test_training_is_finite_and_moves_the_policy(training: Training) -> None:
    assert "rollout engine: PairedEngine" in training.log
    assert len(training.steps) == STEPS
    for step in training.steps:
        assert math.isfinite(float(step["loss"]))
        assert bool(step["advantages"].isfinite().all())
        assert bool(step["rollout"].reward.isfinite().all())
    kls = []
    for step in training.steps:
        log_ratio = step["kl"][step["rollout"].sampled.response_mask]
        kls.append(float((torch.expm1(-log_ratio) + log_ratio).mean()))  # k3, which is 0 or more
    assert kls[0] < 1e-6
    assert kls[-1] > 1e-4
    assert training.figures["val/kl"] > 0
    assert math.isfinite(training.figures["val/reward"])


def test_better_responses_became_likelier(training: Training) -> None:
    """Compared with worse ones that were drawn: the covariance of advantage and change of the log-prob."""
    advantages, changes = [], []
    for step in training.steps:
        rollout = step["rollout"]
        with torch.no_grad():
            log_probs = training.module.token_statistics(rollout).log_probs
        assert rollout.baseline_reward is not None
        changes.append(((log_probs - rollout.reference_log_probs) * rollout.sampled.response_mask).sum(-1))  # [S]
        advantages.append(rollout.reward - rollout.baseline_reward)  # [S]
    both = torch.stack([torch.cat(advantages), torch.cat(changes)])  # [2, S of all steps]
    assert float(torch.corrcoef(both)[0, 1]) > 0.1


def test_what_is_drawn_is_what_is_trained(training: Training) -> None:
    """After training, with an adapter that does something, and prompts of different lengths."""
    module, prompt = training.module, training.steps[-1]["rollout"].prompt
    generator = torch.Generator().manual_seed(1)
    rollout = module.worker.roll_out(module.policy, prompt, generator, greedy=True, return_log_probs=True)
    with torch.no_grad():
        trained = module.token_statistics(rollout).log_probs
    mask = rollout.sampled.response_mask
    assert rollout.log_probs is not None
    assert float((rollout.log_probs - trained)[mask].abs().max()) < 1e-3
    assert mask.sum() > 30


def test_plain_transformers_writes_the_same_with_the_export(training: Training) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(training.exported)
    tokenizer = AutoTokenizer.from_pretrained(training.exported)
    assert type(model).__name__ == "LlamaForCausalLM"
    module, batch = training.module, training.steps[-1]["rollout"].prompt
    rollout = module.worker.roll_out(module.policy, batch, torch.Generator().manual_seed(0), greedy=True)
    assert rollout.greedy is not None
    for row, text in zip(batch.rows, rollout.greedy.texts, strict=True):
        inputs = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_lm_eval_measures_the_policy_that_was_trained(training: Training, smollm2: Path, tmp_path: Path) -> None:
    """Log-likelihoods of answers by another program, of base and exported adapter, against those of the module."""
    lm_eval = pytest.importorskip("lm_eval")
    rows = [
        {"question": "The capital of France is", "choices": [" Paris", " London"], "label": 0},
        {"question": "Two and two make", "choices": [" four", " seven"], "label": 0},
    ]
    task = {
        "task": "offline",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": write_rows(tmp_path / "rows.jsonl", rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    arguments = {"pretrained": str(smollm2), "peft": str(training.exported), "dtype": "float32"}
    results = lm_eval.simple_evaluate("hf", model_args=arguments, tasks=[task], device="cpu", bootstrap_iters=0)
    measured = {
        request: response[0]
        for sample in results["samples"]["offline"]
        for request, (response,) in zip(sample["arguments"], sample["resps"], strict=True)
    }
    assert len(measured) == 4
    policy, tokenizer = training.module.policy.eval(), training.module.tokenizer
    for (question, answer), log_likelihood in measured.items():
        ids = tokenizer(question + answer, add_special_tokens=False, return_tensors="pt").input_ids
        start = len(tokenizer(question, add_special_tokens=False).input_ids)
        with torch.no_grad():
            log_probs = policy(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        expected = float(log_probs.gather(-1, ids[0, start:, None]).sum())
        assert log_likelihood == pytest.approx(expected, abs=1e-3)
