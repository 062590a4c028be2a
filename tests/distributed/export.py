"""Runs that leave a checkpoint of every format, and the weights that it should hold; started by test_export.py."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from distributed.invariance import Keep, make_strategy
from helpers.training import make_trainer, prompt_data, remax_module
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from remax_lightning.callbacks import ExportPolicy
from remax_lightning.models import ModelConfig
from remax_lightning.strategies import ReMaxFSDP2Strategy

RANKS = int(os.environ.get("WORLD_SIZE", "1"))  # kept here: Lightning takes it away after a run
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2_file")
PRECISIONS = {"llama": "bf16-true", "opt": "32-true"}
"""By family; the first's output embedding is its own, the second's is tied to the input."""


class Freeze(Callback):
    """Keeps a part of the policy from being trained."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.policy_source = _Frozen(**vars(pl_module.policy_source))


class _Frozen(ModelConfig):
    """A source whose model comes with one layer frozen."""

    def load_base(self, key: str) -> Any:
        model = super().load_base(key)
        model.model.decoder.layers[0].requires_grad_(False)
        return model


def train(
    strategy: str, family: str, folder: Path, *, freeze: bool = False, optimizer: Any = torch.optim.AdamW
) -> None:
    """Train for two steps; leave the checkpoint of the last, the callback's export and a copy of the weights."""
    policy, rank = str(folder / family), os.environ["LOCAL_RANK"]
    out, own = folder / f"{strategy}-{family}", folder / f"data{rank}"
    own.mkdir(exist_ok=True)
    # At this rate the steps show in 16 bits.
    module = remax_module(policy, optimizer=partial(optimizer, lr=0.1), check_on_policy=True)
    keep, save = Keep(), ModelCheckpoint(out / "checkpoints", filename="{step}", every_n_train_steps=1)
    trainer = make_trainer(
        out,
        [keep, save, ExportPolicy(str(out / "export"), best=False), *([Freeze()] if freeze else [])],
        devices=RANKS,
        strategy=ReMaxFSDP2Strategy(save_distributed_checkpoint=False)
        if strategy == "fsdp2_file"
        else make_strategy(strategy),
        precision=PRECISIONS[family],
        max_steps=2,
        enable_checkpointing=True,
    )
    torch.manual_seed(0)
    trainer.fit(module, prompt_data(own, policy, batch_size=2))
    if rank == "0":
        torch.save(keep.weights, out / "weights.pt")
        (out / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"policy": {"path": policy}}}}))


def main(strategy: str, family: str, folder: Path) -> None:
    train(strategy, family, folder)
    assert torch.distributed.get_world_size() == RANKS


def train_on_three(folder: Path) -> None:
    """Train with memory that is NaN until it is written, which padding is not, and a decay that adds to gradients."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    optimizer = partial(torch.optim.Adam, weight_decay=0.01)
    train("zero3", "opt", folder, freeze=True, optimizer=optimizer)
    assert torch.distributed.get_world_size() == RANKS == 3
