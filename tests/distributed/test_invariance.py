"""Two processes of every strategy take the step of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.invariance import OPTIMIZERS, STRATEGIES, change, main, run
from helpers.ranks import launch
from helpers.training import distance, save_policy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("invariance")
    save_policy(folder / "policy")
    save_policy(folder / "reference", noise=0.02)
    launch(main, str(folder / "policy"), str(folder / "reference"), folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """What one process makes of the same batch."""
    paths = str(folder / "policy"), str(folder / "reference")
    return {name: run("auto", name, *paths, folder / "one", ranks=1) for name in OPTIMIZERS}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_of_two_ranks_is_that_of_one(
    strategy: str, optimizer: str, folder: Path, alone: dict[str, dict[str, Any]]
) -> None:
    one = alone[optimizer]
    first, second = (torch.load(folder / f"{strategy}-{optimizer}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert distance(change(first["weights"]), change(one["weights"])) < 1e-5
    assert max(float(value.abs().max()) for value in change(one["weights"]).values()) > 1e-3
    for each in (first, second):
        assert each["logged"] == pytest.approx(one["logged"], abs=2e-5)
