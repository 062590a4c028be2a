from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.fakes import FakeModule, events, make_output, make_trainer

from remax_lightning import callbacks
from remax_lightning.callbacks.monitors import (
    response_advantage,
    response_baseline,
    response_kl,
    response_length,
    rollout_output,
)


def test_only_outputs_with_a_rollout_are_read() -> None:
    output = make_output(0)
    assert rollout_output(output) is output
    for other in (None, torch.zeros(()), {"loss": torch.zeros(())}, {"rollout": "text"}, []):
        assert rollout_output(other) is None


def test_values_per_response_against_loops() -> None:
    output = make_output(5, prompts=4, n=3)
    rollout = output["rollout"]
    kl, advantages, baseline = output["kl"], output["advantages"], rollout.baseline_reward
    assert kl is not None
    assert baseline is not None
    for i in range(12):
        length = sum(bool(token) for token in rollout.sampled.response_mask[i])
        assert response_length(output)[i] == length
        assert float(response_kl(output)[i]) == pytest.approx(sum(float(kl[i, t]) for t in range(length)))  # type: ignore[index]
        mean = sum(float(advantages[i, t]) for t in range(length)) / length
        assert float(response_advantage(output)[i]) == pytest.approx(mean)
        assert float(response_baseline(output)[i]) == float(baseline[i // 3])  # type: ignore[index]


def every_callback() -> list[Any]:
    return [
        callbacks.KLMonitor(target_kl=1.0, adaptive=True, stop_kl=1.0),
        callbacks.SampleDump(every_n_steps=1),
        callbacks.BaselineMonitor(),
        callbacks.Throughput(),
        callbacks.TensorBoardReport(every_n_steps=1),
        callbacks.PredictionWriter(),
    ]


def test_nothing_is_done_for_a_module_without_rollouts(tmp_path: Path) -> None:
    module = FakeModule([{}, {}], [{}], kl_coef=None)
    trainer = make_trainer(tmp_path, every_callback())
    trainer.fit(module)
    assert trainer.global_step == 2
    tags = events(tmp_path).Tags()
    assert [tag for tag in tags["scalars"] if tag != "epoch"] == []
    assert tags["histograms"] == tags["tensors"] == []
    assert not (tmp_path / "logs" / "samples").exists()


def test_a_fast_dev_run_leaves_no_files(tmp_path: Path) -> None:
    module = FakeModule([make_output(0)], [make_output(1)])
    trainer = make_trainer(tmp_path, [*every_callback(), callbacks.ExportPolicy()], fast_dev_run=True, logger=None)
    trainer.fit(module)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.slow(0.3)
def test_log_every_n_steps_holds(tmp_path: Path) -> None:
    outputs = [make_output(i) for i in range(6)]
    trainer = make_trainer(tmp_path, every_callback()[1:], log_every_n_steps=3)
    trainer.fit(FakeModule(outputs))
    assert [event.step for event in events(tmp_path).Scalars("train/reward_variance")] == [2, 5]
