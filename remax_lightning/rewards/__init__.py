"""How responses are scored: the protocol, the check of every score, and the project's own rewards."""

from __future__ import annotations

from remax_lightning.rewards.base import Reward, Scores, checked_scores
from remax_lightning.rewards.classifier import ClassifierReward
from remax_lightning.rewards.formats.deepspeed_chat import DeepSpeedChatConfig
from remax_lightning.rewards.function import FunctionReward
from remax_lightning.rewards.http import HTTPReward
from remax_lightning.rewards.judge import JudgeReward
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
