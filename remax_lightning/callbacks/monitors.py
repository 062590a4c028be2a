"""Monitors of what training steps return, the KL and the greedy baseline, and helpers that all callbacks share.

Sums over ranks are in float64. Decisions use only reduced numbers, so that all ranks decide the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from remax_lightning.distributed import max_over_ranks, sum_over_ranks
from remax_lightning.errors import UserError, above, at_least, check_ranges
from remax_lightning.types import Rollout, StepOutput

# ---- Values from the output of a step, and logging ----


def rollout_output(outputs: object) -> StepOutput | None:
    """Return `outputs` if they come from a step of `ReMaxModule`, else None."""
    if isinstance(outputs, Mapping) and isinstance(outputs.get("rollout"), Rollout):
        return cast("StepOutput", outputs)
    return None


def response_kl(output: StepOutput) -> Tensor | None:
    """Return the KL of each sampled response, `[S]` in nats (sum over tokens); None without a reference."""
    kl = output["kl"]  # [S, R], 0 on padding
    return None if kl is None else kl.detach().double().sum(dim=-1).cpu()


def response_advantage(output: StepOutput) -> Tensor:
    """Return the advantage of each sampled response, `[S]`: the mean over its tokens."""
    mask = output["rollout"].sampled.response_mask  # [S, R]
    advantages = output["advantages"].detach().double() * mask  # [S, R]
    return (advantages.sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)).cpu()


def response_reward(output: StepOutput) -> Tensor:
    """Return the reward of each sampled response, `[S]`."""
    return output["rollout"].reward.detach().double().cpu()


def response_baseline(output: StepOutput) -> Tensor | None:
    """Return the greedy reward of each sampled response's prompt, `[S]`, or None without greedy responses."""
    rollout = output["rollout"]
    if rollout.baseline_reward is None:
        return None
    # [B] -> [S]: one greedy response per prompt, n sampled ones
    return rollout.baseline_reward.detach().double().cpu().repeat_interleave(rollout.num_samples)


def response_length(output: StepOutput) -> Tensor:
    """Return the length of each sampled response, `[S]` in tokens, end-of-sequence token included."""
    return output["rollout"].sampled.response_mask.sum(dim=-1).double().cpu()


def log_step(pl_module: LightningModule, values: Mapping[str, float]) -> None:
    """Log numbers of the optimizer step that has just ended; `log_every_n_steps` applies."""
    pl_module.log_dict(dict(values), on_step=True, on_epoch=False, batch_size=1)


def is_dry_run(trainer: Trainer) -> bool:
    """Return whether this is a `fast_dev_run`, which writes no files."""
    return bool(cast("Any", trainer).fast_dev_run)


def check_monitored(trainer: Trainer) -> None:
    """Refuse callbacks of Lightning that follow a figure of `val/` which the first validation has not logged.

    Lightning notices at the end of an epoch, or where the first checkpoint is due.

    Raises:
        UserError: naming the callback and the figures that there are.
    """
    figures = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
    for callback in cast("Any", trainer).callbacks:
        name = callback.monitor if isinstance(callback, EarlyStopping | ModelCheckpoint) else None
        is_missed = figures and name is not None and name.startswith("val/") and name not in figures
        if is_missed and getattr(callback, "strict", True):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} has monitor {name!r}, which no validation logs; there"
                f" are {', '.join(figures)}"
            )


# ---- The KL to the reference ----


class KLMonitor(Callback):
    """Logs the KL of each optimizer step, can adapt its coefficient, and can stop a run at a limit.

    The KL is in nats per response: the estimate summed over the tokens of a response, averaged over the sampled
    responses of the optimizer step on all ranks.

    Logged at each optimizer step, if there is a reference and its KL enters the reward or the loss:

    - `train/kl_per_response`: the mean KL, which `target_kl` and `stop_kl` refer to.
    - `train/kl_max`: the largest KL of one response, in nats.
    - `train/kl_share`: `kl_coef * sum|KL| / (kl_coef * sum|KL| + sum|reward|)`, sums over responses. 0: no
      penalty; 0.5: penalty and reward are equally large; 1: no reward.
    - `train/kl_coef`: the coefficient of this step.

    Args:
        target_kl: target of the adaptive coefficient, in nats per response. Needs `adaptive`.
        adaptive: change the module's `kl_coef` after each optimizer step in proportion to the error,
            `kl_coef *= 1 + clip(KL / target_kl - 1, -0.2, 0.2) * responses / horizon` (Ziegler et al.
            2019, arXiv 1909.08593, section 2.2; the horizon comes from their code). Off, because the ReMax paper
            uses a fixed coefficient.
        horizon: time scale of the controller in sampled responses; smaller is faster. 10,000 as in that code.
        stop_kl: stop the run after an optimizer step with a KL above this, in nats per response, or with one that is
            not finite.

    Raises:
        UserError: if a value is out of its range, only one of `target_kl` and `adaptive` is set, the adaptive
            coefficient starts at 0, or there is no KL to act on.
    """

    def __init__(
        self,
        target_kl: Annotated[float | None, above(0, note="nats per response")] = None,
        adaptive: bool = False,
        horizon: Annotated[int, at_least(1, note="sampled responses")] = 10_000,
        stop_kl: Annotated[float | None, above(0, note="nats per response")] = None,
    ) -> None:
        super().__init__()
        # ---- Options in their range, and those that need each other ----
        check_ranges(KLMonitor.__init__, locals(), "kl_monitor")
        if adaptive and target_kl is None:
            raise UserError("kl_monitor.target_kl must be set where kl_monitor.adaptive is true, got null")
        if target_kl is not None and not adaptive:
            raise UserError(
                f"kl_monitor.target_kl is used by the adaptive coefficient only, got {target_kl} with "
                "kl_monitor.adaptive: false; set adaptive: true, or use kl_monitor.stop_kl to stop at a KL"
            )
        self.target_kl = target_kl
        self.adaptive = adaptive
        self.horizon = horizon
        self.stop_kl = stop_kl
        self._kl_coef: float | None = None  # the adapted one, which a checkpoint keeps
        self._kl: list[Tensor] = []  # [S] of each micro-batch, like the next one
        self._reward: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module the coefficient of the checkpoint."""
        self._clear()
        module = cast("Any", pl_module)
        if not self.adaptive or not hasattr(module, "kl_coef"):
            return
        if self._kl_coef is not None:
            module.kl_coef = self._kl_coef
        if module.kl_coef == 0:
            raise UserError(
                "kl_monitor.adaptive multiplies model.kl_coef, which must then be above 0, got 0; "
                "set it to a start value such as 0.05"
            )
        self._kl_coef = float(module.kl_coef)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect a micro-batch; at the end of the optimizer step log, adapt and decide whether to stop."""
        output = rollout_output(outputs)
        if output is None or not self._collect(output) or not output["closes_step"]:
            return
        kl, reward = torch.cat(self._kl), torch.cat(self._reward)
        self._clear()
        # ---- Sums over the responses of all ranks ----
        local = [kl.sum().item(), kl.abs().sum().item(), reward.abs().sum().item(), float(kl.numel())]
        kl_sum, kl_size, reward_size, responses = sum_over_ranks(trainer, local)
        kl_max = max_over_ranks(trainer, [kl.max().item()])[0]
        kl_coef = float(cast("Any", pl_module).kl_coef)
        # ---- Share of the penalty in penalty and reward ----
        penalty = kl_coef * kl_size
        share = penalty / (penalty + reward_size) if penalty + reward_size > 0 else 0.0
        mean_kl = kl_sum / responses
        values = {"train/kl_per_response": mean_kl, "train/kl_max": kl_max}
        log_step(pl_module, {**values, "train/kl_share": share, "train/kl_coef": kl_coef})
        if self.adaptive:
            self._adapt_coefficient(pl_module, mean_kl, responses)
        self._stop_if_too_far(trainer, mean_kl)

    def state_dict(self) -> dict[str, Any]:
        """Return the adaptive coefficient; None if it is fixed."""
        return {"kl_coef": self._kl_coef}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the adaptive coefficient."""
        self._kl_coef = state_dict["kl_coef"]

    def _collect(self, output: StepOutput) -> bool:
        kl = response_kl(output)
        if kl is None:
            if self.adaptive or self.stop_kl is not None:
                key, off = ("adaptive", "false") if self.adaptive else ("stop_kl", "null")
                raise UserError(
                    f"kl_monitor.{key} needs a KL estimate, which training computes only with a reference whose KL"
                    " enters the reward or the loss; set model.kl_coef (with model.kl.credit to_go or one_step) or"
                    f" model.kl.loss_coef above 0, or kl_monitor.{key}: {off}"
                )
            return False
        self._kl.append(kl)
        self._reward.append(response_reward(output))
        return True

    def _clear(self) -> None:
        self._kl, self._reward = [], []

    def _adapt_coefficient(self, pl_module: LightningModule, mean_kl: float, responses: float) -> None:
        if self.target_kl is None or not math.isfinite(mean_kl):
            return  # one bad step must not change the coefficient for the rest of the run
        # the proportional error, clipped to 20 %
        error = min(max(mean_kl / self.target_kl - 1, -0.2), 0.2)
        module = cast("Any", pl_module)
        # At most one horizon: more than five horizons in a step would make the coefficient negative.
        module.kl_coef *= 1 + error * min(responses / self.horizon, 1.0)
        self._kl_coef = float(module.kl_coef)

    def _stop_if_too_far(self, trainer: Trainer, mean_kl: float) -> None:
        # NaN compares as false: it must not pass for a KL below the limit.
        if self.stop_kl is None or mean_kl <= self.stop_kl or trainer.should_stop:
            return
        trainer.should_stop = True
        rank_zero_info(
            f"Stopping at optimizer step {trainer.global_step}: KL {mean_kl:.4g} nats per response is "
            f"{'above' if math.isfinite(mean_kl) else 'not finite, which is beyond'} kl_monitor.stop_kl ="
            f" {self.stop_kl:g}."
        )


# ---- The greedy baseline ----


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

    def __init__(self, patience: Annotated[int, at_least(1, note="optimizer steps")] = 50) -> None:
        super().__init__()
        check_ranges(BaselineMonitor.__init__, locals(), "baseline_monitor")
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
