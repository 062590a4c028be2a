"""A disk that fails on one of two ranks, weights that are not finite on one, and damaged parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import disks
from helpers.ranks import launch
from helpers.training import save_policy

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("strategy", disks.STRATEGIES)
def test_what_one_rank_cannot_save_stops_no_other(strategy: str, tmp_path: Path) -> None:
    """Then a bit of what was saved is flipped."""
    save_policy(tmp_path / "policy", "gpt2")
    launch(disks.main, tmp_path, strategy)
    checkpoint = tmp_path / "saves" / "step=3.ckpt"
    parts = (
        [checkpoint]
        if checkpoint.is_file()
        else checkpoint.rglob("*optim_states.pt" if "zero" in strategy else "*.distcp")
    )
    part = sorted(parts)[-1]  # that of rank 1, which nobody else reads
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    (tmp_path / "damaged").write_text(part.name)
    launch(disks.damaged, tmp_path, strategy)
