"""What is reported of a step, and at which step: figures by name for the logs, predictions as plain dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from torch import Tensor

from remax_lightning.types import Responses, Rollout, StepOutput

Figures: TypeAlias = dict[str, tuple[Tensor, Tensor | None]]
"""Values by name, of which the mean is logged, with a mask or None."""


class GlobalStepConnector(_LoggerConnector):
    """Lightning's way to its loggers, with the number of optimizer steps done as the step of what is logged.

    Lightning logs a training step, and the validation after it, under the number of steps before it. Samples,
    histograms and checkpoints are numbered by the steps done, so that one moment had two numbers.
    """

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log at `trainer.global_step`, unless the caller or a metric called `step` says another."""
        if metrics and step is None and "step" not in metrics:
            step = self.trainer.global_step
            metrics = {"epoch": torch.tensor(self.trainer.current_epoch), **metrics}
        super().log_metrics(metrics, step)


def log_at_global_step(trainer: Trainer) -> None:
    """Log every figure of a run, of callbacks too, at the optimizer steps done; call this before a run starts."""
    if type(trainer._logger_connector) is _LoggerConnector:
        trainer._logger_connector = GlobalStepConnector(trainer)


class MeanMetrics:
    """Weighted sums by name, gathered over the parts of an optimizer step; one reduction over ranks makes means.

    All names share that reduction, in float64. `torchmetrics.MeanMetric` gathers two tensors for each name, in float32.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, figures: Figures) -> None:
        """Add values, or those under their mask, each with weight 1."""
        for name, (values, mask) in figures.items():
            # Counts of tokens outgrow float32; Apple's GPUs have nothing wider.
            dtype = torch.float32 if values.device.type == "mps" else torch.float64
            weights = torch.ones_like(values, dtype=dtype) if mask is None else mask.to(dtype)
            weighted = values.detach().to(dtype).masked_fill(weights == 0, 0.0)
            pair = torch.stack([weighted.sum(), weights.sum()])  # sum and count
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means by name, and reset; `reduce` sums a tensor over ranks."""
        names, sums = list(self._sums), torch.stack(list(self._sums.values()))
        self._sums = {}
        total, weight = reduce(sums).unbind(-1)
        return dict(zip(names, (total / weight.clamp_min(1)).tolist(), strict=True))


def step_values(output: StepOutput) -> Figures:
    """Return the values to log of a step, in training and in evaluation."""
    rollout = output["rollout"]
    mask = rollout.sampled.response_mask
    values: Figures = {
        "reward": (rollout.reward, None),
        "advantage": (output["advantages"], mask),
        "entropy": (output["entropy"], output["entropy_mask"]),
        "response_length": (mask.sum(-1).float(), None),
        "truncation_rate": (rollout.sampled.truncated.float(), None),
    }
    if rollout.baseline_reward is not None:
        values["baseline_reward"] = (rollout.baseline_reward, None)
    if output["kl"] is not None:
        values["kl"] = (output["kl"], mask)
    for name, part in rollout.reward_parts.items():
        values[f"reward_part/{name}"] = (part, None)
    return values


def predictions(rollout: Rollout) -> list[dict[str, Any]]:
    """Return one JSON-ready dictionary per sampled response, with the greedy response of its prompt."""
    greedy = cast(Responses, rollout.greedy)
    baseline = cast(Tensor, rollout.baseline_reward).tolist()
    lengths = rollout.sampled.response_mask.sum(-1).tolist()
    rows = []
    for i, reward in enumerate(rollout.reward.tolist()):
        prompt = i // rollout.num_samples
        rows.append(
            {
                "prompt": rollout.prompt.prompts[prompt],
                "response": rollout.sampled.texts[i],
                "reward": reward,
                "greedy_response": greedy.texts[prompt],
                "baseline_reward": baseline[prompt],
                "response_length": lengths[i],
                "truncated": bool(rollout.sampled.truncated[i]),
                "row": rollout.prompt.rows[prompt],
            }
        )
    return rows
