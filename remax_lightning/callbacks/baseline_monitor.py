"""Monitors how the rewards of sampled and greedy responses compare."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from remax_lightning.callbacks.step_output import (
    log_step,
    response_baseline,
    response_reward,
    rollout_output,
)
from remax_lightning.distributed import sum_over_ranks
from remax_lightning.errors import UserError


class BaselineMonitor(Callback):
    """Logs statistics of the greedy baseline over the sampled responses of each optimizer step, on all ranks.

    Logged if there are greedy responses:

    - `train/reward_variance`: population variance of the reward.
    - `train/advantage_variance`: population variance of reward - baseline reward, before KL, clipping and
      whitening.
    - `train/reward_variance_ratio`: the second divided by the first. It leaves out how large the gradients of the
      responses are, so it does not say whether the baseline pays; `GradientVariance` does. NaN if all rewards are
      equal.
    - `train/baseline_correlation`: Pearson correlation of reward and baseline reward. NaN if either is
      constant.
    - `train/zero_advantage_share`: share of responses whose reward equals the baseline; they have no gradient.
    - `train/greedy_win_rate`: share of responses whose greedy counterpart has a higher reward.

    Args:
        patience: warn once if the reward variance ratio is above 1 for this many consecutive optimizer steps. 50 steps
            exclude chance.

    Raises:
        UserError: if `patience` is below 1.
    """

    def __init__(self, patience: int = 50) -> None:
        super().__init__()
        if patience < 1:
            raise UserError(f"baseline_monitor.patience must be at least 1 (optimizer steps), got {patience}")
        self.patience = patience
        self._reward: list[Tensor] = []  # [S] of each micro-batch, like the next one
        self._baseline: list[Tensor] = []
        self._names: list[str] = []  # what was logged
        self._steps_above_one = 0
        self._warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the state of an earlier fit."""
        self._clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect a micro-batch; log at the end of the optimizer step."""
        output = rollout_output(outputs)
        baseline = None if output is None else response_baseline(output)
        if output is None:
            return
        if baseline is None:
            # A rollout without greedy responses between some with them; Lightning would log the last values again.
            if output["closes_step"] and self._names:
                log_step(pl_module, dict.fromkeys(self._names, math.nan))
            return
        self._reward.append(response_reward(output))
        self._baseline.append(baseline)
        if not output["closes_step"]:
            return
        # ---- The optimizer step is complete: reduce, log, warn ----
        values = _statistics(trainer, torch.cat(self._reward), torch.cat(self._baseline))
        self._clear()
        self._names = list(values)
        log_step(pl_module, values)
        self._warn_if_above_one(values["train/reward_variance_ratio"])

    def _clear(self) -> None:
        self._reward, self._baseline = [], []

    def _warn_if_above_one(self, ratio: float) -> None:
        if math.isnan(ratio):  # all rewards are equal
            return
        self._steps_above_one = self._steps_above_one + 1 if ratio > 1 else 0
        if self._steps_above_one >= self.patience and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"The variance of reward - baseline was above that of the reward in {self._steps_above_one}"
                f" consecutive optimizer steps (train/reward_variance_ratio is now {ratio:.3g}). That alone does not"
                " say that the greedy baseline costs more than it saves: `remax baselines` measures it."
            )


def _statistics(trainer: Trainer, reward: Tensor, baseline: Tensor) -> dict[str, float]:
    """Return the values to log, from the rewards and baseline rewards `[S]` (float64) of this rank."""
    # ---- Means over all ranks ----
    means = [reward.sum(), baseline.sum(), (reward == baseline).sum(), (baseline > reward).sum()]
    count, *sums = sum_over_ranks(trainer, [float(reward.numel()), *(value.item() for value in means)])
    reward_mean, baseline_mean, zero_share, win_rate = (value / count for value in sums)
    # ---- Central moments, in a second reduction: a variance from sums of squares would lose its digits if rewards are
    # large and close to each other ----
    x, y = reward - reward_mean, baseline - baseline_mean
    moments = [(x * x).sum(), (y * y).sum(), (x * y).sum(), ((x - y) ** 2).sum()]
    xx, yy, xy, dd = (v / count for v in sum_over_ranks(trainer, [value.item() for value in moments]))
    # NaN and not a missing key: Lightning would log the last value again.
    return {
        "train/reward_variance": xx,
        "train/advantage_variance": dd,
        "train/reward_variance_ratio": dd / xx if xx > 0 else math.nan,
        "train/baseline_correlation": xy / (xx**0.5 * yy**0.5) if xx > 0 and yy > 0 else math.nan,
        "train/zero_advantage_share": zero_share,
        "train/greedy_win_rate": win_rate,
    }
