"""An adapter is trained, saved, resumed and exported alike under every strategy, and its base is its reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.lora import main, train
from helpers.checkpoints import names_in
from helpers.ranks import launch
from helpers.training import save_policy
from safetensors.torch import load_file
from torch import Tensor

from remax_lightning.models import LoRAConfig

pytestmark = pytest.mark.slow
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SHARDED = ("fsdp2", "zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    save_policy(folder / "policy")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process sees: of the policy's steps, and of those that go on with the adapter of DDP's run."""
    found(folder, "ddp")
    adapter = LoRAConfig(path=str(folder / "ddp" / "first" / "export" / "last"))
    return {
        **train("auto", folder, "first", ranks=1).seen,
        "continued": train("auto", folder, "third", ranks=1, lora=adapter).seen,
    }


def found(folder: Path, strategy: str) -> list[dict[str, Any]]:
    """What each rank saw; the first call for a strategy runs it."""
    if not (folder / f"{strategy}-0.json").exists():
        launch(main, folder, strategy)
    return [json.loads((folder / f"{strategy}-{rank}.json").read_text()) for rank in (0, 1)]


def weights(folder: Path, strategy: str, run: str) -> dict[str, Tensor]:
    """The whole weights at the end of a run."""
    found(folder, strategy)
    return torch.load(folder / f"{strategy}.pt", weights_only=True)[run]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_take_the_steps_of_one(strategy: str, folder: Path, alone: dict[str, Any]) -> None:
    for seen in found(folder, strategy):
        assert seen["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert seen["continued"]["losses"] == pytest.approx(alone["continued"]["losses"], abs=1e-5)
    assert len(set(alone["losses"])) == 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_reference_is_the_start_on_the_same_weights(strategy: str, folder: Path) -> None:
    """Also where the start is an adapter that was trained before."""
    for seen in found(folder, strategy):
        assert seen["shared"]
        assert seen["kl"][:2] == [0.0, 0.0]
        assert seen["continued"]["kl"][:2] == [0.0, 0.0]
        assert min(seen["kl"][2:]) > 0.01  # the second rollout
        assert min(seen["continued"]["kl"][2:]) > 0.01


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_of_the_adapter_is_trained_and_nothing_else(strategy: str, folder: Path) -> None:
    for run in (found(folder, strategy)[0], found(folder, strategy)[0]["continued"]):
        assert len(run["trained"]) == 2 * 2 * 7  # two matrices, two layers, seven projections
        assert all(".lora_" in name and name.endswith(".default.weight") for name in run["trained"])
        assert run["moved"] == run["trained"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_base_is_in_shares_where_the_strategy_makes_them(strategy: str, folder: Path) -> None:
    whole = sum(value.numel() for value in weights(folder, strategy, "first").values())
    held = [seen["kept"] for seen in found(folder, strategy)]
    assert held == [whole, whole] if strategy not in SHARDED else sum(held) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_goes_on_as_it_would_have(strategy: str, folder: Path) -> None:
    for seen in found(folder, strategy):
        assert seen["resumed_losses"] == pytest.approx(seen["losses"][3:], abs=1e-6)


def test_fsdp2_resumes_from_one_file_too(folder: Path) -> None:
    single, distributed = found(folder, "fsdp2_file"), found(folder, "fsdp2")
    assert (folder / "fsdp2_file" / "first" / "step=3.ckpt").is_file()
    for seen, sharded in zip(single, distributed, strict=True):
        assert seen["resumed_losses"] == pytest.approx(sharded["losses"][3:], abs=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_holds_the_adapter_alone(strategy: str, folder: Path) -> None:
    trained = {f"policy.{name}" for name in found(folder, strategy)[0]["trained"]}
    assert names_in(folder / strategy / "first" / "step=3.ckpt") == trained
    assert names_in(folder / strategy / "third" / "step=3.ckpt") == trained


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_adapter_is_exported_as_peft_reads_it(strategy: str, folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    expected = weights(folder, strategy, "first")
    base = AutoModelForCausalLM.from_pretrained(folder / "policy")
    state = PeftModel.from_pretrained(base, folder / strategy / "first" / "export" / "last").state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_merged_policy_is_base_plus_update(strategy: str, folder: Path) -> None:
    held = weights(folder, strategy, "third")
    exported = load_file(folder / strategy / "third" / "export" / "last" / "model.safetensors")
    for name, value in exported.items():
        layer = "base_model.model." + name.removesuffix(".weight")
        if f"{layer}.base_layer.weight" not in held:
            assert torch.equal(value, held[f"{layer}.weight"])
            continue
        down, up = (held[f"{layer}.lora_{each}.default.weight"] for each in "AB")
        expected = held[f"{layer}.base_layer.weight"].double() + 32 / 2 * up.double() @ down.double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(value, held[f"{layer}.base_layer.weight"])
    assert len(exported) == 21


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_may_make_unequal_numbers_of_reference_passes(strategy: str, folder: Path) -> None:
    """Three rows here, two there, two to a pass; and before training there is nothing to measure."""
    validated = [seen["validated"] for seen in found(folder, strategy)]
    assert validated[0] == validated[1]
    assert validated[0] == pytest.approx(found(folder, "ddp")[0]["validated"], abs=1e-5)
    assert abs(validated[0]["val/kl"]) < 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_is_evaluated_without_a_fit(strategy: str, folder: Path) -> None:
    for seen in found(folder, strategy):
        assert seen["validated_later"] == pytest.approx(found(folder, "ddp")[0]["validated_later"], abs=1e-4)
        assert seen["validated_later"]["val/kl"] > 1e-3
