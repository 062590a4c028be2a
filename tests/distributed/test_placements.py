"""Reference and reward model give the same figures wherever they are kept, and take part in nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config
from distributed.placements import CASES, FAILING, fail, main, run
from helpers.checkpoints import names_in
from helpers.ranks import launch
from helpers.reward_models import save_classifier
from helpers.training import save_policy

pytestmark = pytest.mark.slow
each_case = pytest.mark.parametrize(("strategy", "placement", "estimator"), CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placements")
    save_policy(folder / "policy")
    save_policy(folder / "reference", noise=0.02)
    save_classifier(folder / "reward", tiny_config("llama"))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """What one process sees."""
    return {estimator: run("auto", "replicate", folder, ranks=1, estimator=estimator) for estimator in ("k1", "full")}


def found(folder: Path, strategy: str, placement: str, estimator: str) -> list[dict[str, Any]]:
    """What each rank saw; the first call for a case runs it."""
    case = f"{strategy}-{placement}-{estimator}"
    if not (folder / f"{case}-0.json").exists():
        launch(main, folder, strategy, placement, estimator)
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]


@each_case
def test_figures_are_those_of_one_process(
    strategy: str, placement: str, estimator: str, folder: Path, alone: dict[str, dict[str, Any]]
) -> None:
    assert len(set(alone[estimator]["losses"])) == 2
    for seen in found(folder, strategy, placement, estimator):
        assert seen["losses"] == pytest.approx(alone[estimator]["losses"], abs=1e-5)


@each_case
def test_ranks_may_make_unequal_numbers_of_passes(strategy: str, placement: str, estimator: str, folder: Path) -> None:
    """Three rows here and two there: in validation one rank runs reference and reward model once more."""
    expected = found(folder, "ddp", "replicate", estimator)[0]["validated"]
    assert len(expected) > 5
    for seen in found(folder, strategy, placement, estimator):
        assert seen["validated"] == pytest.approx(expected, abs=1e-5)


@each_case
def test_a_model_in_shares_is_held_once(
    strategy: str, placement: str, estimator: str, folder: Path, alone: dict[str, dict[str, Any]]
) -> None:
    """Its layers are; what is beside them is held whole."""
    whole = alone[estimator]
    for name in ("reference", "reward"):
        held = [seen[f"{name}_layers"] for seen in found(folder, strategy, placement, estimator)]
        beside = [seen[name] - seen[f"{name}_layers"] for seen in found(folder, strategy, placement, estimator)]
        layers = whole[f"{name}_layers"]
        assert held == ([layers / 2] * 2 if placement == "shard" else [layers] * 2)
        assert beside == [whole[name] - layers] * 2


@each_case
def test_frozen_models_take_part_in_nothing(strategy: str, placement: str, estimator: str, folder: Path) -> None:
    for seen in found(folder, strategy, placement, estimator):
        assert (seen["gradients"], seen["optimized"], seen["registered"]) == (0, 0, 0)
    names = names_in(folder / f"{strategy}-{placement}-{estimator}" / "step=2.ckpt")
    assert names
    assert all(name.startswith("policy.") for name in names)


@pytest.mark.parametrize("where", FAILING)
def test_a_rank_that_fails_leaves_no_other_in_a_model_in_shares(where: str, folder: Path) -> None:
    launch(fail, folder, where, timeout=120)
    for rank in (0, 1):
        told = (folder / f"{where}-{rank}.txt").read_text()
        assert told.startswith("rank 1: ")
        assert "ConnectionError: it is gone" in told
