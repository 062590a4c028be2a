"""Runs that save checkpoints and resume from them, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers.training import PROMPTS, make_trainer, prompt_data, remax_module, save_policy, weights_of
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from remax_lightning.models import ModelConfig
from remax_lightning.modules import WarmupCosine
from remax_lightning.rollout import SamplingConfig

HALF, WHOLE = 3, 6
TIMES = ("time/", "throughput/")


class Ledger(Callback):
    """Figures and weights after each optimizer step; the clock's figures left out."""

    def __init__(self) -> None:
        self.figures: list[dict[str, float]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not outputs["closes_step"]:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith(TIMES)}
        self.figures.append(values)
        self.weights.append(weights_of(pl_module))

    @property
    def losses(self) -> list[float]:
        return [step["train/loss"] for step in self.figures]


class Setting:
    """One way to train; `start` makes module, data and trainer anew, as a new process would."""

    def __init__(
        self,
        folder: Path,
        family: str = "llama",
        prompts: int = 8,
        *,
        dropout: bool = False,
        data: dict[str, Any] | None = None,
        module: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        callbacks: Callable[[], list[Any]] = list,
        saves: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.prompts, self.dropout, self.callbacks = folder, PROMPTS[:prompts], dropout, callbacks
        self.policy = save_policy(folder / "policy", family)
        self.reference = save_policy(folder / "reference", family, noise=0.02)
        self.data, self.module, self.trainer = data or {}, module or {}, trainer or {}
        self.saves = {"save_top_k": -1, "every_n_train_steps": 1} if saves is None else saves

    def start(self, seed: int, steps: int, checkpoint: Path | None = None) -> tuple[Ledger, Trainer]:
        """Train up to `steps` optimizer steps and return what was recorded, and the trainer."""
        torch.manual_seed(seed)
        ledger = Ledger()
        saves = ModelCheckpoint(self.folder / f"{seed}-{steps}", "{step}", **self.saves)
        options = {
            "optimizer": partial(torch.optim.AdamW, lr=1e-2),
            "sampling": SamplingConfig(max_response_length=5),
            # The length of the whole run: the half that is run first must not decay faster.
            "lr_scheduler": partial(WarmupCosine, warmup_steps=2, total_steps=WHOLE),
        }
        source = ModelConfig(self.policy, disable_dropout=not self.dropout)
        module = remax_module(source, self.reference, **(options | self.module))
        trainer = make_trainer(
            self.folder,
            [saves, *self.callbacks(), ledger],
            max_steps=steps,
            enable_checkpointing=True,
            **self.trainer,
        )
        data = prompt_data(self.folder, self.policy, self.prompts, **({"batch_size": 4} | self.data))
        trainer.fit(module, data, ckpt_path=checkpoint)
        return ledger, trainer

    def saved(self, seed: int, steps: int, step: int) -> Path:
        """The checkpoint that a run saved after optimizer step `step`."""
        return self.folder / f"{seed}-{steps}" / f"step={step}.ckpt"


def names_in(checkpoint: Path) -> set[str]:
    """The weights that a checkpoint holds, whatever its format."""
    from torch.distributed.checkpoint import FileSystemReader

    if checkpoint.is_file():
        return set(torch.load(checkpoint, weights_only=True)["state_dict"])
    if (checkpoint / ".metadata").exists():
        keys = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        return {key.removeprefix("state_dict.") for key in keys if key.startswith("state_dict.")}
    files = list(checkpoint.rglob("*model_states.pt"))
    assert files
    states = [torch.load(file, weights_only=False) for file in files]  # DeepSpeed's own
    assert not any(state.get("frozen_param_fragments") for state in states)
    return {name for state in states for name in state["module"]}
