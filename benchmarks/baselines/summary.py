"""What the runs say: rewards at equal samples and at equal seconds, time to a reward, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.baselines.records import Cell, Curves, Evaluation
from benchmarks.baselines.tasks import ARMS, PPO, Arm, Task

BASE = "greedy"
"""What every arm is compared with."""
AUTO = "auto"
"""What is compared with the best of the others."""
PART = 0.8
"""Of the gain of the base in its tuning run: the reward that times are measured to."""
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Interval(NamedTuple):
    """A mean over seeds with its 95 % interval; one seed has none."""

    value: float
    low: float
    high: float
    count: int

    def excludes(self, number: float) -> bool:
        """Whether the interval says that the true value is another one."""
        return self.count > 1 and not self.low <= number <= self.high


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values with Student's interval."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, -math.inf, math.inf, count)
    half = _T.get(count - 1, 1.96) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


# ---- Curves ----


class Price(NamedTuple):
    """Seconds of a step with and without greedy responses, and the part of them that grows with generated responses."""

    greedy: float
    plain: float
    rollout: float

    def seconds(self, evaluation: Evaluation) -> float:
        """Return the seconds of training up to an evaluation."""
        plain_steps, added = evaluation.step - evaluation.greedy_steps, self.greedy - self.plain
        # Prompts beyond those trained on take their rollout alone, with greedy responses where the others have them.
        rollouts = evaluation.step * self.rollout + evaluation.greedy_steps * added
        further = rollouts * (evaluation.rollouts - 1)
        return evaluation.greedy_steps * self.greedy + plain_steps * self.plain + further


Prices = Mapping[tuple[str, str], Price]
"""By task and `Arm.kind`."""


def read_prices(lines: Sequence[Mapping[str, Any]]) -> Prices:
    """Return what steps cost. A greedy response costs the same at any number of samples."""
    rows = {(line["task"], line["kind"], line["greedy"]): line for line in lines}
    prices = {}
    for (task, kind, greedy), line in rows.items():
        if greedy:
            continue
        plain, added = line["processor_seconds"], 0.0
        base, single = rows.get((task, "n=1", True)), rows.get((task, "n=1", False))
        if base is not None and single is not None and kind.startswith("n="):
            # One greedy response for n samples: an n-th of what it costs for one.
            added = (base["processor_seconds"] - single["processor_seconds"]) / int(kind.removeprefix("n="))
        prices[task, kind] = Price(plain + added, plain, line.get("rollout_share", 0.0) * plain)
    return prices


Place = Callable[[Evaluation], float]
"""Where an evaluation lies on the axis of samples or of seconds."""


def by_samples(evaluation: Evaluation) -> float:
    """Return the responses that were trained on."""
    return float(evaluation.samples)


def reward(evaluation: Evaluation) -> float:
    """Return the mean reward of sampled responses to the held-out prompts."""
    return evaluation.figures["reward"]


def mean_reward(evaluations: Sequence[Evaluation], place: Place = by_samples, end: float = math.inf) -> float:
    """Return the mean height of the reward's curve up to `end`: the area under it, divided by its length."""
    area = length = 0.0
    for first, second in pairwise(evaluations):
        left, right = place(first), min(place(second), end)
        if right <= left:
            continue
        share = (right - left) / (place(second) - left)  # of this piece, which `end` may cut
        height = reward(first) + share * (reward(second) - reward(first))
        area += (right - left) * (reward(first) + height) / 2
        length += right - left
    return area / length if length else reward(evaluations[0])


def place_of(evaluations: Sequence[Evaluation], target: float, place: Place) -> float | None:
    """Return where the curve first reaches a reward, on a straight line between evaluations; None if it never does."""
    for first, second in pairwise(evaluations):
        low, high = reward(first), reward(second)
        if low >= target:
            return place(first)
        if high >= target:
            return place(first) + (place(second) - place(first)) * (target - low) / (high - low)
    return None


# ---- Choosing a rate, and the target ----


def _complete(curves: Curves, task: Task, arm: Arm, seeds: Sequence[int]) -> dict[Cell, list[Evaluation]]:
    return {
        cell: evaluations
        for cell, evaluations in curves.items()
        if cell.task == task.name and cell.arm == arm.name and cell.seed in seeds and evaluations[-1].step >= task.steps
    }


def tuning_scores(task: Task, arm: Arm, curves: Curves) -> dict[float, float]:
    """Return the mean reward over the tuning seeds by learning rate, of runs that have ended."""
    scores: dict[float, list[float]] = {}
    for cell, evaluations in _complete(curves, task, arm, task.tuning_seeds).items():
        scores.setdefault(cell.rate, []).append(mean_reward(evaluations))
    return {rate: statistics.fmean(values) for rate, values in scores.items()}


def tuning_kl(task: Task, arm: Arm, curves: Curves) -> dict[float, float]:
    """Return the KL at the end, nats per response, of the tuning runs by learning rate."""
    values: dict[float, list[float]] = {}
    for cell, evaluations in _complete(curves, task, arm, task.tuning_seeds).items():
        values.setdefault(cell.rate, []).append(evaluations[-1].figures.get("kl_per_response", math.nan))
    return {rate: statistics.fmean(of_seeds) for rate, of_seeds in values.items()}


def best_rate(task: Task, arm: Arm, curves: Curves) -> float | None:
    """Return the learning rate with the highest mean reward over the tuning seeds; None before there is a run."""
    scores = tuning_scores(task, arm, curves)
    return max(scores, key=lambda rate: scores[rate]) if scores else None


def target_reward(task: Task, curves: Curves) -> float | None:
    """Return the reward that times are measured to: known from the tuning runs of the base, before any run counts."""
    rate = best_rate(task, ARMS[BASE], curves)
    runs = [
        evaluations
        for cell, evaluations in _complete(curves, task, ARMS[BASE], task.tuning_seeds).items()
        if cell.rate == rate
    ]
    if not runs:
        return None
    start, end = (statistics.fmean(reward(run[place]) for run in runs) for place in (0, -1))
    return start + PART * (end - start)


# ---- A row for each arm ----


class Row(NamedTuple):
    """What an arm has reached, over its seeds.

    Args:
        arm: its name.
        rate: its learning rate.
        runs: evaluations by seed.
        samples: difference of the mean reward to the base at equal samples, paired by seed.
        seconds: the same at equal seconds, as many as the cheapest arm takes; None without measured seconds.
        time: seconds to the target, divided by those of the base; None where a run never reaches it.
        reached: runs that reach the target.
        reward: at the end.
        kl: to the start at the end, nats per response.
        variance: of the gradient by the monitor, divided by that of the base; None where it cannot tell.
    """

    arm: str
    rate: float
    runs: dict[int, list[Evaluation]]
    samples: Interval
    seconds: Interval | None
    time: Interval | None
    reached: int
    reward: Interval
    kl: Interval
    variance: float | None


def rows(task: Task, curves: Curves, prices: Prices, common_rate: float | None = None) -> list[Row]:
    """Return a row for each arm with runs that count, the base first; none before the base has some.

    Args:
        task: of the runs.
        curves: all runs.
        prices: seconds of steps.
        common_rate: the learning rate of all arms; by default each has the one that was chosen for it.
    """
    runs = {}
    arms = {**ARMS, PPO.name: PPO}
    for arm in arms.values():
        rate = best_rate(task, arm, curves) if common_rate is None else common_rate
        mine = _complete(curves, task, arm, task.seeds)
        by_seed = {cell.seed: evaluations for cell, evaluations in mine.items() if cell.rate == rate}
        if by_seed and rate is not None:
            runs[arm.name] = rate, by_seed
    if BASE not in runs:
        return []
    target = target_reward(task, curves)
    kinds = {name: (task.name, arms[name].kind) for name in runs}
    places = {name: prices[kind].seconds for name, kind in kinds.items() if kind in prices}
    # The seconds that every run has.
    end = min((places[name](run[-1]) for name in places for run in runs[name][1].values()), default=math.inf)
    base = runs[BASE][1]
    found = []
    for name, (rate, mine) in sorted(runs.items(), key=lambda item: item[0] != BASE):
        common = [seed for seed in sorted(mine) if seed in base]
        if not common:
            continue
        pairs = [(mine[seed], base[seed]) for seed in common]
        seconds = time = None
        if name in places and BASE in places:
            seconds = interval([mean_reward(run, places[name], end) - mean_reward(other, places[BASE], end)
                                for run, other in pairs])  # fmt: skip
            time = _time_ratio(pairs, target, places[name], places[BASE])
        found.append(
            Row(
                name,
                rate,
                mine,
                interval([mean_reward(run) - mean_reward(other) for run, other in pairs]),
                seconds,
                time,
                sum(target is not None and place_of(run, target, by_samples) is not None for run in mine.values()),
                interval([reward(run[-1]) for run in mine.values()]),
                interval([run[-1].figures.get("kl_per_response", math.nan) for run in mine.values()]),
                _variance(name, mine, base),
            )
        )
    return found


def _time_ratio(
    pairs: Sequence[tuple[list[Evaluation], list[Evaluation]]], target: float | None, place: Place, base_place: Place
) -> Interval | None:
    if target is None:
        return None
    logs = []
    for run, other in pairs:
        mine, base = place_of(run, target, place), place_of(other, target, base_place)
        if not mine or not base:
            return None
        logs.append(math.log(mine / base))
    return Interval(*(math.exp(value) for value in interval(logs)[:3]), len(logs))


def against_best(task: Task, found: Sequence[Row], curves: Curves, prices: Prices) -> tuple[str, Interval] | None:
    """Return the fixed baseline that is the first at the target, and the seconds of `auto` there divided by its own.

    Baselines count of which every run gets there, over the seeds that `auto` has, too. None where there is none, where
    a run of `auto` never gets there, or where no seconds were measured.
    """
    target, by_name = target_reward(task, curves), {row.arm: row for row in found}
    if AUTO not in by_name or target is None:
        return None
    times = {name: _seconds_to(target, task, row, prices) for name, row in by_name.items()}
    mine = times.pop(AUTO)
    if not mine or not all(mine.values()):
        return None
    ratios = {
        name: [math.log(mine[seed] / of_seed[seed]) for seed in sorted(mine) if seed in of_seed]
        for name, of_seed in times.items()
        if all(of_seed.values())
    }
    means = {name: statistics.fmean(values) for name, values in ratios.items() if values}
    if not means:
        return None
    best = max(means, key=lambda name: means[name])
    spread = interval(ratios[best])
    return best, Interval(*(math.exp(value) for value in spread[:3]), spread.count)


def _seconds_to(target: float, task: Task, row: Row, prices: Prices) -> dict[int, float]:
    """Return the seconds to a reward by seed, 0 of a run that never reaches it; empty for what is no fixed baseline."""
    arm = ARMS.get(row.arm)
    if arm is None or arm.options or (task.name, arm.kind) not in prices:
        return {}
    place = prices[task.name, arm.kind].seconds
    return {seed: place_of(run, target, place) or 0.0 for seed, run in row.runs.items()}


def _variance(name: str, runs: Mapping[int, list[Evaluation]], base: Mapping[int, list[Evaluation]]) -> float | None:
    """Return what the monitor says of an arm: in the runs of the base, or through a baseline that both tell of.

    None of an arm that draws other prompts, whose gradients are others.
    """
    if ARMS.get(name, PPO).options:
        return None
    direct = _logged(base, name)
    if name == BASE or direct is not None:
        return 1.0 if name == BASE else direct
    mine, theirs = _logged(runs, "batch_mean"), _logged(base, "batch_mean")
    return None if mine is None or theirs is None else theirs / mine


def _logged(runs: Mapping[int, list[Evaluation]], name: str) -> float | None:
    values = [
        math.log(evaluation.variance[name])
        for run in runs.values()
        for evaluation in run
        if evaluation.variance.get(name, 0) > 0
    ]
    return math.exp(statistics.fmean(values)) if values else None


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Return Spearman's correlation of pairs; nan where one side is constant or there are too few."""
    if len(pairs) < 3:
        return math.nan

    def ranks(values: Sequence[float]) -> list[float]:
        # Equal values share their mean rank.
        return [(sum(other < value for other in values) + sum(other <= value for other in values) - 1) / 2
                for value in values]  # fmt: skip

    first, second = (ranks(column) for column in zip(*pairs, strict=True))
    if len(set(first)) == 1 or len(set(second)) == 1:
        return math.nan
    return statistics.correlation(first, second)
