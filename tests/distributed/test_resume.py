"""Four steps are two and two, under every strategy, and on another number of processes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from distributed import resume
from distributed.invariance import STRATEGIES
from helpers.ranks import launch
from helpers.training import save_policy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    save_policy(folder / "policy", "gpt2")
    save_policy(folder / "reference", "gpt2", noise=0.02)
    return folder


@cache
def exactly(folder: Path, strategy: str) -> None:
    """Runs of two ranks, and those that resume from their checkpoints."""
    launch(resume.exactly, folder, strategy)


@cache
def saved(folder: Path, strategy: str, ranks: int) -> None:
    """Checkpoints of that many ranks."""
    launch(resume.save, folder, strategy, ranks=ranks)


@cache
def elsewhere(folder: Path, strategy: str, ranks: int) -> None:
    """What that many ranks make of a checkpoint of the other number, and what they make of their own."""
    saved(folder, strategy, 1)
    saved(folder, strategy, 2)
    launch(resume.elsewhere, folder, strategy, 3 - ranks, ranks=ranks)


def found(folder: Path, name: str, ranks: int = 2) -> list[Any]:
    """What each rank wrote down."""
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_repeats_the_uninterrupted_one(strategy: str, folder: Path) -> None:
    """With dropout, and random numbers of its own on every rank."""
    exactly(folder, strategy)
    for rank in found(folder, f"exactly-{strategy}"):
        assert len(set(rank["whole"])) == 4
        assert rank["2"] == rank["whole"][2:]
        assert rank["3"] == rank["whole"][3:]  # from within a rollout


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_holds_the_policy_and_no_frozen_model(strategy: str, folder: Path) -> None:
    saved(folder, strategy, 2)
    expected = {f"policy.{name}" for name in tiny_model("gpt2").state_dict()}
    assert weights_in(folder / f"save-2-{strategy}" / "step=2.ckpt") == expected


def weights_in(checkpoint: Path) -> set[str]:
    """The names of all weights that a checkpoint holds."""
    if checkpoint.is_file():
        return set(torch.load(checkpoint, weights_only=True)["state_dict"])
    if (checkpoint / "meta.pt").exists():
        from torch.distributed.checkpoint import FileSystemReader

        names = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        return {name.removeprefix("state_dict.") for name in names if name.startswith("state_dict.")}
    names = set()
    for file in (checkpoint / "checkpoint").glob("*model_states.pt"):
        names |= set(torch.load(file, weights_only=False)["module"])
    return names


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_number_of_processes_goes_on(strategy: str, ranks: int, folder: Path) -> None:
    """One where two stopped, and two where one did."""
    elsewhere(folder, strategy, ranks)
    elsewhere(folder, "ddp", 1)
    check_elsewhere(folder, strategy, ranks)


def check_elsewhere(folder: Path, strategy: str, ranks: int) -> None:
    """Whether `ranks` ranks made of the other number's checkpoint what they would have made of their own."""
    whole = found(folder, f"save-{ranks}-{strategy}", ranks)[0]
    validated = found(folder, "from-2-ddp", 1)[0]["validated"]
    for rank in found(folder, f"from-{3 - ranks}-{strategy}", ranks):
        assert rank["losses"] == pytest.approx(whole[2:], abs=1e-5)
        assert rank.get("validated", validated) == pytest.approx(validated, abs=1e-5)
        assert not {"universal", "latest_universal"} & set(rank["left"])  # converted for a while only


def test_what_cannot_be_resumed_is_refused_with_the_reason(folder: Path) -> None:
    saved(folder, "ddp", 2)
    launch(resume.save_other, folder)
    launch(resume.refused, folder, ranks=1)
    messages = found(folder, "refused", 1)[0]
    expected = {
        "within a rollout": "trainer.devices x num_nodes must be 2, got 1",
        "a file for ZeRO": "is not a checkpoint of DeepSpeed ZeRO; set the trainer.strategy",
        "a folder for DDP": "is a folder of DeepSpeed or FSDP2",
        "ZeRO's folder for FSDP2": "is not a checkpoint of FSDP2",
        "SGD under ZeRO": "cannot reshard the optimizer state",
    }
    assert set(messages) == set(expected)
    for name, text in expected.items():
        assert text in messages[name]


def moments_by_name(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The moments in a file of DDP: it numbers matrices first, then biases and norms, both in the model's order."""
    content = torch.load(checkpoint, weights_only=True)
    names = [f"policy.{name}" for name, _ in tiny_model("gpt2").named_parameters()]
    dims = {name: content["state_dict"][name].dim() for name in names}
    ordered = [name for name in names if dims[name] > 1] + [name for name in names if dims[name] == 1]
    assert ordered != names
    states = content["optimizer_states"][0]["state"]
    assert sorted(states) == list(range(len(ordered)))
    return {name: states[number] for number, name in enumerate(ordered)}


def test_fsdp2_reads_the_moments_of_ddp_by_the_names_of_weights(folder: Path) -> None:
    saved(folder, "ddp", 1)
    saved(folder, "ddp", 2)
    launch(resume.moments, folder)
    for name, source in (("two", "save-2-ddp"), ("old", "save-2-ddp"), ("one", "save-1-ddp")):
        check_moments(folder / f"moments-{name}.pt", moments_by_name(folder / source / "step=2.ckpt"))
    # What FSDP2 has gathered into one file is what it had, and what both strategies start from.
    end = torch.load(folder / "moments-file.end", weights_only=True)["state"]
    assert all(float(state["step"]) == 3 for state in end.values())
    for name in ("ddp", "fsdp2"):
        check_moments(folder / f"moments-{name}-of-file.pt", end)


def check_moments(path: Path, expected: dict[str, dict[str, torch.Tensor]]) -> None:
    loaded = torch.load(path, weights_only=True)
    assert set(loaded["state"]) == set(expected)
    for name, state in expected.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(loaded["state"][name][key], state[key]), (name, key)
        assert loaded["state"][name]["exp_avg"].abs().sum() > 0
        assert loaded["weight_decay"][name] == (10.0 if state["exp_avg"].dim() > 1 else 0.0)
