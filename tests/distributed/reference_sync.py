"""Runs whose reference moves to a policy in shards; run by test_reference_sync.py on two ranks."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distributed.invariance import make_strategy
from helpers.training import PromptEngine, make_trainer, prompt_data, remax_module
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from remax_lightning.models import ModelConfig
from remax_lightning.modules import KLConfig

CASES = ("fsdp2-replicate", "zero3-replicate", "fsdp2-shard", "ddp-shard", "zero3-cpu", "zero2-replicate")
STEPS = 5
RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Figures(Callback):
    """Keeps the KL of every step, which tells where the reference is."""

    def __init__(self) -> None:
        self.kl: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kl.append(float(trainer.callback_metrics["train/kl"]))


def train(
    case: str, folder: Path, ranks: int, kl: KLConfig, checkpoint: Path | None = None, saves_to: Path | None = None
) -> list[float]:
    """Train for five steps, or those after a checkpoint, with a validation in between; return the KL of each."""
    strategy, placement = case.split("-")
    own, policy = folder / f"data{ranks}-{RANK}", str(folder / "policy")
    own.mkdir(exist_ok=True)
    reference = ModelConfig(policy, placement=placement)
    optimizer = partial(torch.optim.SGD, lr=0.5)
    module = remax_module(policy, reference, kl_coef=0.1, kl=kl, rollout=PromptEngine(), optimizer=optimizer)
    figures, callbacks = Figures(), []
    if saves_to is not None:
        callbacks.append(ModelCheckpoint(saves_to, "{step}", save_top_k=-1, every_n_train_steps=1))
    trainer = make_trainer(
        folder,
        [figures, *callbacks],
        devices=ranks,
        strategy=make_strategy(strategy) if ranks > 1 else "auto",
        max_steps=STEPS,
        enable_checkpointing=saves_to is not None,
        limit_val_batches=1.0,
        val_check_interval=1,
    )
    torch.manual_seed(0)
    trainer.fit(module, prompt_data(own, policy, batch_size=4 // ranks), ckpt_path=checkpoint)
    return figures.kl


def main(folder: Path, case: str, kl: KLConfig) -> None:
    """Five steps, and those after the checkpoints before a move and after one."""
    saves_to = folder / case
    found = {"whole": train(case, folder, 2, kl, saves_to=saves_to)}
    for step in (2, 3):
        found[str(step)] = train(case, folder, 2, kl, checkpoint=saves_to / f"step={step}.ckpt")
    (folder / f"{case}-{RANK}.json").write_text(json.dumps(found))
