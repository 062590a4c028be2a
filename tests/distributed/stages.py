"""A step of the reward model and of packed supervised examples under every strategy; run by test_stages.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distributed.invariance import make_strategy, whole_weights
from helpers.stages import EXAMPLES, PAIRS, pair_data, sft_data
from helpers.training import make_trainer, write_rows
from lightning.pytorch import Callback
from torch import Tensor

from remax_lightning.callbacks import ExportPolicy
from remax_lightning.models import ModelConfig
from remax_lightning.modules import RewardModelModule, SFTModule
from remax_lightning.rewards import FunctionReward
from remax_lightning.rollout import SamplingConfig

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
PACKED = ("auto", "ddp", "zero3")
STARTS = ("policy", "reward")
"""A language model, whose head is new, and a reward model with a layer norm that has a bias."""


class Keep(Callback):
    """Keeps the whole weights before and after training, and the figures."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.logged: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(whole_weights(pl_module.trained_model))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(whole_weights(pl_module.trained_model))
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}


def fit(module: Any, data: Any, folder: Path, strategy: str, ranks: int, **options: Any) -> dict[str, Any]:
    keep = Keep()
    export = ExportPolicy(str(folder / "export"), best=False)
    torch.manual_seed(0)
    trainer = make_trainer(
        folder, [keep, export], devices=ranks, strategy=make_strategy(strategy), accumulate_grad_batches=2, **options
    )
    trainer.fit(module, data)
    return {"weights": keep.weights, "logged": keep.logged}


def train_reward_model(strategy: str, start: str, folder: Path, ranks: int) -> dict[str, Any]:
    """One step of two micro-batches per rank, then a validation whose last batch not every rank can fill."""
    module = RewardModelModule(ModelConfig(start), optimizer=partial(torch.optim.SGD, lr=0.5))
    folder.mkdir(parents=True, exist_ok=True)
    val = write_rows(folder / "val.jsonl", [*PAIRS[:4], {**PAIRS[4], "prompt": "another"}])
    data = pair_data(folder, start, batch_size=4 // ranks, val_path=val)
    return fit(module, data, folder, strategy, ranks, limit_val_batches=1.0)


def lengths(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Any]) -> list[float]:
    return [len(response) + len(prompt) / 8 for prompt, response in zip(prompts, responses, strict=True)]


def train_packed(strategy: str, start: str, folder: Path, ranks: int) -> dict[str, Any]:
    """One step of two micro-batches per rank, whose tokens differ in number; validation as for the reward model."""
    module = SFTModule(
        ModelConfig(start),
        FunctionReward(lengths),
        packing=True,
        sampling=SamplingConfig(max_response_length=4, top_k=1),  # ranks draw other numbers than one process does
        optimizer=partial(torch.optim.SGD, lr=0.5),
    )
    folder.mkdir(parents=True, exist_ok=True)
    data = sft_data(folder, start, batch_size=4 // ranks, val_path=write_rows(folder / "val.jsonl", EXAMPLES[:5]))
    return fit(module, data, folder, strategy, ranks, limit_val_batches=1.0)


def run(strategy: str, folder: Path, own: Path, ranks: int) -> dict[str, Any]:
    found = {}
    for start in STARTS:
        found[start] = train_reward_model(strategy, str(folder / start), own / strategy / start, ranks)
    if strategy in PACKED:
        found["packed"] = train_packed(strategy, str(folder / "policy"), own / strategy / "packed", ranks)
    return found


def main(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    for strategy in STRATEGIES:
        result = run(strategy, folder, folder / f"rank{rank}", ranks=2)
        assert torch.distributed.get_world_size() == 2
        torch.save(result, folder / f"{strategy}-{rank}.pt")
        print(strategy, flush=True)
