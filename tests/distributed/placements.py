"""Runs whose reference and reward model are kept in every place; run by test_placements.py on two ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from distributed.invariance import make_strategy
from distributed.sharded import local
from helpers.training import (
    PROMPTS,
    CharacterReward,
    PromptEngine,
    make_trainer,
    prompt_data,
    remax_module,
    write_rows,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from remax_lightning.errors import RankError, RankUserError
from remax_lightning.models import ModelConfig
from remax_lightning.modules import KLConfig
from remax_lightning.rewards import ClassifierReward, WeightedReward
from remax_lightning.rewards.base import Reward
from remax_lightning.types import Response

PLACEMENTS = ("replicate", "shard", "cpu")
CASES = [("ddp", placement, estimator) for placement in PLACEMENTS for estimator in ("k1", "full")]
# Replicated they are in every other test of these.
CASES += [(strategy, placement, "k1") for strategy in ("fsdp2", "zero2", "zero3") for placement in ("shard", "cpu")]
RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Look(Callback):
    """Looks at the frozen models between their passes, and at the figures."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"losses": []}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen["losses"].append(float(trainer.callback_metrics["train/loss"]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        frozen = {"reference": pl_module.reference, "reward": pl_module.reward.model}
        for name, model in frozen.items():
            self.seen[name] = sum(local(value).numel() for value in model.parameters())
            self.seen[f"{name}_layers"] = sum(local(value).numel() for value in layers(model).parameters())
        every = [value for model in frozen.values() for value in model.parameters()]
        self.seen["gradients"] = sum(value.requires_grad or value.grad is not None for value in every)
        optimized = {id(value) for group in trainer.optimizers[0].param_groups for value in group["params"]}
        self.seen["optimized"] = sum(id(value) in optimized for value in every)
        self.seen["registered"] = sum(value is each for value in every for each in pl_module.parameters())


def layers(model: Any) -> Any:
    return model.model.layers


def run(strategy: str, placement: str, folder: Path, ranks: int = 2, estimator: str = "k1") -> dict[str, Any]:
    """Train for two steps and validate, on rows of which one rank has one more, and so one more pass of each model."""
    own, policy = folder / f"data{ranks}-{RANK}", str(folder / "policy")
    own.mkdir(exist_ok=True)
    look, files = Look(), folder / f"{strategy}-{placement}-{estimator}"
    template = "{prompt} {response}"
    module = remax_module(
        policy,
        reference=ModelConfig(str(folder / "reference"), placement=placement),
        kl_coef=0.05,
        kl=KLConfig(estimator, reference_batch_size=2),
        rollout=PromptEngine(),
        reward=ClassifierReward(str(folder / "reward"), template, batch_size=2, placement=placement),
    )
    rows = write_rows(own / "validation.jsonl", ({"prompt": prompt} for prompt in PROMPTS[:5]))
    data = prompt_data(own, policy, batch_size=6 // ranks, val_path=rows)
    saves = ModelCheckpoint(files, filename="{step}", every_n_train_steps=2)
    trainer = make_trainer(
        folder,
        [look, saves],
        devices=ranks,
        strategy=make_strategy(strategy),
        max_steps=2,
        enable_checkpointing=True,
        num_sanity_val_steps=1,
        limit_val_batches=1.0,
        val_check_interval=1,
    )
    torch.manual_seed(0)
    trainer.fit(module, data)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if "time" not in name}
    return {**look.seen, "validated": {name: value for name, value in figures.items() if name.startswith("val/")}}


class FailingEngine(PromptEngine):
    """Fails on the second rank, before it writes anything."""

    def generate(self, model: Any, request: Any) -> Any:
        fail_on_rank_1()
        return super().generate(model, request)


class FailingText(ClassifierReward):
    """Fails on the second rank, at a response that it cannot read."""

    def text(self, prompt: str, response: str, row: dict[str, Any]) -> str:
        if isinstance(response, Response):  # none is there yet where the prompts are checked
            fail_on_rank_1()
        return super().text(prompt, response, row)


class FailingPart(CharacterReward):
    """Fails on the second rank, as a part of a reward."""

    def score(self, *args: Any) -> Any:
        fail_on_rank_1()
        return super().score(*args)


def fail_on_rank_1() -> None:
    if RANK == 1:
        raise ConnectionError("it is gone")


FAILING = ("engine", "text", "part before", "part between")


def fail(folder: Path, where: str) -> None:
    """Write down what each rank is told where the second fails, and the first comes to a reward model in shares."""
    own, policy = folder / f"data2-{RANK}", str(folder / "policy")
    own.mkdir(exist_ok=True)
    kind = FailingText if where == "text" else ClassifierReward
    first, last = (kind(str(folder / "reward"), "{prompt} {response}", placement="shard") for _ in "ab")
    rewards: dict[str, Reward] = {
        "engine": first,
        "text": WeightedReward({"other": CharacterReward(), "model": first}),
        "part before": WeightedReward({"other": FailingPart(), "model": first}),
        "part between": WeightedReward({"model": first, "other": FailingPart(), "last": last}),
    }
    engine = FailingEngine() if where == "engine" else PromptEngine()
    module = remax_module(policy, rollout=engine, reward=rewards[where])
    try:
        make_trainer(folder, devices=2, strategy="ddp").fit(module, prompt_data(own, policy, batch_size=2))
    except (RankError, RankUserError) as error:
        (folder / f"{where}-{RANK}.txt").write_text(str(error))


def main(folder: Path, strategy: str, placement: str, estimator: str) -> None:
    seen = run(strategy, placement, folder, estimator=estimator)
    assert torch.distributed.get_world_size() == 2
    (folder / f"{strategy}-{placement}-{estimator}-{RANK}.json").write_text(json.dumps(seen))
