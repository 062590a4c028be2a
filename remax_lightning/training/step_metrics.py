"""Metrics of a step for the logs, and predictions as dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from remax_lightning.types import Responses, Rollout, StepOutput

Figures: TypeAlias = dict[str, tuple[Tensor, Tensor | None]]
"""Values by name, of which the mean is logged, with a mask or None."""


class MeanMetrics:
    """Collects sums and counts by name over the micro-batches of a step; one reduction over ranks gives the means."""

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
