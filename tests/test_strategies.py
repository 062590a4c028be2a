"""The DeepSpeed strategy, on a CPU, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_is_divided_once(accumulate: int, tmp_path: Path) -> None:
    """A weight of 1 with gradient 1 and learning rate 1 ends at 0, however many micro-batches make the step."""
    script = Path(__file__).with_name("deepspeed_script.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(script), str(accumulate), "2"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    [line] = [line for line in ended.stdout.splitlines() if line.startswith("RESULT")]
    assert json.loads(line.removeprefix("RESULT")) == pytest.approx(0.0, abs=1e-6)
