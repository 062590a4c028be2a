"""The graded reward of a pretrained model: how positive a response sounds, by the words in it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(prompts: Sequence[str], responses: Sequence[str], rows: Any) -> list[float]:  # noqa: ARG001
    """Return a score from -1 to 1 for each response."""
    return [_analyzer().polarity_scores(response)["compound"] for response in responses]
