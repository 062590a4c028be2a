"""Figures of scored pairs as loops in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pair_losses(chosen: Tensor, rejected: Tensor, margins: list[float], coef: float) -> Tensor:
    """Mean over pairs of the loss, differentiable: softplus of what the chosen score lacks, and the centring."""
    total = torch.zeros((), dtype=chosen.dtype)
    for first, second, margin in zip(chosen, rejected, margins, strict=True):
        total = total + torch.log1p(torch.exp(-(first - second - margin))) + coef * (first + second) ** 2
    return total / len(margins)


def accuracy(chosen: list[float], rejected: list[float]) -> float:
    return sum(first > second for first, second in zip(chosen, rejected, strict=True)) / len(chosen)


def calibration_error(chosen: list[float], rejected: list[float], bins: int = 15) -> float:
    """Bin by bin, how far the mean probability of the likelier response is from how often it is the chosen one."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for first, second in zip(chosen, rejected, strict=True):
        probability = 1 / (1 + math.exp(-abs(first - second)))
        members[min(bins - 1, int(probability * bins))].append((probability, first > second))
    error = 0.0
    for pairs in members:
        if pairs:
            confidence = sum(probability for probability, _ in pairs) / len(pairs)
            frequency = sum(right for _, right in pairs) / len(pairs)
            error += len(pairs) / len(chosen) * abs(confidence - frequency)
    return error


def moments(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
