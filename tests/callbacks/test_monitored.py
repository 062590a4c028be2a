"""A callback of Lightning that follows a figure which nothing logs is told before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.training import make_trainer, prompt_data, remax_module, save_policy
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from remax_lightning.callbacks import Evaluation
from remax_lightning.cli_errors import user_error_message
from remax_lightning.errors import UserError


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def steps(folder: Path, policy: str, *callbacks: Callback, **options: Any) -> int:
    """Train for one step of one epoch, with validation; return the number of steps."""
    defaults = {"max_steps": 1, "limit_val_batches": 1, "enable_checkpointing": True}
    trainer = make_trainer(folder, [Evaluation(), *callbacks], **(defaults | options))
    trainer.fit(remax_module(policy), prompt_data(folder, policy))
    return trainer.global_step


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_figure_that_no_validation_logs_is_refused(kind: Any, policy: str, tmp_path: Path) -> None:
    message = rf"trainer.callbacks: {kind.__name__} has monitor 'val/rewards', which no .* are .*val/reward, "
    with pytest.raises(UserError, match=message):
        steps(tmp_path, policy, kind(monitor="val/rewards"))


@pytest.mark.slow(0.3)
def test_one_that_is_logged_and_one_that_need_not_be_pass(policy: str, tmp_path: Path) -> None:
    callbacks = EarlyStopping("val/reward"), EarlyStopping("val/later", strict=False), EarlyStopping("train/loss")
    assert steps(tmp_path, policy, *callbacks) == 1


@pytest.mark.slow(0.3)
def test_what_lightning_refuses_itself_is_told_as_a_mistake(policy: str, tmp_path: Path) -> None:
    """Where it looks after each validation, and for figures of training."""
    with pytest.raises(RuntimeError, match="not available") as caught:
        steps(tmp_path, policy, EarlyStopping("train/rewards"))
    assert "`train/rewards` which is not available" in (user_error_message(caught.value) or "")
