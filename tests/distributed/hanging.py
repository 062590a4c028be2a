"""A reward that fails or hangs on one rank; each child of a reward with a deadline imports this, and little with it."""

from __future__ import annotations

import os
import time
from typing import Any

CALLS = {"reward": 0}


def reward(
    prompts: list[str], responses: list[str], rows: list[dict[str, Any]], rank: int, waits: float = 0.0
) -> list[float]:
    """Fail in the second rollout of one rank, or keep it from the others for so many seconds."""
    CALLS["reward"] += 1
    if CALLS["reward"] == 2 and int(os.environ.get("LOCAL_RANK", "0")) == rank:
        if not waits:
            raise ConnectionError("the scorer is gone")
        time.sleep(waits)
    return [float(len(response)) for response in responses]
