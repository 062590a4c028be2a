"""A run tells its watchdog of its batches, and has one in every stage until it ends."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.training import make_trainer, prompt_data, remax_module, save_policy

from remax_lightning.errors import UserError
from remax_lightning.strategies import stall_watchdog


@pytest.fixture
def news(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the watchdogs were told."""
    told: list[str] = []
    report = stall_watchdog.StallWatchdog.report

    def keeps(watchdog: stall_watchdog.StallWatchdog, what: str) -> None:
        told.append(what)
        report(watchdog, what)

    monkeypatch.setattr(stall_watchdog.StallWatchdog, "report", keeps)
    return told


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_every_rollout_and_score_is_progress(
    stage: str, news: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(stall_watchdog.subprocess, "Popen", start)
    policy = save_policy(tmp_path / "policy")
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    getattr(trainer, stage)(remax_module(policy, stall_timeout=600.0), prompt_data(tmp_path, policy))
    assert any(what.startswith("generating responses to 8 prompts") for what in news)
    assert any(what.startswith("scoring 16 responses with CharacterReward, the first ") for what in news)
    assert ("training batch 0 after optimizer step 0" in news) == (stage == "fit")
    watching = [process for process in started if stall_watchdog.__file__ in process.args]  # type: ignore[operator]
    assert [process.poll() is not None for process in watching] == [True]  # watched once, and no longer


def test_a_limit_that_is_none_is_refused() -> None:
    for seconds in (0.0, -1.0, float("inf")):
        with pytest.raises(UserError, match=r"^model\.stall_timeout must be null or above 0( and finite)? \(seconds\)"):
            remax_module("nowhere", stall_timeout=seconds)
