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


def train(folder: Path, callback: Callback, steps: int, checkpoint: Path | None = None) -> Trainer:
    policy = save_policy(folder / "policy")
    saves = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_steps": steps, "max_epochs": -1, "enable_checkpointing": True, "limit_val_batches": 0}
    trainer = make_trainer(folder, [callback, saves], **options)
    trainer.fit(remax_module(policy), prompt_data(folder, policy), ckpt_path=checkpoint)
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
