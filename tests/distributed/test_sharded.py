"""What a run with a policy in shards does beside its gradient: loading, rollouts, export, resuming, evaluation."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.sharded import LENGTHS, STRATEGIES, main
from helpers.ranks import launch
from helpers.training import save_policy

pytestmark = pytest.mark.slow
ALONE = ("zero2", "zero3", "zero3-layerwise")
SHARDED = tuple(name for name in STRATEGIES if name != "zero2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_policy(folder / "policy")
    save_policy(folder / "reference", noise=0.02)
    return folder


@cache
def run(folder: Path, strategy: str) -> None:
    """Let both ranks look at a run, at the first test that asks for it."""
    launch(main, folder, "32-true", strategy)


@pytest.fixture(scope="module")
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The device, and what one rank with 16-bit weights saw on it: every part that it has to gather is its own."""
    device, folder = request.param, tmp_path_factory.mktemp("alone")
    save_policy(folder / "policy")
    save_policy(folder / "reference", noise=0.02)
    launch(main, folder, "bf16-true", *ALONE, ranks=1, timeout=300, cuda=device == "cuda")
    return device, folder


def found(folder: Path, strategy: str) -> list[dict[str, Any]]:
    """What each rank saw."""
    run(folder, strategy)
    return [json.loads((folder / f"{strategy}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_policy_has_the_files_weights_and_is_exported_whole(strategy: str, folder: Path) -> None:
    ranks = found(folder, strategy)
    assert all(rank["file_equal"] for rank in ranks)
    assert ranks[0]["exported"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_policy_is_in_shards_and_the_reference_whole(strategy: str, folder: Path) -> None:
    ranks = found(folder, strategy)
    whole = ranks[0]["whole"]
    for key in ("kept", "kept_after"):  # after a step with its rollout, too
        held = [rank[key] for rank in ranks]
        assert held == [whole, whole] if strategy not in SHARDED else sum(held) == pytest.approx(whole, rel=0.01)
    for rank in ranks:
        assert rank["reference"] == whole
        assert rank["reference_is_plain"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_counted_tokens_run_through_the_last_mlp(strategy: str, folder: Path) -> None:
    assert [seen["last_mlp"] for seen in found(folder, strategy)] == [["", ""]] * 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_that_end_early_leave_the_others_alone(strategy: str, folder: Path) -> None:
    for rank, seen in enumerate(found(folder, strategy)):
        assert seen["lengths"] == [LENGTHS[rank]] * 4  # two rollouts and two validations
        assert seen["rollout_equal"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_policy_that_is_gathered_once_is_decoded_without_hooks(strategy: str, folder: Path) -> None:
    """With hooks no decoding step would be captured."""
    assert all(bool(seen["hooks"]) == strategy.endswith("-layerwise") for seen in found(folder, strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_that_fails_leaves_the_others_where_they_can_be_told(strategy: str, folder: Path) -> None:
    assert [seen["met_after_a_failure"] for seen in found(folder, strategy)] == [2, 2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rollout_holds_the_policy_whole_or_one_layer_of_it(strategy: str, folder: Path) -> None:
    for seen in found(folder, strategy):
        assert seen["whole"] > 2 * seen["layer"] > 0
        missing = seen["layer"] if strategy.endswith("layerwise") else 0  # the other one of the two
        assert seen["held"] == seen["whole"] - missing


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_gather_layer_by_layer_if_one_lacks_room(strategy: str, folder: Path) -> None:
    for seen in found(folder, strategy):
        assert seen["layerwise"] == ([True, True] if strategy.endswith("layerwise") else [False, True])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_goes_on_as_it_would_have(strategy: str, folder: Path) -> None:
    """The checkpoint was saved with a rollout half used, and every rank has its own."""
    for seen in found(folder, strategy):
        assert len(seen["losses"]) == 4
        assert seen["resumed_losses"] == pytest.approx(seen["losses"][1:], abs=1e-6)


@pytest.mark.parametrize("strategy", SHARDED)
def test_strategies_agree(strategy: str, folder: Path) -> None:
    """With one that leaves the policy whole: on every loss of the run, its validations and one without a run before."""
    sharded, whole = found(folder, strategy)[0], found(folder, "zero2")[0]
    assert sharded["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    assert sharded["validated"] == pytest.approx(whole["validated"], abs=1e-5)
    assert len(sharded["validations"]) == 2
    assert "val/reward" in sharded["validated"].keys() & sharded["validations"][0].keys()
    for figures, expected in zip(sharded["validations"], whole["validations"], strict=True):
        assert figures == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rank_decides_alike_whether_the_head_can_be_read(strategy: str, folder: Path) -> None:
    first, second = found(folder, strategy)
    assert first["reasons"] == second["reasons"]
    assert all(bool(reason) == (strategy in SHARDED) for reason in first["reasons"])


def test_deepspeeds_hooks_are_off_inside_and_on_outside(folder: Path) -> None:
    """Fails when DeepSpeed renames what `strategies/zero3.py` reaches for."""
    for seen in found(folder, "zero3") + found(folder, "zero3-layerwise"):
        assert seen["hooks_inside"] == 0
        assert seen["hooks_outside"] > 0
        assert seen["external"] == 0  # a parameter that was looked at in a rollout, and would be gathered ever after


HERE_AND_ON_CUDA = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
            pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
        ],
    ),
]


@pytest.mark.parametrize("alone", HERE_AND_ON_CUDA, indirect=True)
def test_one_rank_with_16_bit_weights_does_all_of_that_too(alone: tuple[str, Path]) -> None:
    device, folder = alone
    rounding = 1e-6 if device == "cpu" else 1e-2  # CUDA adds up in another order every time
    ours = {strategy: json.loads((folder / f"{strategy}-0.json").read_text()) for strategy in ALONE}
    for strategy, seen in ours.items():
        assert seen["runs_on"] == [device, "torch.bfloat16"]
        assert seen["file_equal"]
        assert seen["exported"]
        assert seen["rollout_equal"]
        assert seen["lengths"] == [LENGTHS[1]] * 4
        assert seen["held"] == seen["whole"] - (seen["layer"] if strategy.endswith("layerwise") else 0)
        assert seen["kept"] == seen["kept_after"] == seen["whole"]
        assert seen["resumed_losses"] == pytest.approx(seen["losses"][1:], abs=rounding)
        assert seen["losses"] == pytest.approx(ours["zero2"]["losses"], abs=rounding)
        assert seen["validated"] == pytest.approx(ours["zero2"]["validated"], abs=rounding)
