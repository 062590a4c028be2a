"""Monitors the KL of policy and reference: logs it, adapts its coefficient, stops the run at a limit."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from remax_lightning.callbacks.step_output import log_step, response_kl, response_reward, rollout_output
from remax_lightning.distributed import max_over_ranks, sum_over_ranks
from remax_lightning.errors import UserError
from remax_lightning.types import StepOutput


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
        target_kl: float | None = None,
        adaptive: bool = False,
        horizon: int = 10_000,
        stop_kl: float | None = None,
    ) -> None:
        super().__init__()
        # ---- Options in their range, and those that need each other ----
        for name, value in (("target_kl", target_kl), ("stop_kl", stop_kl)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"kl_monitor.{name} must be above 0 and finite (nats per response), got {value}")
        if horizon < 1:
            raise UserError(f"kl_monitor.horizon must be at least 1 (sampled responses), got {horizon}")
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
