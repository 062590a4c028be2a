from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_memory_does_not_grow_with_the_rows_and_checks_are_cheap(tmp_path: Path) -> None:
    """Twelve thousand rows are 20 MiB of text, and some 90 MiB as objects of Python."""
    output = tmp_path / "figures.jsonl"
    sizes = ("--rows=12000", "--kinds", "PromptDataModule", f"--results={output}")
    subprocess.run([sys.executable, str(SCRIPT), *sizes], check=True, capture_output=True)
    cold, warm = (json.loads(line) for line in output.read_text().splitlines())
    assert (cold["variant"], warm["variant"]) == ("cold", "warm")
    assert cold["file_mib"] == pytest.approx(20, abs=2)
    assert warm["held_mib"] < 10
    assert cold["held_mib"] < 70  # the tokenizer's cache of words
    assert warm["seconds"] < cold["seconds"]
    assert 0 < cold["checks_share"] < 0.05
    assert {"processor", "versions", "rows_per_second"} <= set(cold)
