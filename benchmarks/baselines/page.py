"""The tables and pictures of docs/baselines.md, made of the results."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.baselines.figure import Band, common_band, draw
from benchmarks.baselines.norms import NORMS
from benchmarks.baselines.records import ROOT, RUNS, SECONDS, Curves, read_curves, read_lines
from benchmarks.baselines.summary import (
    BASE,
    Interval,
    Price,
    Prices,
    Row,
    against_best,
    best_rate,
    by_samples,
    rank_correlation,
    read_prices,
    reward,
    rows,
    target_reward,
    tuning_kl,
    tuning_scores,
)
from benchmarks.baselines.tasks import ARMS, PPO, TASKS, Arm, Task

DOCS = ROOT / "docs"
PAGE = DOCS / "baselines.md"
PATTERN = r"(<!-- made by python -m benchmarks\.baselines table: (\w+) -->\n).*?(<!-- end of what is made -->)"


def write_page(page: Path = PAGE, results: Sequence[Path] = (RUNS,), seconds: Path = SECONDS) -> None:
    """Write the tables between their marks, and a picture for each task that has runs."""
    curves, prices = read_curves(results), read_prices(read_lines(seconds))
    page.write_text(with_tables(page.read_text(encoding="utf-8"), curves, prices), encoding="utf-8")
    for task in TASKS.values():
        found = rows(task, curves, prices)
        if found:
            (page.parent / f"baselines_{task.name}.svg").write_text(picture(task, found, curves, prices), "utf-8")


def with_tables(text: str, curves: Curves, prices: Prices) -> str:
    """Return the page with the table of each task as the results have it."""

    def made(match: re.Match[str]) -> str:
        content = norms_table(read_lines(NORMS)) if match[2] == "norms" else section(TASKS[match[2]], curves, prices)
        return f"{match[1]}\n{content}\n\n{match[3]}"

    return re.sub(PATTERN, made, text, flags=re.DOTALL)


NAMES = {
    "logits": "at the logits",
    "head": "of the head, exact",
    "head_tokens": "of the head, token by token",
    "length": "length",
}
SHOWN = ("batch_mean", "calibrated_greedy", "none", "optimal_per_token")
"""Baselines whose second moments the table of norms has."""


def norms_table(lines: Sequence[dict[str, Any]]) -> str:
    """Return how cheap norms agree with those over all weights, a row for each task and norm, as Markdown."""
    if not lines:
        return "No task was measured yet: `python -m benchmarks.baselines norms demo`."
    table = [
        "| task | norm | rank correlation with all weights (95 %) | slope | largest error of a second moment"
        f" | clear and on the right side | {', '.join(f'`{name}`' for name in SHOWN)} |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        moments = line["second_moments"]
        if line["variant"] == "logits":
            true = _moments(moments, "true")
            table.append(f"| {line['size']}, {line['responses']} responses | all weights | 1 | 1 | | | {true} |")
        value, low, high = (line[f"rank_correlation{end}"] for end in ("", "_low", "_high"))
        ranks = "all are alike" if value is None else f"{value:.2f} ({low:.2f} to {high:.2f})"
        sides = f"{line['right_side']} of {line['clear']}"
        cells = ["", NAMES[line["variant"]], ranks, f"{line['slope']:.2f}", f"{line['largest_error']:.0%}", sides]
        table.append(f"| {' | '.join(cells)} | {_moments(moments, 'cheap')} |")
    return "\n".join(table)


def _moments(moments: dict[str, Any], kind: str) -> str:
    return ", ".join(f"{moments[name][kind][0]:.2f}" if name in moments else "–" for name in SHOWN)  # noqa: RUF001


def section(task: Task, curves: Curves, prices: Prices) -> str:
    """Return the picture, the table and what is not clear of a task, as Markdown."""
    found = rows(task, curves, prices)
    tuning = _tuning(task, curves)
    if not found:
        waiting = f"No run that counts has ended yet: `python -m benchmarks.baselines run --task {task.name}`."
        return "\n".join([waiting, *([""] if tuning else []), *tuning])
    lines = [
        f"![Held-out reward over samples and seconds](baselines_{task.name}.svg)",
        "",
        *_table(task, found, curves, prices),
        *_at_common_rate(task, curves, prices),
    ]
    return "\n".join([*lines, "", *tuning])


def _at_common_rate(task: Task, curves: Curves, prices: Prices) -> list[str]:
    """Return the same table of the runs that all have one learning rate, where there are some."""
    if task.common_rate is None:
        return []
    found = rows(task, curves, prices, task.common_rate)
    if len(found) < 2:
        return []
    return ["", f"All at a learning rate of {task.common_rate:g}:", "", *_table(task, found, curves, prices)]


def _table(task: Task, found: Sequence[Row], curves: Curves, prices: Prices) -> list[str]:
    """Return a line for each arm, and what is clear of them."""
    target = target_reward(task, curves)
    reached = "–" if target is None else f"{target:.2f}"  # noqa: RUF001 - the dash of a table
    return [
        "| arm | learning rate | seeds | mean reward, equal samples, minus greedy's | equal seconds, minus greedy's"
        f" | seconds to {reached}, of greedy's | reward at the end | KL at the end, nats per response"
        " | variance by the monitor |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in found),
        "",
        _what_is_clear(found),
        *_auto(task, found, curves, prices),
        _monitor(found),
    ]


def _tuning(task: Task, curves: Curves) -> list[str]:
    """Return what the learning rates were chosen by: the mean reward of the tuning seeds with each."""
    lines = []
    for arm in (*ARMS.values(), PPO):
        scores, kl = tuning_scores(task, arm, curves), tuning_kl(task, arm, curves)
        best = max(scores, key=lambda rate: scores[rate], default=None)
        texts = {rate: f"**{score:.3f}**" if rate == best else f"{score:.3f}" for rate, score in scores.items()}
        cells = [f"{rate:g}: {texts[rate]} ({kl[rate]:.1f})" for rate in sorted(scores)]
        if cells:
            lines.append(f"| `{arm.name}` | {', '.join(cells)} |")
    if not lines:
        return []
    return [
        "| arm | mean reward of the tuning run, and its KL at the end, by learning rate |",
        "|---|---|",
        *lines,
        "",
        *_over_the_run(task, curves),
    ]


def _over_the_run(task: Task, curves: Curves) -> list[str]:
    """Return what the monitor says early and late in the tuning run of the base."""
    base = ARMS[BASE]
    rate = best_rate(task, base, curves)
    runs = [
        run for cell, run in curves.items() if cell[:3] == (task.name, BASE, rate) and cell.seed in task.tuning_seeds
    ]
    if not runs or not any(evaluation.variance for evaluation in runs[0]):
        return []
    shown = [evaluation for evaluation in runs[0] if evaluation.variance]
    shown = [shown[i] for i in sorted({round(j * (len(shown) - 1) / 3) for j in range(4)})]  # up to four, evenly spaced
    names = [name for name in shown[0].variance if name != BASE and all(name in point.variance for point in shown)]
    return [
        f"Variance by the monitor in the tuning run of `{BASE}`, divided by its own, at rewards of"
        f" {', '.join(f'{reward(point):.2f}' for point in shown)}:",
        "",
        f"| step | {' | '.join(f'`{name}`' for name in names)} |",
        f"|---|{'---|' * len(names)}",
        *(f"| {point.step} | {' | '.join(f'{point.variance[name]:.2f}' for name in names)} |" for point in shown),
    ]


def _line(row: Row) -> str:
    samples = _arm(row).samples
    name = f"`{row.arm}`" + (f", `n` = {samples}" if samples > 1 else "")
    if row.arm == BASE:
        differences = ["0", "0", "1"]
    else:
        differences = [_difference(row.samples), _difference(row.seconds), _ratio(row)]
    variance = "–" if row.variance is None else f"{row.variance:.2f}"  # noqa: RUF001
    cells = [name, f"{row.rate:g}", str(len(row.runs)), *differences, _spread(row.reward), _spread(row.kl), variance]
    return f"| {' | '.join(cells)} |"


def _difference(value: Interval | None) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    return f"{value.value:+.3f}" + (f" ({value.low:+.3f} to {value.high:+.3f})" if value.count > 1 else "")


def _ratio(row: Row) -> str:
    if row.time is None:
        return f"reached by {row.reached} of {len(row.runs)}"
    spread = f" ({row.time.low:.2f} to {row.time.high:.2f})" if row.time.count > 1 else ""
    return f"{row.time.value:.2f}{spread}"


def _spread(value: Interval) -> str:
    half = "" if value.count < 2 or not math.isfinite(value.high) else f" ± {value.high - value.value:.2f}"
    return f"{value.value:.2f}{half}"


def _what_is_clear(found: Sequence[Row]) -> str:
    """Say which differences an interval supports, and name all others."""
    sentences = []
    for name, values in (
        ("samples", {row.arm: row.samples for row in found}),
        ("seconds", {row.arm: row.seconds for row in found}),
    ):
        known = {arm: value for arm, value in values.items() if arm != BASE and value is not None}
        if not known:
            continue
        better = [f"`{arm}`" for arm, value in known.items() if value.excludes(0) and value.value > 0]
        worse = [f"`{arm}`" for arm, value in known.items() if value.excludes(0) and value.value < 0]
        unclear = [f"`{arm}`" for arm, value in known.items() if not value.excludes(0)]
        parts = [f"{what}: {', '.join(arms) or 'no arm'}" for what, arms in
                 (("better than greedy", better), ("worse", worse), ("not significant", unclear))]  # fmt: skip
        sentences.append(f"At equal {name}, {'; '.join(parts)}.")
    return " ".join(sentences)


def _auto(task: Task, found: Sequence[Row], curves: Curves, prices: Prices) -> list[str]:
    """Say how far `auto` is behind the best fixed baseline."""
    answer = against_best(task, found, curves, prices)
    if answer is None:
        return []
    best, ratio = answer
    spread = f" ({ratio.low:.2f} to {ratio.high:.2f})" if ratio.count > 1 else ""
    seeds = f"{ratio.count} seed{'s' if ratio.count > 1 else ''}"
    what = "the fixed baseline that gets there first"
    return [f"`auto` takes {ratio.value:.2f}{spread} of the seconds of `{best}`, {what}, over {seeds}."]


def _monitor(found: Sequence[Row]) -> str:
    pairs = [(row.variance, row.samples.value) for row in found if row.variance is not None]
    correlation = rank_correlation([(-variance, gain) for variance, gain in pairs])
    if math.isnan(correlation):
        return ""
    what = "Rank correlation of less variance by the monitor and more reward at equal samples"
    return f"{what}: {correlation:.2f} over {len(pairs)} arms."


def picture(task: Task, found: Sequence[Row], curves: Curves, prices: Prices) -> str:
    """Return the curves of a task over samples and, where they were measured, over seconds."""
    panels: list[tuple[str, list[Band]]] = [("trained responses", [_band(row, None) for row in found])]
    kinds = {row.arm: (task.name, _arm(row).kind) for row in found}
    timed = [row for row in found if kinds[row.arm] in prices]
    if timed:
        bands = [_band(row, prices[kinds[row.arm]]) for row in timed]
        panels.append(("seconds of one processor thread", bands))
    least, most = (find(len(row.runs) for row in found) for find in (min, max))
    count = f"{most}" if least == most else f"{least} to {most}"
    title = f"{task.title}: held-out reward, mean and range of {count} seeds"
    return draw(title, panels, target_reward(task, curves))


def _band(row: Row, price: Price | None) -> Band:
    place = by_samples if price is None else price.seconds
    runs = [([place(point) for point in run], [reward(point) for point in run]) for run in row.runs.values()]
    return common_band(row.arm, runs)


def _arm(row: Row) -> Arm:
    return ARMS.get(row.arm, PPO)
