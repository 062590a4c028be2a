"""Two processes of every strategy take the step of one process."""

from __future__ import annotations

from functools import cache
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
    return folder


@cache
def alone(optimizer: str, folder: Path) -> dict[str, Any]:
    """What one process makes of the same batch."""
    return run("auto", optimizer, str(folder / "policy"), str(folder / "reference"), folder / "one", ranks=1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_of_two_ranks_is_that_of_one(strategy: str, optimizer: str, folder: Path) -> None:
    launch(main, strategy, optimizer, folder)
    one = alone(optimizer, folder)
    first, second = (torch.load(folder / f"{strategy}-{optimizer}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert distance(change(first["weights"]), change(one["weights"])) < 1e-5
    assert max(float(value.abs().max()) for value in change(one["weights"]).values()) > 1e-3
    for each in (first, second):
        assert each["logged"] == pytest.approx(one["logged"], abs=2e-5)
