"""A reference that moves: to a policy in shards, and in shards itself, as on one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed.reference_sync import CASES, STEPS, main, train
from helpers.ranks import launch
from helpers.training import save_policy

from remax_lightning.modules import KLConfig

pytestmark = pytest.mark.slow
MOVING = KLConfig(reference_sync_steps=2, reference_mixup_alpha=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference_sync")
    save_policy(folder / "policy")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """The KL of each step on one process, which a reference that does not move has not."""
    moving = train("auto-replicate", folder, 1, MOVING)
    fixed = train("auto-replicate", folder, 1, KLConfig())
    assert moving[:2] == fixed[:2]
    assert min(abs(one - other) for one, other in zip(moving[2:], fixed[2:], strict=True)) > 1e-3
    return moving


@pytest.mark.parametrize("case", CASES)
def test_a_reference_moves_and_resumes_as_on_one_process(case: str, folder: Path, alone: list[float]) -> None:
    launch(main, folder, case, MOVING)
    for rank in (0, 1):
        found = json.loads((folder / f"{case}-{rank}.json").read_text())
        assert found["whole"] == pytest.approx(alone, abs=1e-5)
        for step in (2, 3):
            assert found[str(step)] == found["whole"][step:]
            assert len(found[str(step)]) == STEPS - step
