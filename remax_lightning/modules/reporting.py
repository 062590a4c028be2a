"""What is reported of a step: figures by name for the logs, and predictions as plain dictionaries."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from remax_lightning.batch import Responses, Rollout, StepOutput


class Sums:
    """Weighted sums by name, gathered over the parts of an optimizer step; one reduction over ranks makes means."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add the values, or those under `mask`, each with weight 1."""
        # Counts of tokens outgrow float32; Apple's GPUs have nothing wider.
        values = values.detach().to(torch.float32 if values.device.type == "mps" else torch.float64)
        kept = torch.ones_like(values) if mask is None else mask.to(values.dtype)
        pair = torch.stack([values.masked_fill(kept == 0, 0.0).sum(), kept.sum()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self) -> tuple[list[str], Tensor]:
        """Return the names and their `[K, 2]` sums and weights, and start anew."""
        names, sums = list(self._sums), torch.stack(list(self._sums.values()))
        self._sums = {}
        return names, sums


def step_values(output: StepOutput) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return what is logged of a step: per name its values and, where not all of them count, their mask."""
    rollout = output["rollout"]
    mask = rollout.sampled.response_mask
    values: dict[str, tuple[Tensor, Tensor | None]] = {
        "reward": (rollout.reward, None),
        "advantage": (output["advantages"], mask),
        "entropy": (output["entropy"], mask),
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
    """Return one dictionary per sampled response, ready for JSON, with the prompt's greedy response beside it."""
    greedy = cast(Responses, rollout.greedy)
    baseline = cast(Tensor, rollout.baseline_reward).tolist()
    lengths = rollout.sampled.response_mask.sum(-1).tolist()
    found = []
    for i, reward in enumerate(rollout.reward.tolist()):
        prompt = i // rollout.num_samples
        found.append(
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
    return found
