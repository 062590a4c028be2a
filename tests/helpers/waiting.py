"""Waiting for what another thread or process does, on a machine of any speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

LONG = 120.0
"""Seconds that a test waits for what must come: only a failure, or a machine with other work, takes so long."""


def wait_until(holds: Callable[[], Any], seconds: float = LONG) -> bool:
    """Return whether something holds, as soon as it does or after so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
