"""What is not finite never replaces what is: checkpoints of every kind, links, and exports."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.fakes import FakeModule, make_output, make_trainer
from conftest import make_tokenizer, tiny_model
from helpers.training import save_policy
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file

from remax_lightning.callbacks import ExportPolicy
from remax_lightning.models import LoRAConfig, ModelConfig
from remax_lightning.sharding import nonfinite_name
from remax_lightning.strategies import keep_finite_checkpoints


class Trained(FakeModule):
    """A policy and Adam, of which something breaks after a step.

    Args:
        steps: how many there are.
        breaks: the step after which something is not finite.
        what: `weight` or `moment`.
        value: what an entry of it becomes.
    """

    def __init__(self, steps: int, breaks: int, what: str = "weight", value: float = math.nan) -> None:
        scores = [step / 10 for step in range(steps)]  # each validation is the best so far
        super().__init__([make_output(step) for step in range(steps)], [make_output(9)], scores=scores)
        self.policy, self.tokenizer = tiny_model("llama"), make_tokenizer()
        self.breaks, self.what, self.value = breaks, what, value

    def setup(self, stage: str) -> None:
        keep_finite_checkpoints(self.trainer)
        keep_finite_checkpoints(self.trainer)  # a second call changes nothing

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        self.log("train/step", float(batch_idx), batch_size=1)
        return {**output, "loss": output["loss"] + self.policy.lm_head.weight.square().sum()}


class Break(Callback):
    """Runs before `ModelCheckpoint`, which Lightning puts last."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == pl_module.breaks:
            weight = pl_module.policy.lm_head.weight
            target = weight if pl_module.what == "weight" else trainer.optimizers[0].state[weight]["exp_avg_sq"]
            with torch.no_grad():
                target.view(-1)[5] = pl_module.value


def train(module: Trained, folder: Path, *callbacks: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(folder, [Break(), *callbacks], **options).fit(module)
    return [str(warning.message) for warning in caught if "not finite" in str(warning.message)]


KINDS: dict[str, dict[str, Any]] = {
    "latest": {},
    "last": {"save_last": True},
    "link": {"save_last": "link"},
    "best": {"monitor": "train/step", "mode": "max"},
    "all": {"save_top_k": -1},
}


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("what", ["weight", "moment"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_not_finite_replaces_none(kind: str, what: str, tmp_path: Path) -> None:
    options = {"every_n_train_steps": 1, **KINDS[kind]}
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", **options)
    told = train(Trained(4, 3, what, math.inf), tmp_path, saver)
    name = "policy.lm_head.weight" if what == "weight" else "the optimizer's exp_avg_sq"
    assert f"Optimizer step 3: no checkpoint is saved, because {name} is not finite" in told[0]
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    expected = {"latest": {"step=2.ckpt"}, "best": {"step=2.ckpt"}, "all": {"step=1.ckpt", "step=2.ckpt"}}
    assert names == expected.get(kind, {"step=2.ckpt", "last.ckpt"})
    for path in (tmp_path / "saved").iterdir():
        saved = torch.load(path, weights_only=True)
        assert saved["global_step"] <= 2
        assert nonfinite_name(saved["state_dict"].items()) is None


def test_whoever_saves_is_stopped(tmp_path: Path) -> None:
    class Saver(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "mine.ckpt")

    assert len(train(Trained(4, 3), tmp_path, Saver())) == 2
    assert torch.load(tmp_path / "mine.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.slow(0.3)
def test_an_export_that_is_not_finite_replaces_none(tmp_path: Path) -> None:
    export = ExportPolicy(str(tmp_path / "policy"))
    train(Trained(2, 9), tmp_path, export, val_check_interval=1)
    before = {name: load_file(tmp_path / "policy" / name / "model.safetensors") for name in ("best", "last")}
    export = ExportPolicy(str(tmp_path / "policy"))
    told = train(Trained(2, 1, value=-math.inf), tmp_path, export, val_check_interval=1)
    assert export.best_score is None
    assert [message.split(" is not exported to ")[0] for message in told] == [
        "Optimizer step 1: the model", "Optimizer step 2: the model", "Optimizer step 2: the model"
    ]  # fmt: skip
    for name, weights in before.items():
        after = load_file(tmp_path / "policy" / name / "model.safetensors")
        assert all(torch.equal(value, weights[key]) for key, value in after.items())


def test_a_buffer_that_has_become_nan_is_not_saved(tmp_path: Path) -> None:
    """As running statistics do; infinite ones are masks."""

    class Running(Trained):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                self.running[1] = math.nan
            return super().training_step(batch, batch_idx)

    module = Running(3, 9)
    module.register_buffer("running", torch.tensor([-math.inf, 1.0]))
    module.register_buffer("unsaved", torch.tensor([math.nan]), persistent=False)
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1)
    told = train(module, tmp_path, saver)
    assert "Optimizer step 2: no checkpoint is saved, because running is not finite" in told[0]
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["step=1.ckpt"]


@pytest.mark.slow(0.3)
def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    module = Trained(3, 9)
    module.policy = ModelConfig(save_policy(tmp_path / "policy"), lora=LoRAConfig(r=2)).load("model.policy")

    class BreakAdapter(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                weight = next(value for name, value in module.policy.named_parameters() if "lora_B" in name)
                weight.data[0] = math.inf

    module.training_step = lambda batch, batch_idx: {  # type: ignore[method-assign]
        **FakeModule.training_step(module, batch, batch_idx),
        "loss": sum(weight.square().sum() for weight in module.parameters() if weight.requires_grad),
    }
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1)
    told = train(module, tmp_path, BreakAdapter(), saver)
    assert "Optimizer step 2: no checkpoint is saved, because policy.base_model" in told[0]
    assert "lora_B" in told[0]
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["step=1.ckpt"]


def test_frozen_weights_may_be_infinite(tmp_path: Path) -> None:
    """Some models publish masks and biases of minus infinity."""
    module = Trained(2, 9)
    module.register_parameter("mask", torch.nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False))
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1)
    assert train(module, tmp_path, saver) == []
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["step=2.ckpt"]


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    tensors = {
        "whole": torch.tensor([1, 2]),
        "empty": torch.zeros(0),
        "half": torch.tensor([65504.0, -1e-8], dtype=torch.float16),
        "large": torch.full((4,), 3e38),
    }
    assert nonfinite_name(tensors.items()) is None
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            broken = torch.zeros(2, 3, dtype=dtype)
            broken[1, 2] = bad
            assert nonfinite_name({**tensors, "first": broken, "second": broken}.items()) == "first"
