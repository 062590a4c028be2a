from __future__ import annotations

import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.fakes import FakeModule, make_output, make_trainer, scalars, two_steps_of_two_parts

from remax_lightning.callbacks import BaselineMonitor
from remax_lightning.errors import UserError

NAMES = [
    "reward_variance",
    "advantage_variance",
    "reward_variance_ratio",
    "baseline_correlation",
    "zero_advantage_share",
    "greedy_win_rate",
]


def oracle(parts: list[Any]) -> dict[str, float]:
    pairs = [
        (float(part["rollout"].reward[i]), float(part["rollout"].baseline_reward[i // 2]))
        for part in parts
        for i in range(part["rollout"].reward.numel())
    ]
    rewards, baselines = zip(*pairs, strict=True)
    reward_variance = statistics.pvariance(rewards)
    advantage_variance = statistics.pvariance([r - b for r, b in pairs])
    return {
        "reward_variance": reward_variance,
        "advantage_variance": advantage_variance,
        "reward_variance_ratio": advantage_variance / reward_variance,
        "baseline_correlation": statistics.correlation(rewards, baselines),
        "zero_advantage_share": sum(r == b for r, b in pairs) / len(pairs),
        "greedy_win_rate": sum(b > r for r, b in pairs) / len(pairs),
    }


def test_numbers_over_the_parts_of_an_optimizer_step(tmp_path: Path) -> None:
    outputs = two_steps_of_two_parts()
    make_trainer(tmp_path, [BaselineMonitor()], accumulate_grad_batches=2).fit(FakeModule(outputs))
    expected = [oracle(outputs[:2]), oracle(outputs[2:])]
    assert 0 < expected[0]["zero_advantage_share"] < 1
    for name in NAMES:
        assert scalars(tmp_path, f"train/{name}") == pytest.approx([step[name] for step in expected]), name


def test_without_greedy_responses_nothing_is_logged(tmp_path: Path) -> None:
    make_trainer(tmp_path, [BaselineMonitor()]).fit(FakeModule([make_output(0, greedy=False)]))
    assert all(scalars(tmp_path, f"train/{name}") == [] for name in NAMES)


@pytest.mark.slow(0.3)
def test_a_step_without_greedy_responses_between_others_is_nan(tmp_path: Path) -> None:
    outputs = [make_output(0), make_output(1, greedy=False), make_output(2)]
    make_trainer(tmp_path, [BaselineMonitor()]).fit(FakeModule(outputs))
    for name in NAMES:
        values = scalars(tmp_path, f"train/{name}")
        assert [math.isnan(value) for value in values][1:] == [True, False]


def test_what_is_undefined_is_nan_and_not_the_last_value(tmp_path: Path) -> None:
    flat = make_output(0)
    flat["rollout"].reward.fill_(0.1)
    make_trainer(tmp_path, [BaselineMonitor()]).fit(FakeModule([make_output(1), flat]))
    assert scalars(tmp_path, "train/reward_variance")[1] == 0.0
    for name in ("reward_variance_ratio", "baseline_correlation"):
        values = scalars(tmp_path, f"train/{name}")
        assert [math.isnan(value) for value in values] == [False, True], name


def test_large_rewards_that_lie_close_keep_their_variance(tmp_path: Path) -> None:
    output = make_output(0)
    output["rollout"].reward.copy_(2.0**20 + torch.tensor([0.0, 0.125, 0.25, 0.375, 0.5, 0.625]))
    make_trainer(tmp_path, [BaselineMonitor()]).fit(FakeModule([output]))
    expected = statistics.pvariance([0.0, 0.125, 0.25, 0.375, 0.5, 0.625])
    assert scalars(tmp_path, "train/reward_variance") == pytest.approx([expected])


def outputs_with_ratio(above: list[bool]) -> list[Any]:
    outputs = []
    for harmful in above:
        output = make_output(0)
        output["rollout"].reward.copy_(torch.tensor([0.0, 0, 1, 1, 2, 2]))
        rewards = [2.0, 1, 0] if harmful else [0.0, 1, 2]
        output["rollout"].baseline_reward.copy_(torch.tensor(rewards))  # type: ignore[union-attr]
        outputs.append(output)
    return outputs


@pytest.mark.parametrize(
    ("above", "count"),
    [([True, True, True, True, True, True], 1), ([True, True, False, True, True], 0), ([False, True, True, True], 1)],
)
def test_warns_once_when_the_ratio_is_above_one_for_long(tmp_path: Path, above: list[bool], count: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, [BaselineMonitor(patience=3)]).fit(FakeModule(outputs_with_ratio(above)))
    assert sum("was above that of the reward" in str(warning.message) for warning in caught) == count


def test_patience_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"baseline_monitor\.patience"):
        BaselineMonitor(patience=0)
