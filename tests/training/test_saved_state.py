"""States of a user's own in a checkpoint: what cannot come back without running code is left out, the rest resumes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import make_trainer, prompt_data, remax_module, save_policy
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from remax_lightning.data import PromptDataModule
from remax_lightning.errors import UserError
from remax_lightning.modules import ReMaxModule


class Remembers(Callback):
    """Has a state of any kind, and keeps what a checkpoint gives back."""

    def __init__(self, state: Any) -> None:
        self.state, self.found = state, None

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.found = state_dict["state"]


@dataclass(frozen=True)
class Options:
    """Of a callback of a user's own; it cannot be changed."""

    rate: float = 0.5


class Adds(ReMaxModule):
    """A subclass that writes to the checkpoint after this package has."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["of_mine"], checkpoint["count"] = Path("rewards.jsonl"), np.int64(3)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.found = {name: checkpoint.get(name) for name in ("of_mine", "count")}


class Table:
    """A schedule with an attribute of NumPy."""

    def __init__(self) -> None:
        self.rates = np.array([1.0, 0.5, 0.25])

    def __call__(self, step: int) -> Any:
        return self.rates[step]


class Position(DataLoader[Any]):
    """A data loader whose position could only be read by running code."""

    def state_dict(self) -> dict[str, Any]:
        return {"file": Path("rows.jsonl")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing was saved")


class PositionData(PromptDataModule):
    def train_dataloader(self) -> Any:
        loader: Any = super().train_dataloader()
        return Position(list(loader), batch_size=None)


def train(
    folder: Path,
    callback: Callback,
    steps: int,
    checkpoint: Path | None = None,
    data: type[PromptDataModule] = PromptDataModule,
    **options: Any,
) -> Trainer:
    policy = save_policy(folder / "policy")
    saves = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    length = {"max_steps": steps, "max_epochs": -1, "enable_checkpointing": True, "limit_val_batches": 0}
    trainer = make_trainer(folder, [callback, saves], **length)
    rows = prompt_data(folder, policy, kind=data)
    trainer.fit(remax_module(policy, **options), rows, ckpt_path=checkpoint)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (Path("rewards.jsonl"), r"pathlib\.\w*Path"),
        (lambda: 0, "what cannot be saved"),
        (np.zeros(2), "numpy"),
        (Options(), r"\S*Options"),
        (range(3), r"\S*range"),
    ],
    ids=["a class", "a lambda", "an array", "a frozen dataclass", "a range"],
)
def test_a_state_that_needs_code_is_left_out_and_the_run_resumes(state: Any, reason: str, tmp_path: Path) -> None:
    message = f"The state of Remembers is left out of checkpoints, .* it holds .*{reason}"
    with pytest.warns(UserWarning, match=message) as told:
        train(tmp_path, Remembers(state), 2)
    assert sum("is left out of checkpoints" in str(warning.message) for warning in told) == 1  # of two checkpoints
    resumed = Remembers(None)
    trainer = train(tmp_path, resumed, 3, tmp_path / "checkpoints" / "step=2.ckpt")
    assert (trainer.global_step, resumed.found) == (3, None)


@pytest.mark.slow
def test_tensors_numbers_and_text_come_back(tmp_path: Path) -> None:
    state = {"mean": np.float64(0.5), "best": [np.int64(3), 1.5], "weights": torch.arange(3.0), "of": ("a", None)}
    state["counts"] = {np.int64(4): {np.int64(2)}}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is left out of checkpoints")
        train(tmp_path, Remembers(state), 1)
    resumed = Remembers(None)
    train(tmp_path, resumed, 2, tmp_path / "checkpoints" / "step=1.ckpt")
    found: Any = resumed.found
    assert torch.equal(found.pop("weights"), torch.arange(3.0))
    assert found == {"mean": 0.5, "best": [3, 1.5], "of": ("a", None), "counts": {4: {2}}}


@pytest.mark.slow
def test_what_a_subclass_adds_after_us_is_looked_at_too(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"The state of of_mine is left out .* it holds .*pathlib"):
        train(tmp_path, Callback(), 1, kind=Adds)
    trainer = train(tmp_path, Callback(), 2, tmp_path / "checkpoints" / "step=1.ckpt", kind=Adds)
    module: Any = trainer.lightning_module
    assert (trainer.global_step, module.found) == (2, {"of_mine": None, "count": 3})


@pytest.mark.slow
def test_a_learning_rate_and_a_schedule_in_numbers_of_numpy_come_back(tmp_path: Path) -> None:
    def optimizer(parameters: Any) -> Optimizer:
        return AdamW(parameters, lr=1e-4 * np.sqrt(2))

    def schedule(optimizer: Optimizer) -> Any:
        return LambdaLR(optimizer, lambda step: np.float64(1) / (1 + step))

    options = {"optimizer": optimizer, "lr_scheduler": schedule}
    train(tmp_path, Callback(), 1, **options)
    trainer = train(tmp_path, Callback(), 2, tmp_path / "checkpoints" / "step=1.ckpt", **options)
    rate = trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0]
    assert (trainer.global_step, rate) == (2, pytest.approx(1e-4 * 2**0.5 / 3))


@pytest.mark.slow
def test_an_attribute_of_a_schedule_that_needs_code_stays_as_it_is_made(tmp_path: Path) -> None:
    options = {"lr_scheduler": lambda optimizer: LambdaLR(optimizer, Table())}
    with pytest.warns(UserWarning, match="The state of the schedule's lr_lambdas is left out .* it holds .*numpy"):
        train(tmp_path, Callback(), 1, **options)
    trainer = train(tmp_path, Callback(), 2, tmp_path / "checkpoints" / "step=1.ckpt", **options)
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == 0.25  # step 2 of the table


class Logs(AdamW):
    """An optimizer of a user's own that keeps where it writes to."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["file"] = Path("steps.jsonl")
        return loss


class Extra(ReMaxModule):
    def get_extra_state(self) -> Any:
        return {"file": Path("rows.jsonl")}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("it cannot be read")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("the optimizer", {"optimizer": Logs}), (r"the module \(`get_extra_state`\)", {"kind": Extra})],
    ids=["optimizer", "module"],
)
def test_a_state_that_no_run_could_resume_without_is_told_at_the_first_checkpoint(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=f"No run can resume .* the state of {name} holds .*pathlib") as told:
        train(tmp_path, Callback(), 2, **options)
    assert sum("No run can resume" in str(warning.message) for warning in told) == 1
    with pytest.raises(UserError, match="pathlib"):
        train(tmp_path, Callback(), 3, tmp_path / "checkpoints" / "step=2.ckpt", **options)


@pytest.mark.slow
def test_the_position_of_a_data_loader_that_needs_code_is_left_out(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"The state of the data loader is left out .* it holds .*pathlib"):
        train(tmp_path, Callback(), 1, data=PositionData)
    checkpoint = tmp_path / "checkpoints" / "step=1.ckpt"
    assert train(tmp_path, Callback(), 2, checkpoint, data=PositionData).global_step == 2
