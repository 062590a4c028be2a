from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from callbacks.fakes import events, scalars
from callbacks.two_ranks import HORIZON, STOP_KL, TARGET_KL, main, outputs_of
from helpers.ranks import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    printed = launch(main, folder)
    assert "kl_monitor.stop_kl" in printed
    return folder


def steps(count: int) -> list[list[Any]]:
    """The parts of each optimizer step, of both ranks."""
    ranks = [outputs_of(0), outputs_of(1)]
    return [[part for outputs in ranks for part in outputs[2 * i : 2 * i + 2]] for i in range(count)]


def kls(parts: list[Any]) -> list[float]:
    return [sum(row) for part in parts for row in part["kl"].tolist()]


def test_both_ranks_decide_alike_on_what_both_saw(run: Path) -> None:
    seen = [json.loads((run / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0] == seen[1]
    assert seen[0]["steps"] == 3
    local = kls(outputs_of(0)[4:6])
    assert sum(local) / len(local) < STOP_KL  # rank 0 alone would have gone on
    coefficient, expected = 0.2, []
    for parts in steps(3):
        expected += [coefficient] * 2
        values = kls(parts)
        error = min(max(sum(values) / len(values) / TARGET_KL - 1, -0.2), 0.2)
        coefficient *= 1 + error * len(values) / HORIZON
    assert seen[0]["kl_coefs"] == pytest.approx([*expected, coefficient])


def test_numbers_are_those_of_both_ranks(run: Path) -> None:
    names = ("reward_variance", "advantage_variance", "kl_max", "gradient_variance/none")
    expected: dict[str, list[float]] = {name: [] for name in names}
    for parts in steps(3):
        rewards = [value for part in parts for value in part["rollout"].reward.tolist()]
        baselines = [value for part in parts for value in part["rollout"].baseline_reward.tolist() for _ in (0, 1)]
        expected["reward_variance"].append(statistics.pvariance(rewards))
        differences = [reward - baseline for reward, baseline in zip(rewards, baselines, strict=True)]
        expected["advantage_variance"].append(statistics.pvariance(differences))
        expected["kl_max"].append(max(kls(parts)))
        norms = [value for part in parts for value in part["squared_norm"].sum(1).tolist()]
        plain = sum(w * r**2 for w, r in zip(norms, rewards, strict=True))
        greedy = sum(w * d**2 for w, d in zip(norms, differences, strict=True))
        expected["gradient_variance/none"].append(plain / greedy)
    for name, values in expected.items():
        assert scalars(run, f"train/{name}") == pytest.approx(values, rel=1e-5), name
    assert scalars(run, "time/rollout_s") == pytest.approx([2 * 0.0015] * 3)
    reader = events(run)
    for event, parts in zip(reader.Histograms("distribution/reward"), steps(3), strict=True):
        rewards = [value for part in parts for value in part["rollout"].reward.tolist()]
        assert event.histogram_value.num == len(rewards) == 20
        assert event.histogram_value.sum == pytest.approx(sum(rewards))


def test_tokens_are_summed_over_ranks(run: Path) -> None:
    for i, parts in enumerate(steps(3)):
        tokens = sum(
            int(answers.response_mask.sum())
            for part in parts
            for answers in (part["rollout"].sampled, part["rollout"].greedy)
        )
        rate, seconds = scalars(run, "throughput/tokens_per_s")[i], scalars(run, "time/step_s")[i]
        assert rate * seconds == pytest.approx(tokens, rel=1e-3)


def test_rank_0_alone_writes_samples_and_each_rank_its_predictions(run: Path) -> None:
    text = (run / "logs" / "samples" / "train.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1] * 8 + [2] * 8 + [3] * 8
    for rank, rows in enumerate(([0, 2, 4], [1, 3])):  # rank 1 repeats row 0, so that it has two batches, too
        lines = (run / "version_0" / f"predictions.rank{rank}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"row": row} for row in rows for _ in range(2)]
    assert not (run / "version_0" / "predictions.jsonl").exists()
