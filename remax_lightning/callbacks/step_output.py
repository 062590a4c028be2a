"""Helpers for callbacks: values from the outputs of a step, and logging.

Sums over ranks are in float64. Decisions use only reduced numbers, so that all ranks decide the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from remax_lightning.types import Rollout, StepOutput


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
