"""How responses are scored: the protocol, the check of every score, and the project's own rewards.

Those that ask a server are imported when they are first used, since they need `requests`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from remax_lightning.rewards.base import Reward, Scores, checked_scores
from remax_lightning.rewards.classifier import ClassifierReward
from remax_lightning.rewards.formats import DeepSpeedChatConfig
from remax_lightning.rewards.function import FunctionReward
from remax_lightning.rewards.timed import TimedReward
from remax_lightning.rewards.verifiers import (
    exact_match,
    length_penalty,
    math_answer,
    numeric_answer,
    reasoning_gym_answer,
    regex_format,
)
from remax_lightning.rewards.weighted import WeightedReward

if TYPE_CHECKING:
    from remax_lightning.rewards.http import HTTPReward
    from remax_lightning.rewards.judge import JudgeReward

_ON_DEMAND = {"HTTPReward": "http", "JudgeReward": "judge"}

__all__ = [
    "ClassifierReward",
    "DeepSpeedChatConfig",
    "FunctionReward",
    "HTTPReward",
    "JudgeReward",
    "Reward",
    "Scores",
    "TimedReward",
    "WeightedReward",
    "checked_scores",
    "exact_match",
    "length_penalty",
    "math_answer",
    "numeric_answer",
    "reasoning_gym_answer",
    "regex_format",
]


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(import_module(f"remax_lightning.rewards.{_ON_DEMAND[name]}"), name)
    raise AttributeError(f"module 'remax_lightning.rewards' has no attribute {name!r}")
