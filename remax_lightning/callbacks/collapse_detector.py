"""Detects a collapsing policy with guards over the figures of the last optimizer steps, on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b
from typing import Annotated, Any, Literal, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from remax_lightning.callbacks.monitors import (
    log_step,
    response_kl,
    response_length,
    response_reward,
    rollout_output,
)
from remax_lightning.distributed import gather_over_ranks, sum_over_ranks
from remax_lightning.errors import UserError, above, at_least, check_ranges
from remax_lightning.types import StepOutput

GROWTH = 1.25
"""Growth of the response length from which `max_length_correlation` counts: without growth a correlation is
harmless."""

NOT_FINITE = "not_finite"
"""The guard without a threshold."""

ADVICE = {
    NOT_FINITE: (
        "the step is skipped if its gradient is not finite either; if it happens again, lower the learning rate, clip"
        " gradients (trainer.gradient_clip_val) and use an earlier checkpoint"
    ),
    "max_truncation_rate": (
        "raise model.sampling.max_response_length, or set model.advantage.overlong: penalize; the"
        " reward judges responses without their end"
    ),
    "min_eos_share": (
        "check whether the reward prefers long responses; set model.advantage.overlong: penalize, or lower"
        " the learning rate"
    ),
    "min_entropy": (
        "sampled and greedy responses are nearly the same, so gradients are small: stop if the reward has"
        " reached its maximum, otherwise raise model.kl_coef or lower the learning rate"
    ),
    "min_entropy_share": (
        "stop if the reward has reached its maximum, otherwise raise model.kl_coef or lower the learning rate"
    ),
    "max_kl_slope": "lower the learning rate, clip gradients (trainer.gradient_clip_val) or raise model.kl_coef",
    "max_kl": (
        "such responses are far from the training data of the reward model: read the samples, use an earlier"
        " checkpoint, raise model.kl_coef"
    ),
    "max_length_correlation": (
        "the reward rewards length: read the samples, and remove length from the reward or"
        " lower model.sampling.max_response_length"
    ),
    "min_distinct_share": (
        "the policy gives the same response to many prompts: read the samples, raise model.kl_coef or lower"
        " the learning rate"
    ),
}
"""What to do when a guard warns, by the name of its threshold."""


Share: TypeAlias = Annotated[float | None, above(0, at_most=1)]
Threshold: TypeAlias = Annotated[float | None, above(0)]
"""Limits of the guards; shares and correlations are at most 1."""


class CollapseDetector(Callback):
    """Warns if the policy is collapsing, and can stop the run. [guards.md](guards.md) says what to do.

    Each guard watches means over the last `window` optimizer steps, over all sampled responses of all ranks. Some
    compare them with the first `window` steps of the run. A guard warns once when its threshold is crossed, and again
    only after `window` consecutive steps without a crossing. A threshold of None turns a guard off. One guard has no
    window and no threshold: an entropy, a KL or a reward that is not finite is an alarm at its step.

    Logged at each optimizer step, NaN if undefined:

    - `train/eos_rate`: share of responses that end with EOS or a stop string.
    - `train/distinct_share`: share of distinct texts among the responses.
    - `train/length_correlation`: Pearson correlation of reward and response length.
    - `train/kl_slope`: slope of the least-squares line through the KL in the window, nats per response and optimizer
      step.
    - `train/collapse_alarms`: number of guards whose threshold is crossed.

    Args:
        window: optimizer steps per mean; no guard warns before that many. 20 steps average out chance and are short
            compared with a run.
        action: what a guard does: `warn`, or warn and `stop` the run after the optimizer step.
        max_truncation_rate: share of responses at the length limit. Above 0.5, most scored responses have no end.
        min_eos_share: lower limit of the EOS rate as a share of its start. 0.7 warns before most responses are
            truncated.
        min_entropy: nats per token. Below 0.001 a response of 100 tokens hardly ever differs from the greedy one.
        min_entropy_share: lower limit of the entropy as a share of its start. 0.02, because a task with one right
            response leaves a few hundredths once it is learned.
        max_kl_slope: nats per response and optimizer step. A healthy run gains one nat in tens to hundreds of steps.
        max_kl: nats per response. Above 100, responses are far from the training data of a reward model (Gao et al.
            2022, arXiv 2210.10760: the reward of a better judge falls well before).
        max_length_correlation: correlation of reward and length, if responses are 25 % longer than at the start. At
            0.7, length explains half of the variance of the reward.
        min_distinct_share: lower limit of the share of distinct responses, as a share of its start. Relative, because
            a yes-or-no task has few distinct responses from the start.

    Raises:
        UserError: if a value is out of its range.
    """

    def __init__(
        self,
        window: Annotated[int, at_least(2, note="optimizer steps")] = 20,
        action: Literal["warn", "stop"] = "warn",
        max_truncation_rate: Share = 0.5,
        min_eos_share: Share = 0.7,
        min_entropy: Threshold = 0.001,
        min_entropy_share: Share = 0.02,
        max_kl_slope: Threshold = 1.0,
        max_kl: Threshold = 100.0,
        max_length_correlation: Share = 0.7,
        min_distinct_share: Share = 0.2,
    ) -> None:
        super().__init__()
        check_ranges(CollapseDetector.__init__, locals(), "collapse")
        if action not in ("warn", "stop"):
            raise UserError(f"collapse.action must be warn or stop, got {action!r}")
        self.window = window
        self.action = action
        self.thresholds = {
            "max_truncation_rate": max_truncation_rate,
            "min_eos_share": min_eos_share,
            "min_entropy": min_entropy,
            "min_entropy_share": min_entropy_share,
            "max_kl_slope": max_kl_slope,
            "max_kl": max_kl,
            "max_length_correlation": max_length_correlation,
            "min_distinct_share": min_distinct_share,
        }
        self._step = StepFigures()
        self._reset_windows()

    def _reset_windows(self) -> None:
        self._recent: dict[str, list[float]] = {}  # the last `window` values of each figure
        self._start: dict[str, float] = {}  # its mean over the first full window
        self._calm: dict[str, int] = {}  # steps since the last crossing, of guards that have warned

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the state of an earlier fit; a resumed fit keeps the state of its checkpoint."""
        self._step = StepFigures()
        if trainer.global_step == 0:
            self._reset_windows()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect a micro-batch; at the end of the optimizer step log, warn and decide whether to stop."""
        output = rollout_output(outputs)
        if output is None:
            return
        self._step.add(output)
        if not output["closes_step"]:
            return
        # ---- Figures over all ranks, then windows, guards and alarms ----
        figures, self._step = self._step.reduce(trainer), StepFigures()  # the next step starts with none
        self._update_windows(figures)
        means = {name: math.fsum(values) / len(values) for name, values in self._recent.items()}
        slope = _slope(self._recent.get("kl", []), self.window)
        crossed = self._find_crossed(means, slope) | _find_nonfinite(figures)
        alarms = self._select_new_alarms(crossed)
        names = ("eos_rate", "distinct_share", "length_correlation")
        log_step(
            pl_module,
            {f"train/{name}": figures.get(name, math.nan) for name in names}
            | {"train/kl_slope": slope, "train/collapse_alarms": float(len(crossed))},
        )
        for name in alarms:
            self._warn_or_stop(name, crossed[name], trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the windows and the start values of the guards."""
        return {"recent": self._recent, "start": self._start, "calm": self._calm}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the windows and start values; a shorter window keeps the latest steps."""
        self._recent = {name: list(values)[-self.window :] for name, values in state_dict["recent"].items()}
        self._start, self._calm = dict(state_dict["start"]), dict(state_dict["calm"])

    def _update_windows(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            if not math.isfinite(value):  # an undefined figure leaves the window as it is
                continue
            recent = self._recent.setdefault(name, [])
            recent.append(value)
            del recent[: -self.window]
            # The first full window is the start that later ones are compared with.
            if name not in self._start and len(recent) == self.window:
                self._start[name] = math.fsum(recent) / self.window

    def _find_crossed(self, means: Mapping[str, float], slope: float) -> dict[str, str]:
        """Return the guards whose threshold is crossed, with a description of the crossing."""
        # Only figures with a full window count, because their start is known.
        full = {name: means[name] for name in self._start}

        def relative_to_start(name: str) -> float:
            start = self._start.get(name, 0.0)
            return full[name] / start if start > 0 else math.nan

        # ---- The watched value of each guard, NaN without a full window; NaN crosses no threshold ----
        grown = relative_to_start("response_length") >= GROWTH
        values = {
            "max_truncation_rate": 1 - full.get("eos_rate", math.nan),
            "min_eos_share": relative_to_start("eos_rate"),
            "min_entropy": full.get("entropy", math.nan),
            "min_entropy_share": relative_to_start("entropy"),
            "max_kl_slope": slope,
            "max_kl": full.get("kl", math.nan),
            "max_length_correlation": full.get("length_correlation", math.nan) if grown else math.nan,
            "min_distinct_share": relative_to_start("distinct_share"),
        }
        crossed = {}
        for name, value in values.items():
            limit = self.thresholds[name]
            if limit is not None and (value > limit if name.startswith("max_") else value < limit):
                crossed[name] = f"{_WATCHED[name]} is {value:.3g} over the last {self.window} optimizer steps"
        return crossed

    def _select_new_alarms(self, crossed: Mapping[str, str]) -> list[str]:
        """Return the guards that were calm before, and update how long each has been calm."""
        # A guard is calm again after a window without a crossing.
        new = [name for name in crossed if name not in self._calm]
        for name in list(self._calm):
            self._calm[name] += 1
            if name not in crossed and self._calm[name] >= self.window:
                del self._calm[name]
        self._calm |= dict.fromkeys(crossed, 0)
        return new

    def _warn_or_stop(self, name: str, what: str, trainer: Trainer) -> None:
        if name == NOT_FINITE:
            rank_zero_warn(f"Optimizer step {trainer.global_step}: {what}. What to do: {ADVICE[name]}.")
        else:
            side = "above" if name.startswith("max_") else "below"
            rank_zero_warn(
                f"Optimizer step {trainer.global_step}: {what}, {side} collapse.{name} = {self.thresholds[name]:g}."
                f" What to do: {ADVICE[name]}. collapse.{name}: null turns this guard off."
            )
        if self.action == "stop" and not trainer.should_stop:
            trainer.should_stop = True
            rank_zero_info(f"Stopping at optimizer step {trainer.global_step}, because collapse.action is stop.")


_WATCHED = {
    "max_truncation_rate": "the share of responses at the length limit",
    "min_eos_share": "the EOS rate, relative to the start,",
    "min_entropy": "the entropy (nats per token)",
    "min_entropy_share": "the entropy, relative to the start,",
    "max_kl_slope": "the growth of the KL (nats per response and step)",
    "max_kl": "the KL (nats per response)",
    "max_length_correlation": "the correlation of reward and length, while responses grow,",
    "min_distinct_share": "the share of distinct responses, relative to the start,",
}


def _find_nonfinite(figures: Mapping[str, float]) -> dict[str, str]:
    """Return the alarm of a step with figures that are not finite; `StepFigures` has told undefined ones apart."""
    names = [name.removeprefix(f"{NOT_FINITE}/") for name in figures if name.startswith(f"{NOT_FINITE}/")]
    return {NOT_FINITE: f"not finite: {', '.join(names)}"} if names else {}


def _slope(values: list[float], window: int) -> float:
    """Return the slope of the least-squares line through `window` values; NaN if there are fewer."""
    if len(values) < window:
        return math.nan
    # Covariance over variance of the steps 0, 1, ..., whose squared deviations add up to window (window^2 - 1) / 12.
    middle, mean = (window - 1) / 2, math.fsum(values) / window
    products = math.fsum((i - middle) * (value - mean) for i, value in enumerate(values))
    return products / (window * (window**2 - 1) / 12)


class StepFigures:
    """Collects the micro-batches of an optimizer step and reduces them over all ranks."""

    def __init__(self) -> None:
        self._reward: list[Tensor] = []  # [S] of each micro-batch, like the next two
        self._length: list[Tensor] = []
        self._ended: list[Tensor] = []
        self._texts: list[float] = []
        self._sums = dict.fromkeys(("entropy", "entropy_tokens", "kl", "kl_responses"), 0.0)

    def add(self, output: StepOutput) -> None:
        """Add a micro-batch."""
        # ---- Of each response ----
        responses = output["rollout"].sampled
        self._reward.append(response_reward(output))
        self._length.append(response_length(output))
        self._ended.append(~responses.truncated.cpu())
        self._texts += [_text_hash(text) for text in responses.texts]
        # ---- Sums over tokens and responses ----
        mask = output["entropy_mask"]
        self._sums["entropy"] += output["entropy"].detach().double().masked_fill(~mask, 0.0).sum().item()
        self._sums["entropy_tokens"] += mask.sum().item()
        if (kl := response_kl(output)) is not None:
            self._sums["kl"] += kl.sum().item()
            self._sums["kl_responses"] += kl.numel()

    def reduce(self, trainer: Trainer) -> dict[str, float]:
        """Return the figures of the step over all ranks; NaN if undefined.

        Returns:
            `eos_rate`, `response_length` (tokens), `entropy` (nats per token), `kl` (nats per response),
            `length_correlation` (Pearson, of reward and length) and `distinct_share`, the same on every rank; also
            `not_finite/NAME` where the total of reward, entropy or KL is not finite.
        """
        reward, length, ended = torch.cat(self._reward), torch.cat(self._length), torch.cat(self._ended)  # [S]
        texts, sums = torch.tensor(self._texts, dtype=torch.float64), list(self._sums.values())
        # ---- Sums over all ranks ----
        local = [float(reward.numel()), ended.sum().item(), length.sum().item(), reward.sum().item(), *sums]
        count, num_ended, tokens, rewards, entropy, entropy_tokens, kl, kl_responses = sum_over_ranks(trainer, local)
        # Central moments in a second reduction: a variance from sums of squares would lose its digits.
        x, y = reward - rewards / count, length - tokens / count
        xx, yy, xy = sum_over_ranks(trainer, [(x * x).sum().item(), (y * y).sum().item(), (x * y).sum().item()])
        # ---- Totals that are not finite, then means ----
        totals = {"reward": rewards, "entropy": entropy, "kl": kl}
        broken = {f"{NOT_FINITE}/{name}": total for name, total in totals.items() if not math.isfinite(total)}
        return broken | {
            "eos_rate": num_ended / count,
            "response_length": tokens / count,
            "entropy": entropy / entropy_tokens if entropy_tokens else math.nan,
            "kl": kl / kl_responses if kl_responses else math.nan,
            "length_correlation": xy / (xx**0.5 * yy**0.5) if xx > 0 and yy > 0 else math.nan,
            "distinct_share": len(gather_over_ranks(trainer, texts).unique()) / count,
        }


def _text_hash(text: str) -> float:
    """Return a 48-bit hash of a text as float64, the same on every rank, so that ranks can gather it."""
    # 48 bits fit into the 53 of a float64, so equal hashes are equal texts; `hash` has another seed in each process.
    return float(int.from_bytes(blake2b(text.encode("utf-8", "backslashreplace"), digest_size=6).digest(), "big"))
