"""The guards on real runs of a small policy: one that learns, and one whose learning rate ruins it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import changed, remax, small_config, write_config
from helpers.training import save_policy

pytestmark = pytest.mark.slow


def digits(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """Reward: the share of digits among the characters."""
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in responses]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def alarms(folder: Path, policy: str, capsys: pytest.CaptureFixture[str], lr: float, action: str) -> list[str]:
    """Guards that warned in a run of 40 optimizer steps at most, a window being 5, and the step of a stop."""
    reward = {"class_path": "FunctionReward", "init_args": {"function": "callbacks.test_collapse_real.digits"}}
    config = changed(
        small_config(folder, policy, rows=84),
        trainer__max_steps=40,
        trainer__max_epochs=-1,
        trainer__limit_val_batches=0,
        model__reward=reward,
        model__optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}},
        data__batch_size=20,
        collapse={"window": 5, "action": action},
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ended = remax(capsys, "fit", "--config", write_config(folder / "run.yaml", config))
    assert ended.code == 0, ended.err
    [checkpoint] = folder.glob("runs/**/*.ckpt")
    told = [re.findall(r"collapse\.(\w+) =", str(each.message)) for each in caught]
    return [name for names in told for name in names] + re.findall(r"step=\d+", checkpoint.name)


def test_a_healthy_run_gives_no_alarm(tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert alarms(tmp_path, policy, capsys, lr=1e-4, action="stop") == ["step=40"]


def test_a_ruined_policy_is_noticed_and_the_run_stopped(
    tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    *names, stopped = alarms(tmp_path, policy, capsys, lr=0.1, action="stop")
    assert names
    assert int(stopped.removeprefix("step=")) < 40
