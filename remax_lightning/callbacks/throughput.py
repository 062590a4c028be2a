"""Logs the time and the throughput of optimizer steps."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from remax_lightning.callbacks.step_output import log_step, rollout_output
from remax_lightning.distributed import sum_over_ranks
from remax_lightning.types import PromptBatch, StepOutput


class Throughput(Callback):
    """Logs seconds by phase and tokens per second of each optimizer step.

    Seconds are sums over the micro-batches of the step and means over ranks. Tokens are those of sampled and greedy
    responses, summed over ranks.

    - `time/rollout_s`, `time/reward_s`: as the module measures them; the pass of the reference is part of `reward_s`.
    - `time/train_s`: the rest, from the start to the end of each batch: forward, backward, optimizer, and
      waiting for other ranks. It excludes data loading and validation.
    - `time/step_s`: the sum of the three.
    - `throughput/tokens_per_s`: trained tokens (with their greedy responses) per second of the step. If several
      optimizer steps share a rollout batch, the first one includes the whole time of the rollout.
    - `throughput/rollout_tokens_per_s`: tokens per second of the rollout, of the latest rollout batch whose last
      micro-batch was trained on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._started = 0.0
        self._rollout_rate: float | None = None  # logged again until the next rollout has ended
        self._clear_step()
        self._clear_rollout()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the state of an earlier fit."""
        self._clear_step()
        self._clear_rollout()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the timer."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the timer; log at the end of the optimizer step."""
        output = rollout_output(outputs)
        if output is None:
            return
        if pl_module.device.type == "cuda":  # kernels are asynchronous
            torch.cuda.synchronize(pl_module.device)
        self._add(output, time.perf_counter() - self._started)
        if output["closes_step"]:
            # A rollout batch is trained on in several micro-batches, perhaps over several optimizer steps.
            ends_rollout = not isinstance(batch, PromptBatch) or batch.micro_batch_index == batch.num_micro_batches - 1
            log_step(pl_module, self._reduce_step(trainer, ends_rollout))

    def _add(self, output: StepOutput, seconds: float) -> None:
        rollout, times = output["rollout"], output["times"]
        tokens = int(rollout.sampled.response_mask.sum())
        tokens += 0 if rollout.greedy is None else int(rollout.greedy.response_mask.sum())
        # ---- Of the optimizer step, then of the rollout batch ----
        self._rollout_s += times["rollout"]
        self._reward_s += times["reward"]
        self._step_s += seconds
        self._tokens += tokens
        self._batch_rollout_s += times["rollout"]
        self._batch_tokens += tokens

    def _reduce_step(self, trainer: Trainer, ends_rollout: bool) -> dict[str, float]:
        local = [
            self._rollout_s,
            self._reward_s,
            self._step_s,
            self._batch_rollout_s,
            self._tokens,
            self._batch_tokens,
        ]
        # ---- Means of seconds, sums of tokens ----
        *seconds, tokens, batch_tokens = sum_over_ranks(trainer, local)
        rollout_s, reward_s, step_s, batch_rollout_s = (value / trainer.world_size for value in seconds)
        self._clear_step()
        values = {
            "time/rollout_s": rollout_s,
            "time/reward_s": reward_s,
            "time/train_s": max(step_s - rollout_s - reward_s, 0.0),
            "time/step_s": step_s,
            "throughput/tokens_per_s": tokens / step_s,
        }
        # ---- The rate of a whole rollout, not of the part that fell into this step ----
        if ends_rollout:
            self._clear_rollout()
            if batch_rollout_s > 0:
                self._rollout_rate = batch_tokens / batch_rollout_s
        if self._rollout_rate is not None:
            values["throughput/rollout_tokens_per_s"] = self._rollout_rate
        return values

    def _clear_step(self) -> None:
        self._rollout_s = self._reward_s = self._step_s = 0.0
        self._tokens = 0

    def _clear_rollout(self) -> None:
        self._batch_rollout_s = 0.0
        self._batch_tokens = 0
