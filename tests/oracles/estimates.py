"""KL estimates, response masks and losses, number by number in Python floats."""

from __future__ import annotations

import math

Matrix = list[list[float]]


def kl_estimate(log_ratio: float, estimator: str, clamp: float | None = None) -> float:
    if estimator == "k1":
        value = log_ratio
    elif estimator == "k2":
        value = log_ratio**2 / 2
    else:
        value = math.exp(-log_ratio) - 1 + log_ratio
    return value if clamp is None else min(max(value, -clamp), clamp)


def response_mask(ids: list[list[int]], eos_ids: list[int]) -> list[list[bool]]:
    mask = []
    for row in ids:
        ended = False
        counted = []
        for token in row:
            counted.append(not ended)
            ended = ended or token in eos_ids
        mask.append(counted)
    return mask


def reinforce_loss(log_probs: Matrix, advantages: Matrix, mask: list[list[bool]], normalizer: float) -> float:
    total = 0.0
    for i, row in enumerate(mask):
        for t, counted in enumerate(row):
            if counted:
                total -= advantages[i][t] * log_probs[i][t]
    return total / normalizer


def clipped_surrogate(
    log_probs: Matrix,
    old_log_probs: Matrix,
    advantages: Matrix,
    mask: list[list[bool]],
    normalizer: float,
    clip_range: float,
    dual_clip: float | None,
) -> tuple[float, float]:
    """The loss, and the share of tokens where the objective is not `ratio * A`."""
    total, clipped, tokens = 0.0, 0, 0
    for i, row in enumerate(mask):
        for t, counted in enumerate(row):
            if not counted:
                continue
            ratio = math.exp(log_probs[i][t] - old_log_probs[i][t])
            advantage = advantages[i][t]
            objective = min(ratio * advantage, min(max(ratio, 1 - clip_range), 1 + clip_range) * advantage)
            if dual_clip is not None and advantage < 0:
                objective = max(objective, dual_clip * advantage)
            total -= objective
            clipped += objective != ratio * advantage
            tokens += 1
    return total / normalizer, clipped / tokens


def log_softmax(logits: list[float], temperature: float) -> list[float]:
    scaled = [value / temperature for value in logits]
    highest = max(scaled)
    total = math.fsum(math.exp(value - highest) for value in scaled)
    return [value - highest - math.log(total) for value in scaled]


def entropy(logits: list[float], temperature: float) -> float:
    return -math.fsum(math.exp(value) * value for value in log_softmax(logits, temperature) if value > -math.inf)
