"""The study of baselines: what its curves say, which runs come next, pieces that resume, and the page made of it."""

from __future__ import annotations

import json
import math
import mmap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import in_folder, write_config
from helpers.doctor import healthy
from helpers.training import save_policy

from benchmarks.baselines import figure, gradients, norms, page, records, runs, summary, tasks
from benchmarks.baselines.records import Cell, Curves, Evaluation
from benchmarks.baselines.tasks import ARMS, Task
from remax_lightning.tools.gradient_norms import Sample, SquaredNorms

TASK = Task("tiny", "tiny", "", responses=10, steps=4, every=2, rates=(1.0, 2.0), prepare=lambda: None)


def run(*rewards: float, greedy: bool = True, **variance: float) -> list[Evaluation]:
    """Evaluations every two steps of ten responses."""
    return [
        Evaluation(2 * i, 20 * i, 2 * i * greedy, {"reward": reward, "kl_per_response": 0.5}, dict(variance))
        for i, reward in enumerate(rewards)
    ]


def cells(values: dict[tuple[str, float, int], list[Evaluation]]) -> Curves:
    return {Cell("tiny", arm, rate, seed): evaluations for (arm, rate, seed), evaluations in values.items()}


# ---- What curves say ----


def test_the_mean_reward_is_the_area_under_the_curve() -> None:
    assert summary.mean_reward(run(0, 1, 1)) == 0.75
    assert summary.mean_reward(run(0, 1, 1), end=20) == 0.5
    assert summary.mean_reward(run(0, 1, 1), end=10) == 0.25
    # 3 seconds a step: 6 of them up to a reward of 1, and 3 at it.
    assert summary.mean_reward(run(0, 1, 1), lambda point: 3.0 * point.step, end=9) == pytest.approx((3 + 3) / 9)


def test_a_reward_is_reached_between_evaluations() -> None:
    assert summary.place_of(run(0, 0.5, 1), 0.75, summary.by_samples) == 30
    assert summary.place_of(run(0, 0.5, 0.4), 0.75, summary.by_samples) is None


def test_seconds_are_those_of_steps_with_and_without_greedy_responses() -> None:
    lines = [
        {"task": "tiny", "kind": "n=1", "greedy": True, "processor_seconds": 3.0},
        {"task": "tiny", "kind": "n=1", "greedy": False, "processor_seconds": 2.0, "rollout_share": 0.5},
        {"task": "tiny", "kind": "n=2", "greedy": False, "processor_seconds": 1.8, "rollout_share": 0.5},
    ]
    prices = summary.read_prices(lines)
    assert prices["tiny", "n=1"].seconds(Evaluation(10, 100, 4, {}, {})) == 4 * 3 + 6 * 2
    assert prices["tiny", "n=2"].greedy == pytest.approx(1.8 + 0.5)
    # Twice as many prompts answered as trained on: the part of the rollout once more.
    assert prices["tiny", "n=1"].seconds(Evaluation(10, 100, 0, {}, {}, rollouts=2.0)) == 20 + 10
    # With greedy responses, too, which take a second.
    assert prices["tiny", "n=1"].seconds(Evaluation(10, 100, 10, {}, {}, rollouts=2.0)) == 30 + 10 + 10


def test_intervals_are_students() -> None:
    scipy = pytest.importorskip("scipy.stats")
    values = [0.1, 0.4, 0.3]
    low, high = scipy.t.interval(0.95, 2, loc=sum(values) / 3, scale=scipy.sem(values))
    found = summary.interval(values)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-3)
    assert found.excludes(1.0)
    assert not found.excludes(0.0)
    assert not summary.interval([0.3]).excludes(0.0), "one seed says nothing"


def test_a_difference_is_paired_by_seed_and_named_only_if_it_is_clear() -> None:
    values = {(arm, 1.0, 100): run(0, 0.5, 1) for arm in ("greedy", "none", "tracker")}
    for seed in (1, 2, 3):
        values["greedy", 1.0, seed] = run(0, 0.1 * seed, 0.2 * seed, none=0.5, tracker=1.5)
        values["none", 1.0, seed] = run(0, 0.1 * seed + 0.1, 0.2 * seed + 0.1 + 0.001 * seed)
        values["tracker", 1.0, seed] = run(0, 0.1 * seed + 0.2 * (-1) ** seed, 0.2 * seed)
    found = {row.arm: row for row in summary.rows(TASK, cells(values), {})}
    assert list(found) == ["greedy", "none", "tracker"]
    assert found["none"].samples.excludes(0)
    assert not found["tracker"].samples.excludes(0)
    assert found["none"].variance == pytest.approx(0.5)
    assert found["none"].seconds is None, "no seconds were measured"
    text = page.section(TASK, cells(values), {})
    assert "At equal samples, better than greedy: `none`; worse: no arm; not significant: `tracker`." in text
    assert "| `none` | 1 | 3 | +0." in text
    assert "| `none` | 1: **0.500** (0.5) |" in text


def test_auto_is_compared_with_the_best_fixed_baseline() -> None:
    lines = [{"task": "tiny", "kind": "n=1", "greedy": False, "processor_seconds": 1.0}]
    values = {("greedy", 1.0, 100): run(0, 0.5, 1)}
    for arm, slope in (("greedy", 1.0), ("none", 1.5), ("tracker", 1.2), ("auto", 1.25), ("oversample", 2.0)):
        values[arm, 1.0, 100] = run(0, 0.5, 1)
        values |= {(arm, 1.0, seed): run(0, slope, slope + seed) for seed in (1, 2)}
    curves, prices = cells(values), summary.read_prices(lines)
    found = summary.rows(TASK, curves, prices)
    best, ratio = summary.against_best(TASK, found, curves, prices) or ("", None)
    assert (best, ratio.value, ratio.count) == ("none", pytest.approx(1.5 / 1.25), 2)
    assert "`auto` takes 1.20 (1.20 to 1.20) of the seconds of `none`" in page.section(TASK, curves, prices)
    assert {row.arm: row.variance for row in found}["oversample"] is None
    without = [row for row in found if row.arm != "auto"]
    assert summary.against_best(TASK, without, curves, prices) is None


def test_a_baseline_that_is_late_once_is_not_the_best_fixed_one() -> None:
    lines = [{"task": "tiny", "kind": "n=1", "greedy": False, "processor_seconds": 1.0}]
    values = {("greedy", 1.0, 100): run(0, 0.5, 1), ("greedy", 1.0, 1): run(0, 0.1, 0.2)}
    values |= {("greedy", 1.0, 2): run(0, 2.0, 4), ("none", 1.0, 100): run(0, 0.5, 1)}
    for arm, slope in (("none", 1.5), ("auto", 1.25)):
        values[arm, 1.0, 100] = run(0, 0.5, 1)
        values |= {(arm, 1.0, seed): run(0, slope, slope + seed) for seed in (1, 2)}
    curves, prices = cells(values), summary.read_prices(lines)
    best, ratio = summary.against_best(TASK, summary.rows(TASK, curves, prices), curves, prices) or ("", None)
    assert (best, ratio.value, ratio.count) == ("none", pytest.approx(1.5 / 1.25), 2), "greedy never gets there once"


def test_the_target_comes_from_tuning_alone() -> None:
    tuning = {("greedy", 1.0, 100): run(0.2, 0.5, 0.7), ("greedy", 2.0, 100): run(0.2, 0.3, 0.4)}
    target = summary.target_reward(TASK, cells(tuning))
    assert target == pytest.approx(0.2 + 0.8 * 0.5)
    assert summary.target_reward(TASK, cells({**tuning, ("greedy", 1.0, 1): run(0, 9, 9)})) == target


def test_ranks_of_equal_values_are_shared() -> None:
    assert summary.rank_correlation([(1, 3), (2, 2), (3, 1)]) == -1
    assert summary.rank_correlation([(1, 1), (2, 2), (2, 2), (3, 3)]) == pytest.approx(1)
    assert math.isnan(summary.rank_correlation([(1, 1), (1, 2), (1, 3)]))


@pytest.mark.slow(0.3)
def test_memory_is_that_above_the_base() -> None:
    before = torch.ones(2**22)  # 16 MiB
    memory = records.PeakMemory()
    # Pages of the system's own: an allocator hands out what earlier tests gave back, and the process holds no more.
    with mmap.mmap(-1, 2**26) as more:  # 64 MiB
        more.write(b"1" * 2**26)
    assert float(before.sum()) == 2**22
    assert 0.055 < memory.gigabytes() < 0.2


# ---- Which runs come next ----


def wanted(curves: Curves, task: Task = TASK) -> list[tuple[str, float, int]]:
    return [cell[1:] for cell in runs.wanted_cells(task, [ARMS["greedy"], ARMS["none"]], curves)]


def test_rates_are_tuned_before_a_seed_counts_and_the_grid_goes_on_at_its_edge() -> None:
    assert wanted({})[:2] == [("greedy", 1.0, 100), ("greedy", 2.0, 100)]
    values = {("greedy", 1.0, 100): run(0, 0, 1), ("greedy", 2.0, 100): run(0, 1, 1)}
    assert wanted(cells(values))[0] == ("greedy", 4.0, 100), "the best rate was the highest"
    values["greedy", 4.0, 100] = run(0, 0.5, 1)
    assert ("greedy", 2.0, 1) in wanted(cells(values))
    # Another arm has not been tuned: only its rates are wanted, around the best of the base.
    assert [(rate, seed) for arm, rate, seed in wanted(cells(values)) if arm == "none"] == [
        (1.0, 100), (2.0, 100), (4.0, 100)]  # fmt: skip
    values |= {("none", 1.0, 100): run(0, 1, 1), ("none", 2.0, 100): run(0, 0, 1)}
    assert [rate for arm, rate, _ in wanted(cells(values)) if arm == "none"] == [4.0]
    values["none", 4.0, 100] = run(0, 0, 1)
    assert [rate for arm, rate, _ in wanted(cells(values)) if arm == "none"] == [0.5], "the best rate was the lowest"
    values["none", 0.5, 100] = run(0, 0, 1)
    assert {(rate, seed) for arm, rate, seed in wanted(cells(values)) if arm == "none"} == {
        (1.0, 1),
        (1.0, 2),
        (1.0, 3),
    }


def test_runs_that_count_come_seed_by_seed_and_only_incomplete_ones() -> None:
    values = {}
    for arm in ("greedy", "none"):
        values |= {(arm, 0.5, 100): run(0, 0, 0), (arm, 1.0, 100): run(0, 1, 1), (arm, 2.0, 100): run(0, 0, 1)}
    assert [cell[::2] for cell in wanted(cells(values))[:3]] == [("greedy", 1), ("none", 1), ("greedy", 2)]
    values["greedy", 1.0, 1] = run(0, 1, 1)
    values["none", 1.0, 1] = run(0, 1)  # stopped
    assert [cell[::2] for cell in wanted(cells(values))[:2]] == [("none", 1), ("greedy", 2)]


def test_all_arms_run_at_a_common_rate_where_the_task_has_one() -> None:
    task = TASK._replace(common_rate=0.5, seeds=(1, 2))
    values = {}
    for arm in ("greedy", "none"):
        values |= {(arm, 0.5, 100): run(0, 0, 0), (arm, 1.0, 100): run(0, 1, 1), (arm, 2.0, 100): run(0, 0, 1)}
        values |= {(arm, 1.0, seed): run(0, 1, 1) for seed in (1, 2)}
    values["none", 0.5, 1] = run(0, 1, 1)
    assert wanted(cells(values), task) == [("greedy", 0.5, 1), ("greedy", 0.5, 2), ("none", 0.5, 2)], "the last of all"
    values |= {("greedy", 0.5, seed): run(0, 0, 0.5) for seed in (1, 2)}
    curves = cells(values)
    [base, other] = summary.rows(task, curves, {}, 0.5)
    assert (base.rate, other.arm, other.rate, other.samples.value) == (0.5, "none", 0.5, pytest.approx(0.625))
    assert summary.rows(task, curves, {})[0].rate == 1.0
    text = page.section(task, curves, {})
    assert "All at a learning rate of 0.5:" in text
    assert text.count("| `none` | 1 | 2 |") == text.count("| `none` | 0.5 | 1 |") == 1
    assert "All at" not in page.section(TASK, curves, {})


def test_the_last_of_two_evaluations_of_a_step_counts_and_half_a_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    cell = Cell("tiny", "none", 1.0, 1)
    for reward in (0.1, 0.2):
        records.append(path, {**cell._asdict(), **run(reward)[0]._asdict()})
    with path.open("a") as file:
        file.write('{"task": "ti')
    assert records.read_curves([path]) == {cell: run(0.2)}


# ---- The page ----


def test_the_page_is_made_of_the_results() -> None:
    text = page.PAGE.read_text()
    curves = records.read_curves([records.RUNS])
    prices = summary.read_prices(records.read_lines(records.SECONDS))
    assert page.with_tables(text, curves, prices) == text, "stale: run python -m benchmarks.baselines table"
    for task in tasks.TASKS.values():
        assert f"table: {task.name} -->" in text


def test_bands_are_the_range_over_runs_on_a_common_axis() -> None:
    band = figure.common_band("a", [([0, 10], [0, 1]), ([0, 5, 20], [1, 1, 1])], points=3)
    assert band.x == [0, 5, 10]
    assert (band.low, band.high, band.mean) == ([0, 0.5, 1], [1, 1, 1], [0.5, 0.75, 1])
    svg = figure.draw("t", [("x", [band]), ("y", [band])], mark=0.5)
    assert svg.count("<polyline") == svg.count("<polygon") == 2
    assert svg.count(">a</text>") == 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.03, 0.94), (0, 30720), (0.61, 0.64)])
def test_ticks_are_few_round_and_within_the_axis(low: float, high: float) -> None:
    found = figure.ticks(low, high)
    assert 3 <= len(found) <= 8
    assert low <= found[0] <= found[-1] <= high


# ---- Runs ----

CONFIG = """
trainer: {accelerator: cpu}
model:
  policy: {path: policy}
  reference: {path: policy}
  reward: {class_path: FunctionReward, init_args: {function: remax_lightning.rewards.exact_match}}
  sampling: {max_response_length: 3}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
  check_on_policy: false
  stall_timeout: null
data: {path: rows.jsonl, val_path: rows.jsonl, max_prompt_length: 16}
collapse: {max_truncation_rate: null}
"""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Task:
    def prepare() -> None:
        save_policy(Path("policy"))
        rows = [{"prompt": f"{number}+1=", "response": str(number + 1)} for number in range(8)]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    task = TASK._replace(config=CONFIG, responses=4, rates=(0.1,), prepare=prepare)
    monkeypatch.setitem(tasks.TASKS, "tiny", task)
    monkeypatch.setattr(runs, "machine", lambda: {"commit": "abc"})
    return task


@pytest.mark.slow
def test_a_run_in_pieces_is_the_run_in_one(tiny: Task, tmp_path: Path) -> None:
    def evaluations(name: str, seconds: float) -> list[Any]:
        results, cell = tmp_path / f"{name}.jsonl", Cell("tiny", "greedy", 0.1, 1)
        for piece in range(10):
            now = time.monotonic()
            if runs.run_piece(cell, results, tmp_path / name, runs.Limits(now + 1000, seconds)):
                assert piece > 0 or seconds > 0
                break
        return [line._replace(variance={}) for line in records.read_curves([results])[cell]]

    whole, pieces = evaluations("whole", 1000), evaluations("pieces", 0)
    assert [line.step for line in whole] == [0, 2, 4]
    assert [line.samples for line in whole] == [0, 8, 16]
    assert [line.greedy_steps for line in whole] == [0, 2, 4]
    assert pieces == whole


@pytest.mark.slow
def test_the_seconds_of_steps_are_measured_without_the_monitor(tiny: Task, tmp_path: Path) -> None:
    clock = runs.time_steps(tiny, ARMS["leave_one_out"], tmp_path, steps=2, warmup=1)
    assert len(clock.steps) == 2
    assert all(wall > 0 and 0 < share < 1 for wall, _, share in clock.steps)
    assert 0 <= clock.peak_over_base_gb < 1


@pytest.mark.slow
def test_gradients_of_a_task_are_written_down(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", healthy(tmp_path))
    output = tmp_path / "baselines.jsonl"
    for _ in range(2):  # a second measurement takes the place of the first
        with in_folder(tmp_path):
            gradients.main(["tiny", "--results", str(output), "--config", config, "--num_prompts", "8"])
    lines = records.read_lines(output)
    named = {line["variant"]: line for line in lines}
    assert len(named) == len(lines) > 8
    assert named["greedy"]["variance"] == named["greedy"]["cost"] == 1.0
    assert named["none"]["size"] == "tiny"
    assert named["none"]["variance_low"] <= named["none"]["variance"] <= named["none"]["variance_high"]


@pytest.mark.slow
def test_norms_of_a_task_are_calibrated() -> None:
    generator = torch.Generator().manual_seed(0)
    reward, greedy, true = (torch.rand(64, generator=generator, dtype=torch.float64) for _ in range(3))
    greedy = greedy[:32]
    reward = torch.where(torch.arange(64) % 4 == 0, reward, greedy.repeat_interleave(2) + 0.1)  # greedy says much
    measured = SquaredNorms(true, 2 * true, None, true.square())
    lines = norms.lines_of("tiny", Sample(reward, greedy, torch.ones(64), measured, 2, norms_of(true)), 32)
    found = {line["variant"]: line for line in lines}
    assert list(found) == ["logits", "head_tokens", "length"], "the head could not be read"
    # Twice the norm is the same share of the greedy one's.
    assert found["logits"]["rank_correlation"] == found["head_tokens"]["rank_correlation"] == 1
    assert found["logits"]["slope"] == pytest.approx(1)
    moments = found["logits"]["second_moments"]
    assert moments["none"]["cheap"] == moments["none"]["true"] != [1, 1, 1]
    of_tokens = moments["optimal_per_token"]
    assert of_tokens["cheap"][0] == pytest.approx(3 * of_tokens["true"][0], rel=1e-3)
    assert found["logits"]["largest_error"] == pytest.approx(2, rel=1e-3)
    assert "optimal_per_token" not in found["length"]["second_moments"]
    assert 0 < found["logits"]["right_side"] <= found["logits"]["clear"]
    assert found["length"]["rank_correlation"] is None
    text = page.norms_table(lines)
    assert "| tiny, 64 responses | all weights | 1 | 1 |" in text
    assert "|  | at the logits | 1.00 (1.00 to 1.00) | 1.00 | 200% |" in text
    assert "all are alike" in text


def norms_of(true: torch.Tensor) -> SquaredNorms:
    """With one for each token: six times at the logits, so three times the share of twice the norm."""
    return SquaredNorms(true, 6 * true)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_arguments_of_every_task_and_arm_are_of_the_command(name: str) -> None:
    task = tasks.TASKS[name]
    for arm in ARMS.values():
        assert task.responses % arm.samples == 0
        given = tasks.arguments(task, arm, 1e-3, 1)
        assert f"--data.batch_size={task.responses // arm.samples}" in given
    assert not set(task.seeds) & set(task.tuning_seeds)
    assert task.steps % task.every == 0
