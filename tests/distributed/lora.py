"""Runs that train an adapter on two ranks, under every strategy; run by test_lora.py, which reads what they saw."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distributed.invariance import make_strategy, whole_weights
from distributed.sharded import local
from helpers.training import PROMPTS, PromptEngine, make_trainer, prompt_data, remax_module
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from remax_lightning.callbacks import ExportPolicy
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.modules import KLConfig, LossConfig
from remax_lightning.strategies import ReMaxFSDP2Strategy

RANK = int(os.environ.get("LOCAL_RANK", "0"))


def strategy_of(name: str) -> Any:
    """The strategy; that of `fsdp2_file` gathers what it saves into one file."""
    return ReMaxFSDP2Strategy(save_distributed_checkpoint=False) if name == "fsdp2_file" else make_strategy(name)


class Look(Callback):
    """Looks at policy, optimizer and figures during the run."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"losses": [], "kl": []}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = whole_weights(pl_module.policy)
        self.seen["shared"] = pl_module.reference is pl_module.policy
        self.seen["kept"] = sum(local(p).numel() for p in pl_module.policy.parameters())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = [name for name, value in pl_module.policy.named_parameters() if value.requires_grad]
        self.seen["trained"] = sorted(named)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen["losses"].append(float(trainer.callback_metrics["train/loss"]))
        self.seen["kl"].append(float(outputs["kl"].abs().max()))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end = whole_weights(pl_module.policy)
        if RANK == 0:  # the one that has the whole weights
            self.seen["moved"] = sorted(name for name in self.end if not torch.equal(self.start[name], self.end[name]))


def make_module(policy: str, lora: LoRAConfig, **options: Any) -> Any:
    return remax_module(
        ModelConfig(policy, lora=lora, gradient_checkpointing=True),
        kl_coef=0.05,
        rollout=PromptEngine(),
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, eps=1e-3),
        loss=LossConfig("clipped"),
        **options,
    )


def train(
    strategy: str, folder: Path, name: str, ranks: int = 2, resume: str | None = None, lora: LoRAConfig | None = None
) -> Look:
    """Train for four steps, two with each rollout, or for that after the checkpoint in the middle of the second."""
    policy, look, own = str(folder / "policy"), Look(), folder / f"data{ranks}-{RANK}"
    own.mkdir(exist_ok=True)
    data = prompt_data(own, policy, batch_size=4 // ranks, micro_batch_size=2 // ranks)
    files = folder / strategy / name
    callbacks: list[Any] = [look, ExportPolicy(str(files / "export"), best=False, merge_adapter=lora is not None)]
    if resume is None:
        callbacks.append(ModelCheckpoint(files, filename="{step}", every_n_train_steps=3, save_top_k=-1))
    trainer = make_trainer(
        files, callbacks, devices=ranks, strategy=strategy_of(strategy), max_steps=4, enable_checkpointing=not resume
    )
    torch.manual_seed(0)
    trainer.fit(make_module(policy, lora or LoRAConfig(r=2)), data, ckpt_path=resume)
    return look


def validate(strategy: str, folder: Path, checkpoint: Path | None = None) -> dict[str, float]:
    """Evaluate, before training or a checkpoint; one rank has one row more, and so one more pass of the reference."""
    policy = str(folder / "policy")
    module = make_module(policy, LoRAConfig(r=2), kl=KLConfig(reference_batch_size=2))
    data = prompt_data(folder / f"data2-{RANK}", policy, PROMPTS[:5], batch_size=3)
    trainer = make_trainer(folder, devices=2, strategy=make_strategy(strategy), limit_val_batches=1.0)
    torch.manual_seed(0)
    found = trainer.validate(module, data, verbose=False, ckpt_path=checkpoint)[0]
    return {name: value for name, value in found.items() if "time" not in name}


def check(strategy: str, folder: Path) -> dict[str, Any]:
    files = folder / strategy / "first"
    look = train(strategy, folder, "first")
    seen = dict(look.seen)
    seen["resumed_losses"] = train(strategy, folder, "second", resume=str(files / "step=3.ckpt")).seen["losses"]
    if strategy == "fsdp2_file":
        return seen
    seen["validated"] = validate(strategy, folder)
    seen["validated_later"] = validate(strategy, folder, files / "step=3.ckpt")
    further = train(strategy, folder, "third", lora=LoRAConfig(path=str(files / "export" / "last")))
    seen["continued"] = further.seen
    if RANK == 0:
        torch.save({"first": look.end, "third": further.end}, folder / f"{strategy}.pt")
    return seen


def main(folder: Path, strategy: str) -> None:
    seen = check(strategy, folder)
    assert torch.distributed.get_world_size() == 2
    (folder / f"{strategy}-{RANK}.json").write_text(json.dumps(seen))
