"""A user's own rewards: this folder is on no path, and nothing of the project imports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from remax_lightning.rewards import Reward


def politeness(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]], word: str = "please"
) -> list[float]:
    return [float(word in response) for response in responses]


class DigitReward(Reward):
    """The share of characters that are digits."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        return [self.scale * sum(c.isdigit() for c in response) / max(1, len(response)) for response in responses]
