"""Tests of a policy on two ranks, with everything measured; run by test_evaluation.py, which reads what they wrote."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.invariance import make_strategy
from helpers.harness import install
from helpers.loggers import RecordingLogger
from helpers.training import PROMPTS, PromptEngine, make_trainer, remax_module, write_rows
from lightning.pytorch import Callback

from remax_lightning.callbacks import Evaluation, LMEval
from remax_lightning.data import PromptDataModule
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.rollout import SamplingConfig

CASES = {
    "shared": ("ddp", "replicate"),
    "filled": ("ddp", "replicate"),
    "text": ("ddp", "replicate"),
    "ddp": ("ddp", "shard"),
    "fsdp2": ("fsdp2", "shard"),
    "zero3": ("zero3", "cpu"),
    "fsdp2_lora": ("fsdp2", None),
    "zero3_lora": ("zero3", None),
}
"""What two ranks do: the strategy, and where the reference is kept; None where it is the adapted policy's start."""
COLD = {"sampling": SamplingConfig(max_response_length=8, temperature=1e-4)}
"""Sampling that is greedy decoding: the same on every rank, and of unequal lengths."""
TEXT = "The quick brown fox jumps over the lazy dog."


class Move(Callback):
    """Moves an adapter off its start, by the same on every rank and whatever the strategy has made of it."""

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            for name, value in pl_module.policy.named_parameters():
                if ".lora_B." in name:
                    local = value.to_local() if hasattr(value, "to_local") else getattr(value, "ds_tensor", value)
                    local.fill_(0.2)


def evaluate(case: str, folder: Path, ranks: int) -> None:
    """Write the evaluation to `folder/<case><ranks>.json`."""
    strategy, placement = CASES[case]
    policy = str(folder / "policy")
    lora = placement is None
    reference = None if lora else ModelConfig(str(folder / "reference"), placement=placement)
    options: dict[str, Any] = {"rollout": PromptEngine()} if case in ("shared", "filled", "text") else COLD
    source = ModelConfig(policy, lora=LoRAConfig(r=2) if lora else None)
    module = remax_module(source, reference, kl_coef=0.05, **options)
    # Nine rows in batches of four: the second rank has one batch only, and is handed the first row once more.
    prompts = [*PROMPTS, "ninth"] if case == "filled" else PROMPTS[:7]
    rows = [{"prompt": prompt, "chosen": prompt[::-1]} for prompt in prompts]
    path = write_rows(folder / f"{case}{ranks}.rows.jsonl", rows)
    data = PromptDataModule(path, policy, val_path=path, batch_size=4 if case == "filled" else 2, max_prompt_length=64)
    (folder / "text.txt").write_text(TEXT)
    evaluation = Evaluation(
        path=str(folder / f"{case}{ranks}.json"),
        text=str(folder / "text.txt") if case == "text" else None,
        max_length=20 if case == "text" else 1024,  # three pieces
        num_resamples=200,
    )
    parallel = {"devices": ranks, "strategy": make_strategy(strategy)} if ranks > 1 else {}
    torch.manual_seed(0)
    trainer = make_trainer(folder, [evaluation, *([Move()] if lora else [])], **parallel)
    (logged,) = trainer.test(module, data)
    assert trainer.world_size == ranks
    if trainer.is_global_zero:
        (folder / f"{case}{ranks}.logged.json").write_text(json.dumps(logged))


def measure_with_lm_eval(folder: Path, strategy: str, ranks: int) -> None:
    """Write what a stand-in for lm-eval measures within a fit of one step, and after it, of a policy that stays."""
    logger = RecordingLogger(folder / f"lm_eval_{strategy}{ranks}")
    with pytest.MonkeyPatch.context() as patch:
        fake = install(patch)
        # A forward pass of rank 0 alone: under strategies that shard it would wait for the others.
        patch.setattr(fake, "value", lambda model: float(model(torch.tensor([[5, 6, 7]])).logits.float().sum()))
        policy = str(folder / "policy")
        module = remax_module(policy, optimizer=partial(torch.optim.SGD, lr=0.0))
        data = PromptDataModule(
            data=[{"prompt": prompt} for prompt in PROMPTS], val_data=[{"prompt": "1+1="}] * 2, tokenizer=policy,
            batch_size=4, max_prompt_length=64,
        )  # fmt: skip
        callback = LMEval(["arc_easy"])
        parallel = {"devices": ranks, "strategy": make_strategy(strategy)} if ranks > 1 else {}
        trainer = make_trainer(
            folder, [Evaluation(), callback], logger=logger, limit_val_batches=1, val_check_interval=1, **parallel
        )
        trainer.fit(module, data)
    assert [figure.metric for figure in callback.figures][:1] == ["acc"]  # on every rank
    assert len(fake.calls) == (2 if trainer.is_global_zero else 0)
    if trainer.is_global_zero:
        (folder / f"lm_eval_{strategy}{ranks}.json").write_text(json.dumps(logger.metrics["lm_eval/arc_easy/acc"]))


def main(folder: Path, *cases: str) -> None:
    for name in cases:
        evaluate(name, folder, ranks=2)
        print(name, flush=True)
