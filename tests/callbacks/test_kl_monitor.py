from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from callbacks.fakes import FakeModule, checkpoint_at, make_output, make_trainer, scalars, two_steps_of_two_parts

from remax_lightning.callbacks import KLMonitor
from remax_lightning.errors import UserError


def step_kls(outputs: list[Any]) -> list[list[float]]:
    """KL of every response, one list per optimizer step."""
    steps: list[list[float]] = [[]]
    for output in outputs:
        for row in output["kl"].tolist():
            steps[-1].append(sum(row))
        if output["closes_step"]:
            steps.append([])
    return steps[:-1]


def test_logs_over_the_parts_of_an_optimizer_step(tmp_path: Path) -> None:
    outputs = two_steps_of_two_parts()
    make_trainer(tmp_path, [KLMonitor()], accumulate_grad_batches=2).fit(FakeModule(outputs, kl_coef=0.3))
    kls = step_kls(outputs)
    assert scalars(tmp_path, "train/kl_max") == pytest.approx([max(step) for step in kls])
    assert scalars(tmp_path, "train/kl_per_response") == pytest.approx([sum(step) / len(step) for step in kls])
    assert scalars(tmp_path, "train/kl_coef") == pytest.approx([0.3, 0.3])
    shares = []
    for step in (0, 1):
        parts = outputs[2 * step : 2 * step + 2]
        reward = sum(abs(value) for part in parts for value in part["rollout"].reward.tolist())
        penalty = 0.3 * sum(abs(value) for value in kls[step])
        shares.append(penalty / (penalty + reward))
    assert scalars(tmp_path, "train/kl_share") == pytest.approx(shares)


def test_without_a_reference_nothing_is_logged(tmp_path: Path) -> None:
    make_trainer(tmp_path, [KLMonitor()]).fit(FakeModule([make_output(0, kl=False)]))
    assert scalars(tmp_path, "train/kl_max") == []


def test_stops_when_the_mean_exceeds_the_limit_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outputs = [make_output(i) for i in range(6)]
    means = [sum(step) / len(step) for step in step_kls(outputs)]
    limit = sorted(means)[-2]  # exceeded by the largest only
    assert limit > 0
    trainer = make_trainer(tmp_path, [KLMonitor(stop_kl=limit)])
    with caplog.at_level(logging.INFO):
        trainer.fit(FakeModule(outputs))
    assert trainer.global_step == means.index(max(means)) + 1 < 6
    assert "kl_monitor.stop_kl" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_kl_that_is_not_finite_stops_the_run(value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outputs = [make_output(i) for i in range(6)]
    outputs[2]["kl"][0, 0] = value
    trainer = make_trainer(tmp_path, [KLMonitor(stop_kl=1e6)])
    with caplog.at_level(logging.INFO):
        trainer.fit(FakeModule(outputs))
    assert trainer.global_step == 3
    assert "not finite" in caplog.text


def ziegler(coefficient: float, kls: list[list[float]], target: float, horizon: int) -> list[float]:
    """The coefficient before each step and after the last one."""
    values = [coefficient]
    for step in kls:
        error = (sum(step) / len(step) - target) / target
        error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
        values.append(values[-1] + values[-1] * error * len(step) / horizon)
    return values


@pytest.mark.parametrize("target", [0.05, 0.9, 30.0])
def test_the_adaptive_coefficient_follows_the_controller(tmp_path: Path, target: float) -> None:
    outputs = two_steps_of_two_parts()
    module = FakeModule(outputs, kl_coef=0.2)
    monitor = KLMonitor(target_kl=target, adaptive=True, horizon=40)
    make_trainer(tmp_path, [monitor], accumulate_grad_batches=2).fit(module)
    expected = ziegler(0.2, step_kls(outputs), target, 40)
    assert module.kl_coefs == pytest.approx([expected[0], expected[0], expected[1], expected[1]])
    assert module.kl_coef == pytest.approx(expected[2])
    assert scalars(tmp_path, "train/kl_coef") == pytest.approx(expected[:2])


def test_the_coefficient_stays_positive_in_a_step_larger_than_the_horizon(tmp_path: Path) -> None:
    module = FakeModule([make_output(0, prompts=20)], kl_coef=0.2)
    make_trainer(tmp_path, [KLMonitor(target_kl=1e6, adaptive=True, horizon=2)]).fit(module)
    assert module.kl_coef == pytest.approx(0.2 * 0.8)


def test_a_step_whose_kl_is_nan_leaves_the_coefficient(tmp_path: Path) -> None:
    output = make_output(0)
    output["kl"][0, 0] = float("nan")  # type: ignore[index]
    module = FakeModule([output], kl_coef=0.2)
    make_trainer(tmp_path, [KLMonitor(target_kl=1.0, adaptive=True)]).fit(module)
    assert module.kl_coef == 0.2


def test_a_resumed_run_goes_on_with_its_coefficient(tmp_path: Path) -> None:
    outputs = [make_output(i) for i in range(6)]

    def run(folder: str) -> tuple[Any, FakeModule]:
        monitor = KLMonitor(target_kl=1.0, adaptive=True, horizon=20)
        trainer = make_trainer(tmp_path / folder, [monitor, checkpoint_at(3, tmp_path / folder)])
        return trainer, FakeModule(outputs, kl_coef=0.2)

    trainer, whole = run("whole")
    trainer.fit(whole)
    half = tmp_path / "whole" / "step=3.ckpt"
    trainer, second = run("second")
    trainer.fit(second, ckpt_path=half, weights_only=True)
    assert len(set(whole.kl_coefs)) == 6
    assert second.kl_coefs == whole.kl_coefs[3:]
    assert second.kl_coef == whole.kl_coef


def test_a_fixed_coefficient_is_the_configured_one_after_resuming(tmp_path: Path) -> None:
    outputs = [make_output(i) for i in range(4)]
    first = make_trainer(tmp_path / "first", [KLMonitor(), checkpoint_at(2, tmp_path)])
    first.fit(FakeModule(outputs, kl_coef=0.2))
    module = FakeModule(outputs, kl_coef=0.5)
    second = make_trainer(tmp_path / "second", [KLMonitor()])
    second.fit(module, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert module.kl_coefs == [0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"stop_kl": 0.0}, "kl_monitor.stop_kl"),
        ({"target_kl": -1.0, "adaptive": True}, "kl_monitor.target_kl"),
        ({"target_kl": float("nan"), "adaptive": True}, "kl_monitor.target_kl"),
        ({"adaptive": True}, "kl_monitor.target_kl"),
        ({"target_kl": 1.0}, "kl_monitor.adaptive"),
        ({"horizon": 0}, "kl_monitor.horizon"),
    ],
)
def test_bad_arguments_name_their_key(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        KLMonitor(**arguments)


def test_a_limit_needs_a_kl(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"kl_monitor\.stop_kl needs a KL .*model\.kl\.loss_coef.*stop_kl: null"):
        make_trainer(tmp_path, [KLMonitor(stop_kl=0.1)]).fit(FakeModule([make_output(0, kl=False)]))


def test_adaptive_needs_a_kl_and_a_start(tmp_path: Path) -> None:
    def fit(output: Any, kl_coef: float) -> None:
        make_trainer(tmp_path, [KLMonitor(target_kl=1.0, adaptive=True)]).fit(FakeModule([output], kl_coef=kl_coef))

    with pytest.raises(UserError, match=r"kl_monitor\.adaptive needs a KL"):
        fit(make_output(0, kl=False), 0.1)
    with pytest.raises(UserError, match=r"model\.kl_coef"):
        fit(make_output(0), 0.0)
