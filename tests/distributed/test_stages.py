"""Two processes of every strategy train and export the reward model, and pack supervised examples, as one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from distributed.invariance import change
from distributed.stages import PACKED, STARTS, STRATEGIES, main, run
from helpers.ranks import launch
from helpers.reward_models import save_classifier
from helpers.stages import PAIRS
from helpers.training import distance, save_policy
from safetensors.torch import load_file

from remax_lightning.rewards import ClassifierReward

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    save_policy(folder / "policy")
    save_classifier(folder / "reward", tiny_config("opt"), make_tokenizer())
    launch(main, folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process makes of the same batch."""
    return run("auto", folder, folder / "one", ranks=1)


RUNS = [(each, stage) for each in STRATEGIES for stage in (*STARTS, "packed") if stage in STARTS or each in PACKED]


@pytest.mark.parametrize(("strategy", "stage"), RUNS)
def test_a_step_of_two_ranks_is_that_of_one(strategy: str, stage: str, folder: Path, alone: dict[str, Any]) -> None:
    one = alone[stage]
    for rank in (0, 1):
        found = torch.load(folder / f"{strategy}-{rank}.pt", weights_only=True)[stage]
        assert found["logged"] == pytest.approx(one["logged"], rel=1e-4, abs=2e-5)
        if rank == 0:  # where the whole weights are gathered
            assert distance(change(found["weights"]), change(one["weights"])) < 1e-5
    assert max(float(value.abs().max()) for value in change(one["weights"]).values()) > 1e-3
    expected = {"val/accuracy", "val/calibration_error", "val/reward_std", "train/accuracy"}
    assert (
        {"val/perplexity", "val/reward"} <= set(one["logged"]) if stage == "packed" else expected <= set(one["logged"])
    )


@pytest.mark.parametrize("stage", STARTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_export_of_two_ranks_is_normalized_and_that_of_one(
    strategy: str, stage: str, folder: Path, alone: dict[str, Any]
) -> None:
    exported = folder / "rank0" / strategy / stage / "export" / "last"
    ours, ones = (
        load_file(path / "model.safetensors") for path in (exported, folder / "one/auto" / stage / "export/last")
    )
    assert set(ours) == set(ones)
    for name, value in ours.items():
        torch.testing.assert_close(value, ones[name], rtol=1e-3, atol=1e-5)
    reward = ClassifierReward(str(exported), template="{prompt}{response}{eos}")
    reward.load(torch.device("cpu"))
    rows = [*PAIRS[:4], {**PAIRS[4], "prompt": "another"}]
    responses = [str(row[side]) for side in ("chosen", "rejected") for row in rows]
    scores = reward.score([str(row["prompt"]) for row in rows] * 2, responses, [{}] * 10)
    assert isinstance(scores, torch.Tensor)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)
