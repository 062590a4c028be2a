from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "log_probs_memory.py"


SIZES = ("--tokens=256", "--vocabulary=131072", "--hidden=8", "--repeats=1", "--device=cpu")

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")


@pytest.mark.slow
def test_one_way_is_measured_in_the_process_that_is_asked_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    names = runpy.run_path(str(SCRIPT))
    peaks = {}
    for way in ("chunked", "plain"):  # in this order: what the allocator keeps of the larger one would hide the smaller
        names["main"]([*SIZES, "--way", way])
        peaks[way] = json.loads(capsys.readouterr().out)["peak_mib"]
    assert peaks["plain"] > 2 * 128  # two tensors of all logits at least
    assert peaks["chunked"] < peaks["plain"] / 3


@pytest.mark.slow
def test_it_runs_and_a_few_logits_need_less_than_all(tmp_path: Path) -> None:
    output = tmp_path / "figures.jsonl"
    subprocess.run([sys.executable, str(SCRIPT), *SIZES, f"--results={output}"], check=True, capture_output=True)
    plain, chunked, plain_kl, chunked_kl = lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["way"] for line in lines] == ["plain", "chunked", "plain_kl", "chunked_kl"]
    assert plain["peak_mib"] > 2 * 128  # two tensors of all logits at least
    assert chunked["peak_mib"] < plain["peak_mib"] / 3
    assert chunked_kl["peak_mib"] < plain_kl["peak_mib"] / 3
    assert chunked_kl["peak_mib_of_plain"] == round(chunked_kl["peak_mib"] / plain_kl["peak_mib"], 3)
    assert chunked["gradients_mib"] == pytest.approx(4, abs=0.1)
    assert {"processor", "versions", "seconds"} <= set(chunked)
