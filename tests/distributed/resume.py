"""Runs that save and runs that go on from there, under every strategy; run by test_resume.py on several ranks."""

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

from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig
from remax_lightning.modules import LossConfig

RANK, RANKS = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STEPS = 4
PROMPTS_PER_ROLLOUT = 4
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=10.0)  # so much that the groups' decay is seen in a step
SGD = partial(torch.optim.SGD, lr=0.1)


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs["closes_step"]:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def chosen(strategy: str) -> Any:
    """The strategy, which for DDP on one rank is none."""
    return make_strategy(strategy) if RANKS > 1 or strategy != "ddp" else "auto"


def make_module(folder: Path, *, dropout: bool = False, optimizer: Any = ADAMW) -> Any:
    """A module whose responses do not depend on the rank, unless all is left to chance."""
    policy = ModelConfig(str(folder / "policy"), disable_dropout=not dropout)
    options = {} if dropout else {"rollout": PromptEngine()}
    return remax_module(policy, str(folder / "reference"), optimizer=optimizer, loss=LossConfig("clipped"), **options)


def make_data(folder: Path) -> Any:
    """Two rollouts to an epoch, two micro-batches to a rollout, on any number of ranks."""
    own = folder / f"data{RANK}"
    own.mkdir(exist_ok=True)
    size = PROMPTS_PER_ROLLOUT // RANKS
    return prompt_data(own, str(folder / "policy"), batch_size=size, micro_batch_size=size // 2)


def train(
    strategy: str,
    folder: Path,
    name: str,
    checkpoint: Path | None = None,
    *,
    dropout: bool = False,
    accumulate: int = 1,
    optimizer: Any = ADAMW,
    seed: int = 0,
    steps: int = STEPS,
) -> list[float]:
    """Train for the steps, or those after the checkpoint."""
    module, data = make_module(folder, dropout=dropout, optimizer=optimizer), make_data(folder)
    losses = Losses()
    saves = ModelCheckpoint(folder / name, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = make_trainer(
        folder,
        [losses, saves],
        devices=RANKS,
        strategy=chosen(strategy),
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=True,
    )
    torch.manual_seed(100 * seed + RANK)
    trainer.fit(module, data, ckpt_path=checkpoint)
    return losses.losses


def keep(folder: Path, name: str, found: Any) -> None:
    (folder / f"{name}-{RANK}.json").write_text(json.dumps(found))


def exactly(folder: Path, strategy: str) -> None:
    """Four steps, and those after a checkpoint between two rollouts and after one within a rollout."""
    name = f"exactly-{strategy}"
    found = {"whole": train(strategy, folder, name, dropout=True)}
    for step in (2, 3):
        checkpoint = folder / name / f"step={step}.ckpt"
        found[str(step)] = train(strategy, folder, f"{name}-{step}", checkpoint, dropout=True, seed=1)
    keep(folder, name, found)


def save(folder: Path, strategy: str) -> None:
    """Four steps on this number of ranks, one for each rollout, and their checkpoints."""
    name = f"save-{RANKS}-{strategy}"
    keep(folder, name, train(strategy, folder, name, accumulate=2))


def elsewhere(folder: Path, strategy: str, ranks: int) -> None:
    """The last two steps, from checkpoints of another number of ranks, and an evaluation of those."""
    checkpoint = folder / f"save-{ranks}-{strategy}" / "step=2.ckpt"
    found = {"losses": train(strategy, folder, "from", checkpoint, accumulate=2)}
    found["left"] = sorted(path.name for path in checkpoint.iterdir()) if checkpoint.is_dir() else []
    if strategy in ("ddp", "zero3"):  # ZeRO-3 has a way of its own
        found["validated"] = validate(strategy, folder, checkpoint)
    keep(folder, f"from-{ranks}-{strategy}", found)


def save_other(folder: Path) -> None:
    """The checkpoints of this number of ranks that another number refuses: of SGD, of ZeRO, and within a rollout."""
    train("zero2", folder, "other-sgd", accumulate=2, optimizer=SGD, steps=2)
    train("zero2", folder, "other-zero2", accumulate=2, steps=2)
    train("ddp", folder, "other-within", steps=3)


def validate(strategy: str, folder: Path, checkpoint: Path) -> float:
    """The KL of the checkpoint's policy, without a fit before it."""
    module, data = make_module(folder), make_data(folder)
    trainer = make_trainer(folder, devices=RANKS, strategy=chosen(strategy), limit_val_batches=1.0)
    return trainer.validate(module, data, verbose=False, ckpt_path=checkpoint)[0]["val/kl"]


class Moments(Callback):
    """Writes down the moments that the optimizer starts from and ends with, by the names of the weights."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.write(trainer, pl_module, self.path)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.write(trainer, pl_module, self.path.with_suffix(".end"))

    @staticmethod
    def write(trainer: Any, pl_module: Any, path: Path) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_optimizer_state_dict(pl_module, trainer.optimizers[0], options=options)
        if RANK == 0:
            decays = {name: group["weight_decay"] for group in state["param_groups"] for name in group["params"]}
            torch.save({"state": state["state"], "weight_decay": decays}, path)


def moments(folder: Path) -> None:
    """FSDP2 from files of DDP, of one process, of earlier versions, and of its own in one file."""
    from remax_lightning.strategies import ReMaxFSDP2Strategy

    sources = {"two": folder / "save-2-ddp/step=2.ckpt", "one": folder / "save-1-ddp/step=2.ckpt"}
    old = torch.load(sources["two"], weights_only=True)
    del old["optimizer_parameter_names"]
    sources["old"] = folder / "old.ckpt"
    if RANK == 0:
        torch.save(old, sources["old"])

    def start(name: str, checkpoint: Path, strategy: Any, saves: bool = False, steps: int = 3) -> None:
        callbacks: list[Any] = [Moments(folder / f"moments-{name}.pt")]
        if saves:
            callbacks.append(ModelCheckpoint(folder / name, "{step}", every_n_train_steps=1))
        trainer = make_trainer(
            folder, callbacks, devices=RANKS, strategy=strategy, max_steps=steps, accumulate_grad_batches=2,
            enable_checkpointing=saves,
        )  # fmt: skip
        trainer.fit(make_module(folder), make_data(folder), ckpt_path=checkpoint)

    for name, checkpoint in sources.items():
        start(name, checkpoint, make_strategy("fsdp2"))
    start("file", sources["two"], ReMaxFSDP2Strategy(save_distributed_checkpoint=False), saves=True)
    # ---- DDP and FSDP2 read that file ----
    for name in ("ddp", "fsdp2"):
        start(f"{name}-of-file", folder / "file" / "step=3.ckpt", make_strategy(name), steps=4)


def refused(folder: Path) -> None:
    """What stands in the way of one rank or another strategy, each with the message that says so."""
    found = {}
    cases = {
        "within a rollout": ("ddp", "other-within/step=3.ckpt", ADAMW),
        "a file for ZeRO": ("zero2", "save-2-ddp/step=2.ckpt", ADAMW),
        "a folder for DDP": ("ddp", "other-zero2/step=2.ckpt", ADAMW),
        "ZeRO's folder for FSDP2": ("fsdp2", "other-zero2/step=2.ckpt", ADAMW),
        "SGD under ZeRO": ("zero2", "other-sgd/step=2.ckpt", SGD),
    }
    for name, (strategy, checkpoint, optimizer) in cases.items():
        try:
            train(strategy, folder, "refused", folder / checkpoint, optimizer=optimizer)
        except UserError as error:
            found[name] = str(error)
    keep(folder, "refused", found)
