"""A step of two ranks, each in two parts, is the step of one process in one part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.ranks import launch
from helpers.training import distance, save_policy
from modules.two_ranks import VARIANTS, evaluate, main, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    policy, reference = save_policy(folder / "policy"), save_policy(folder / "reference", noise=0.02)
    launch(main, policy, reference, folder / "two")
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_leave_the_gradient_and_the_figures(variant: str, folder: Path) -> None:
    run(variant, str(folder / "policy"), str(folder / "reference"), folder / "one" / variant, ranks=1, splits=1)
    one = torch.load(folder / "one" / variant / "rank0.pt", weights_only=True)
    for rank in (0, 1):
        two = torch.load(folder / "two" / variant / f"rank{rank}.pt", weights_only=True)
        assert distance(two["step"], one["step"]) < 1e-5
        if variant == "skipped":  # the entropy is of the rows that were run, and one stays in each part
            two["logged"]["train/entropy"] = one["logged"]["train/entropy"]
        assert two["logged"] == pytest.approx(one["logged"], abs=2e-5)
    assert max(float(value.abs().max()) for value in one["step"].values()) > 1e-2


def test_ranks_with_unequal_shares_leave_the_evaluation(folder: Path) -> None:
    one = evaluate(str(folder / "policy"), str(folder / "reference"), folder / "one" / "evaluation", ranks=1)
    for rank in (0, 1):
        two = torch.load(folder / "two" / "evaluation" / f"rank{rank}" / "found.pt", weights_only=True)
        assert two == pytest.approx(one, abs=1e-5)
    assert one["val/reward"] != 0
