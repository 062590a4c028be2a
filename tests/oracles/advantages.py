"""Advantages of each public implementation, token by token in Python floats, from the formulas alone.

`mask` has holes nowhere: a response is a run of True from its first token, or empty.
"""

from __future__ import annotations

import math

Matrix = list[list[float]]


def clip(value: float, bound: float | None) -> float:
    return value if bound is None else max(-bound, min(bound, value))


def length(mask: list[bool]) -> int:
    return sum(1 for counted in mask if counted)


def greedy(baseline_reward: list[float], num_samples: int) -> list[float]:
    return [value for value in baseline_reward for _ in range(num_samples)]


def group_mean(reward: list[float], num_samples: int) -> list[float]:
    baselines = []
    for i in range(len(reward)):
        first = i // num_samples * num_samples
        baselines.append(sum(reward[first : first + num_samples]) / num_samples)
    return baselines


def leave_one_out(reward: list[float], num_samples: int) -> list[float]:
    baselines = []
    for i in range(len(reward)):
        first = i // num_samples * num_samples
        others = [reward[j] for j in range(first, first + num_samples) if j != i]
        baselines.append(sum(others) / len(others))
    return baselines


def reference_implementation(
    reward: list[float],
    baseline: list[float],
    kl: Matrix,
    mask: list[list[bool]],
    beta: float = 0.05,
    gamma: float = 0.99,
    bound: float = 5.0,
) -> Matrix:
    """`A_t = -beta * kl_t + gamma^k * clip(r - b)`; the model card has beta 0.1 and bound 1."""
    advantages = []
    for i, row in enumerate(mask):
        values = [0.0] * len(row)
        for t in range(length(row)):
            k = length(row) - t
            values[t] = -beta * kl[i][t] + gamma**k * clip(reward[i] - baseline[i], bound)
        advantages.append(values)
    return advantages


def verl(reward: list[float], baseline: list[float], kl: Matrix, mask: list[list[bool]], beta: float = 0.001) -> Matrix:
    """`A_t = sum over s >= t of (r_s - beta * kl_s) - b`, with r_s = r on the last response token."""
    advantages = []
    for i, row in enumerate(mask):
        values = [0.0] * len(row)
        last = length(row) - 1
        for t in range(last + 1):
            total = 0.0
            for s in range(t, last + 1):
                total += (reward[i] if s == last else 0.0) - beta * kl[i][s]
            values[t] = total - baseline[i]
        advantages.append(values)
    return advantages


def openrlhf(
    reward: list[float],
    baseline: list[float],
    kl: Matrix,
    mask: list[list[bool]],
    beta: float = 0.01,
    bound: float = 10.0,
) -> Matrix:
    """`A_t = whiten(sum over s >= t of (1{s = last} * clip(r - baseline) - beta * kl_s))`."""
    advantages = []
    for i, row in enumerate(mask):
        values = [0.0] * len(row)
        last = length(row) - 1
        for t in range(last + 1):
            for s in range(t, last + 1):
                values[t] += (clip(reward[i] - baseline[i], bound) if s == last else 0.0) - beta * kl[i][s]
        advantages.append(values)
    return whiten(advantages, mask)


def whiten(advantages: Matrix, mask: list[list[bool]]) -> Matrix:
    tokens = [
        value
        for values, row in zip(advantages, mask, strict=True)
        for value, counted in zip(values, row, strict=True)
        if counted
    ]
    mean = math.fsum(tokens) / len(tokens)
    variance = math.fsum((value - mean) ** 2 for value in tokens) / len(tokens)
    scale = 1 / math.sqrt(max(variance, 1e-8))
    return [
        [(value - mean) * scale if counted else 0.0 for value, counted in zip(values, row, strict=True)]
        for values, row in zip(advantages, mask, strict=True)
    ]


def discounted(
    reward: list[float], baseline: list[float], kl: Matrix, mask: list[list[bool]], beta: float, gamma: float
) -> Matrix:
    """`A_t = gamma^k * (r - b) - beta * sum over s >= t of gamma^(s-t) * kl_s`."""
    advantages = []
    for i, row in enumerate(mask):
        values = [0.0] * len(row)
        for t in range(length(row)):
            cost = 0.0
            for s in range(t, length(row)):
                cost += gamma ** (s - t) * kl[i][s]
            values[t] = gamma ** (length(row) - t) * (reward[i] - baseline[i]) - beta * cost
        advantages.append(values)
    return advantages
