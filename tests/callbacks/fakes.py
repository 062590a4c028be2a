"""A module that returns prepared step outputs, run by a real trainer with a real TensorBoard logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from remax_lightning.types import PromptBatch, Responses, Rollout, StepOutput


def make_responses(texts: list[str], lengths: list[int], truncated: list[bool] | None = None) -> Responses:
    ids = torch.ones(len(texts), max(lengths), dtype=torch.long)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Responses(ids, mask, torch.tensor(truncated or [False] * len(texts)), texts)


def make_prompt(prompts: list[str], split: int = 0, num_micro_batches: int = 1) -> PromptBatch:
    ids = torch.ones(len(prompts), 3, dtype=torch.long)
    return PromptBatch(ids, ids.bool(), prompts, [{"i": i} for i in range(len(prompts))], split, num_micro_batches)


def make_output(
    seed: int, *, closes: bool = True, prompts: int = 3, n: int = 2, kl: bool = True, greedy: bool = True
) -> StepOutput:
    """A random step output: small whole rewards, so that ties with the baseline happen."""
    random = torch.Generator().manual_seed(seed)
    responses = prompts * n
    lengths = torch.randint(1, 6, (responses,), generator=random).tolist()
    names = [f"prompt {seed}.{i}" for i in range(prompts)]
    sampled = make_responses([f"response {seed}.{i}" for i in range(responses)], lengths)
    reward = torch.randint(0, 4, (responses,), generator=random).float()
    mask = sampled.response_mask
    return StepOutput(
        rollout=Rollout(
            prompt=make_prompt(names),
            sampled=sampled,
            greedy=make_responses([f"greedy {seed}.{i}" for i in range(prompts)], [2] * prompts) if greedy else None,
            reward=reward,
            baseline_reward=torch.randint(0, 4, (prompts,), generator=random).float() if greedy else None,
            reward_parts={"half": reward / 2},
            reference_log_probs=None,
            log_probs=None,
        ),
        advantages=torch.randn(mask.shape, generator=random) * mask,
        kl=torch.randn(mask.shape, generator=random) * mask if kl else None,
        entropy=mask.float(),
        entropy_mask=mask,
        times={"rollout": 0.0, "reward": 0.0},
        closes_step=closes,
    )


class FakeModule(LightningModule):
    """Returns `train[i]` at batch i, `validation[i]` at validation batch i."""

    def __init__(
        self, train: list[Any], validation: list[Any] | None = None, kl_coef: float | None = 0.1, scores: Any = ()
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_outputs, self.validation_outputs = train, validation or []
        self.scores = list(scores)
        self.kl_coefs: list[float] = []
        if kl_coef is not None:
            self.kl_coef = kl_coef

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.kl_coefs.append(getattr(self, "kl_coef", 0.0))
        return {"loss": self.weight * 1.0, **self.train_outputs[batch_idx]}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if self.scores and not self.trainer.sanity_checking and batch_idx == 0:
            self.log("val/reward", self.scores.pop(0), batch_size=1)
        return self.validation_outputs[batch_idx]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        prompts = [output["rollout"].prompt if "rollout" in output else 0 for output in self.train_outputs]
        return DataLoader(prompts, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(range(len(self.validation_outputs)), batch_size=None)  # type: ignore[arg-type]


def make_trainer(folder: Path, callbacks: list[Any], **arguments: Any) -> Trainer:
    """A trainer for two epochs or fewer on the CPU that logs every step to `folder/logs`."""
    defaults: dict[str, Any] = {
        "logger": TensorBoardLogger(folder, name="logs", version=""),
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=callbacks, **{**defaults, **arguments})


def checkpoint_at(step: int, folder: Path) -> ModelCheckpoint:
    """Saves `folder/step=<step>.ckpt` in the midst of the run."""
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=step, save_top_k=-1)


def events(folder: Path) -> Any:
    """TensorBoard's own reader of what a run under `folder` logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "logs"), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    return accumulator.Reload()


def scalars(folder: Path, tag: str) -> list[float]:
    """What was logged under `tag`, in order; empty if nothing was."""
    reader = events(folder)
    return [event.value for event in reader.Scalars(tag)] if tag in reader.Tags()["scalars"] else []


PARTS_OF_TWO_STEPS = [(0, False), (1, True), (2, False), (3, True)]


def two_steps_of_two_parts(**arguments: Any) -> list[StepOutput]:
    return [make_output(seed, closes=closes, **arguments) for seed, closes in PARTS_OF_TWO_STEPS]
