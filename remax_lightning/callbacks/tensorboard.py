"""Grouped charts for TensorBoard, and histograms for every logger that shows them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from remax_lightning.callbacks.monitors import (
    response_kl,
    response_length,
    response_reward,
    rollout_output,
)
from remax_lightning.distributed import gather_over_ranks
from remax_lightning.errors import at_least, check_ranges
from remax_lightning.files import tolerate_disk_errors
from remax_lightning.loggers import logger_adapters
from remax_lightning.run_folder import run_folder
from remax_lightning.types import StepOutput

# group -> title of a chart -> tags of its curves
_CHARTS: dict[str, dict[str, list[str]]] = {
    "Reward": {
        "training: sampled and greedy": ["train/reward", "train/baseline_reward"],
        "validation: sampled and greedy": ["val/reward", "val/baseline_reward"],
        "training and validation": ["train/reward", "val/reward"],
    },
    "KL": {
        "training and validation": ["train/kl", "val/kl"],
        "of a response: mean and largest": ["train/kl_per_response", "train/kl_max"],
        "coefficient and share": ["train/kl_coef", "train/kl_share"],
    },
    "Responses": {
        "length": ["train/response_length", "val/response_length"],
        "truncated": ["train/truncation_rate", "val/truncation_rate"],
        "entropy": ["train/entropy", "val/entropy"],
    },
    "Baseline": {
        "variance of reward and advantage": ["train/reward_variance", "train/advantage_variance"],
        "reward variance ratio and correlation": ["train/reward_variance_ratio", "train/baseline_correlation"],
        "zero advantages and greedy wins": ["train/zero_advantage_share", "train/greedy_win_rate"],
    },
    "Optimizer": {
        "learning rate": ["train/lr"],
        "norm of the gradient, before clipping": ["train/grad_norm"],
    },
    "Time": {
        "seconds of a step": ["time/rollout_s", "time/reward_s", "time/train_s", "time/step_s"],
        "tokens per second": ["throughput/tokens_per_s", "throughput/rollout_tokens_per_s"],
    },
}


class TensorBoardReport(Callback):
    """Groups the run's scalars into charts (the Custom Scalars tab) and adds histograms of sampled responses.

    Histograms: `distribution/reward`, `distribution/response_length` (tokens) and, with a reference,
    `distribution/kl` (nats per response), over the responses of an optimizer step on all ranks. They go to TensorBoard,
    Weights & Biases, trackio and Comet; CSV and MLflow have none. The charts are TensorBoard's alone.

    Args:
        every_n_steps: optimizer steps between histograms; 0 turns them off. 10 keeps event files small.

    Raises:
        UserError: if `every_n_steps` is negative.
    """

    def __init__(self, every_n_steps: Annotated[int, at_least(0, zero="off")] = 10) -> None:
        super().__init__()
        check_ranges(TensorBoardReport.__init__, locals(), "tensorboard")
        self.every_n_steps = every_n_steps
        self._has_layout = False
        self._values: dict[str, list[Tensor]] = {}
        self._warned: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the state of an earlier fit."""
        self._has_layout = False
        self._values = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the responses of a micro-batch; write histograms at the end of every n-th optimizer step."""
        output = rollout_output(outputs)
        if output is None or not any(adapter.has_histograms for adapter in logger_adapters(trainer)):
            return
        if not self._has_layout:  # `output` shows that this module logs the values of the charts
            self._has_layout = True
            for adapter in logger_adapters(trainer) if trainer.is_global_zero else ():
                with self._tolerated(trainer):
                    adapter.log_charts(_CHARTS)
        # The step that this micro-batch belongs to; `global_step` counts the steps that are complete.
        step = trainer.global_step if output["closes_step"] else trainer.global_step + 1
        if self.every_n_steps == 0 or step % self.every_n_steps:
            return
        self._collect(output)
        if output["closes_step"]:
            self._write(trainer, step)

    def _collect(self, output: StepOutput) -> None:
        values = {"reward": response_reward(output), "response_length": response_length(output)}
        kl = response_kl(output)
        if kl is not None:
            values["kl"] = kl
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def _tolerated(self, trainer: Trainer) -> AbstractContextManager[None]:
        return tolerate_disk_errors(run_folder(trainer), self._warned, "Training goes on without this log.")

    def _write(self, trainer: Trainer, step: int) -> None:
        values, self._values = self._values, {}
        # ---- Values of all ranks in one histogram ----
        for name, parts in values.items():
            local = torch.cat(parts)  # [S] of this rank
            # NumPy has no histogram of NaN or infinity.
            gathered = gather_over_ranks(trainer, local[local.isfinite()])
            if gathered.numel() == 0 or not trainer.is_global_zero:
                continue
            for adapter in logger_adapters(trainer):
                with self._tolerated(trainer):
                    adapter.log_histogram(f"distribution/{name}", gathered.numpy(), step)
