"""The charts of the report: their curves and the points to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from remax_lightning.evaluation.statistics import cheapest_baseline
from remax_lightning.tools.report.run import Curve

POINTS = 300
"""Maximum number of points per curve, which keeps the page small."""

WINDOWS = 25
"""The smoothing window is one 25th of the points of a curve."""

NUM_COLORS = 8
"""Number of colors in the palette of `style.css`."""

Smooth = tuple[list[int], list[float], list[float]]
"""Steps, means and standard deviations."""


class Line(NamedTuple):
    """A curve in a chart.

    Args:
        key: its log key.
        label: its name in the legend.
        color: index in the palette; training and validation of one quantity share it.
        points: draw points, for sparse measurements, instead of a smoothed line with a band.
        ends: log keys of the ends of its interval, which is drawn as the band around a line as it was logged; None for
            a smoothed one.
    """

    key: str
    label: str
    color: int = 0
    points: bool = False
    ends: tuple[str, str] | None = None


class Chart(NamedTuple):
    """A chart over optimizer steps.

    Args:
        title: title with the unit.
        lines: its curves.
        mark: value of a horizontal line and its name in the legend; None without.
        stacked: whether the curves are stacked.
        wide: whether the chart has the full width of the page.
        top: where the axis ends at the latest; what is above is drawn at its edge.
    """

    title: str
    lines: tuple[Line, ...]
    mark: tuple[float, str] | None = None
    stacked: bool = False
    wide: bool = False
    top: float | None = None


def _train_and_val(name: str) -> tuple[Line, Line]:
    return Line(f"train/{name}", "training"), Line(f"val/{name}", "validation", 1, points=True)


SECTIONS: dict[str, tuple[Chart, ...]] = {
    "Reward": (
        Chart(
            "Mean reward of the sampled and the greedy responses",
            (
                Line("train/reward", "sampled, training", 0),
                Line("train/baseline_reward", "greedy, training", 1),
                Line("val/reward", "sampled, validation", 0, points=True),
                Line("val/baseline_reward", "greedy, validation", 1, points=True),
            ),
            wide=True,
        ),
    ),
    "KL to the reference": (
        Chart("KL, nats per token", _train_and_val("kl")),
        Chart(
            "KL, nats per response",
            (Line("train/kl_per_response", "mean", 0), Line("train/kl_max", "largest of the step", 3)),
        ),
    ),
    "Responses": (
        Chart("Response length, tokens", _train_and_val("response_length")),
        Chart("Truncation rate, share of responses", _train_and_val("truncation_rate")),
        Chart("Entropy of the policy, nats per token", _train_and_val("entropy")),
    ),
    "Baseline": (
        Chart(
            "Variance of the advantage over that of the reward",
            (Line("train/reward_variance_ratio", "reward variance ratio", 2),),
            mark=(1.0, "1; says nothing of the gradients' sizes"),
        ),
        Chart(
            "Reward and baseline compared",
            (
                Line("train/baseline_correlation", "correlation", 0),
                Line("train/greedy_win_rate", "greedy win rate", 1),
                Line("train/zero_advantage_share", "zero advantages, share", 3),
            ),
        ),
    ),
    "Signs of collapse": (
        Chart(
            "Shares of responses",
            (Line("train/eos_rate", "ended by themselves", 0), Line("train/distinct_share", "distinct", 2)),
        ),
        Chart(
            "Correlation of reward and response length",
            (Line("train/length_correlation", "correlation", 1),),
        ),
        Chart(
            "Slope of the KL, nats per response and step",
            (Line("train/kl_slope", "slope", 3),),
        ),
    ),
    "Optimizer": (
        Chart("Learning rate", (Line("train/lr", "first parameter group", 2),)),
        Chart("Norm of the gradient, before clipping", (Line("train/grad_norm", "norm", 0),)),
    ),
    "Time": (
        Chart(
            "Seconds of an optimizer step, by phase",
            (
                Line("time/rollout_s", "rollout", 0),
                Line("time/reward_s", "reward and reference", 1),
                Line("time/train_s", "training pass and update", 2),
            ),
            stacked=True,
        ),
        Chart(
            "Response tokens per second",
            (
                Line("throughput/tokens_per_s", "of the whole step", 0),
                Line("throughput/rollout_tokens_per_s", "of the rollout", 1),
            ),
        ),
    ),
}
"""The charts of each section of the page."""

_NOT_DRAWN = ("epoch", "hp_metric", "time/step_s", "train/collapse_alarms", "train/baseline")

AXIS_TOP = 2.0
"""Where the charts of compared baselines end: one that needs many times as much is drawn at the edge."""

BASELINES = (
    *("greedy", "none", "batch_mean", "group_mean", "leave_one_out", "optimal_constant", "optimal_per_token"),
    *("shrinkage", "greedy_and_samples", "calibrated_greedy", "cached_greedy", "tracker"),
)
"""Names of the baselines, in the order in which `train/baseline` counts them."""


def smooth(curve: Curve, width: int | None = None) -> Smooth:
    """Return mean and population standard deviation in a window of `width` points around each point.

    Args:
        curve: the curve to smooth.
        width: size of the window, rounded down to an odd number; None takes a 25th of the points.
    """
    # 300 points -> 6 on either side; fewer at the ends of the curve
    half = (max(1, len(curve.values) // WINDOWS) if width is None else width - 1) // 2
    means, deviations = [], []
    for i in range(len(curve.values)):
        window = curve.values[max(0, i - half) : i + half + 1]
        mean = math.fsum(window) / len(window)
        means.append(mean)
        deviations.append(math.sqrt(math.fsum((value - mean) ** 2 for value in window) / len(window)))
    return curve.steps, means, deviations


def smooth_values(curve: Curve) -> Curve:
    """Return the means of `smooth`."""
    steps, means, _ = smooth(curve)
    return Curve(steps, means)


def thin_indices(length: int, points: int = POINTS) -> list[int]:
    """Return at most `points` evenly spaced indices below `length`, including the first and the last."""
    if length <= points:
        return list(range(length))
    # length 5, 3 points -> [0, 2, 4]
    return [round(i * (length - 1) / max(1, points - 1)) for i in range(points)]


def build_sections(curves: Mapping[str, Curve]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the sections with charts for the script of the page, and the titles of sections without curves."""
    # ---- The fixed sections, and all other curves in a last one ----
    known = SECTIONS | {
        "Reward": (*SECTIONS["Reward"], *reward_parts(curves)),
        "Baseline": (*compared_baselines(curves), *SECTIONS["Baseline"]),
    }
    lines = [line for charts in known.values() for chart in charts for line in chart.lines]
    named = {key for line in lines for key in (line.key, *(line.ends or ()))}
    apart = {*named, *_NOT_DRAWN, *single_values(curves)}  # one point is no curve
    others = sorted(key for key in curves if key not in apart)
    further = tuple(Chart(key, (Line(key, key, 0, key.startswith(("val/", "test/"))),)) for key in others)
    sections, missing = [], []
    # ---- Charts with at least one curve ----
    for title, charts in {**known, "Further curves": further}.items():
        section_charts = [_chart(chart, curves) for chart in charts if any(line.key in curves for line in chart.lines)]
        if title.startswith("KL") and (path := kl_against_reward(curves)):
            section_charts.append(path)
        if section_charts:
            text = baseline_text(curves) if title == "Baseline" else ""
            sections.append({"title": title, "charts": section_charts, "text": text})
        elif charts:
            missing.append(title)
    return sections, missing


def single_values(curves: Mapping[str, Curve]) -> dict[str, float]:
    """Return what was logged once and has no chart of its own, such as the figures of `remax test`."""
    drawn = {line.key for charts in SECTIONS.values() for chart in charts for line in chart.lines}
    once = {key: curve.values[0] for key, curve in curves.items() if len(curve.values) == 1}
    return {
        key: once[key] for key in sorted(once) if key not in drawn and key not in _NOT_DRAWN and "_part/" not in key
    }


def reward_parts(curves: Mapping[str, Curve]) -> tuple[Chart, ...]:
    """Return a chart of the parts of a reward, also of parts with weight 0; empty if the reward has no parts."""
    # "train/reward_part/format", "val/reward_part/format" -> "reward_part/format"
    names = sorted({key.partition("/")[2] for key in curves if "/reward_part/" in key})
    lines = []
    for number, name in enumerate(names):
        label, color = name.removeprefix("reward_part/"), number % NUM_COLORS
        lines.append(Line(f"train/{name}", f"{label}, training", color))
        lines.append(Line(f"val/{name}", f"{label}, validation", color, points=True))
    return (Chart("Parts of the reward of sampled responses", tuple(lines), wide=True),) if lines else ()


def compared_baselines(curves: Mapping[str, Curve]) -> tuple[Chart, ...]:
    """Return charts of what `GradientVariance` has logged of every baseline, the cheapest at the end first."""
    titles = {
        "variance_seconds": "Variance of the gradient times seconds of a step, over the baseline in use (cut at 2)",
        "gradient_variance": "Variance of the gradient, over the baseline in use (cut at 2)",
    }
    colors: dict[str, int] = {}
    charts = []
    for kind, title in titles.items():
        prefix = f"train/{kind}/"
        last = {key.removeprefix(prefix): curve.values[-1] for key, curve in curves.items() if key.startswith(prefix)}
        lines = []
        for name in sorted(last, key=lambda name: last[name]):
            color = colors.setdefault(name, len(colors) % NUM_COLORS)
            ends = (f"train/{kind}_low/{name}", f"train/{kind}_high/{name}")
            lines.append(Line(f"{prefix}{name}", f"{name} {last[name]:.2f}", color, ends=ends))
        if lines:
            charts.append(Chart(title, tuple(lines), (1.0, "1, the baseline in use"), wide=True, top=AXIS_TOP))
    return tuple(charts)


def baseline_text(curves: Mapping[str, Curve]) -> str:
    """Return which baseline is the cheapest on the run, and which ones `auto` took, in words."""
    # Of the last step that was compared: an older figure is of another baseline in use.
    compared = {key: curve for key, curve in curves.items() if "/variance_seconds" in key}
    sentences = []
    if compared:
        last = max(curve.steps[-1] for curve in compared.values())
        metrics = {key: curve.values[-1] for key, curve in compared.items() if curve.steps[-1] == last}
        cheapest = cheapest_baseline(metrics)
        if cheapest is not None and cheapest.high < 1:
            sentences.append(f"On this run {cheapest}, over the last rollouts.")
        else:
            sentences.append("On this run no baseline is clearly cheaper than the one in use.")
    used = curves.get("train/baseline")
    if used is not None:
        changes = [(used.steps[0], used.values[0])]
        changes += [
            (step, value)
            for step, value, before in zip(used.steps[1:], used.values[1:], used.values[:-1], strict=True)
            if value != before
        ]
        names = [f"{_baseline_name(value)} from step {step:,}" for step, value in changes]
        sentences.append(f"The baseline is chosen by the run (auto): {', '.join(names)}.")
    return " ".join(sentences)


def _baseline_name(value: float) -> str:
    return BASELINES[int(value)] if 0 <= value < len(BASELINES) else "another"


def _chart(chart: Chart, curves: Mapping[str, Curve]) -> dict[str, Any]:
    visible = {line.key: curves[line.key] for line in chart.lines if line.key in curves}
    if chart.stacked:  # stacked curves need the same steps
        common = sorted(set.intersection(*(set(curve.steps) for curve in visible.values())))
        visible = {key: Curve(common, _values_at(curve, common)) for key, curve in visible.items()}
    lines = [_line(line, visible[line.key], curves) for line in chart.lines if line.key in visible]
    return {
        "kind": "stack" if chart.stacked else "curves",
        "title": chart.title,
        "lines": lines,
        "mark": chart.mark,
        "wide": chart.wide,
        "top": chart.top,
    }


def _line(line: Line, curve: Curve, curves: Mapping[str, Curve]) -> dict[str, Any]:
    # ---- Points: validations, which are few ----
    description = {"label": line.label, "color": line.color, "points": line.points}
    if line.points:
        indices = thin_indices(len(curve.steps))
        return {**description, "x": [curve.steps[i] for i in indices], "y": _round(curve.values[i] for i in indices)}
    # ---- A line as it was logged, with the band of its interval ----
    if line.ends is not None:
        indices = thin_indices(len(curve.steps))
        bounds = [dict(zip(*curves[key], strict=True)) if key in curves else {} for key in line.ends]
        points = [(curve.steps[i], curve.values[i]) for i in indices]
        low, high = (_round(bound.get(step, value) for step, value in points) for bound in bounds)
        x, y = [step for step, _ in points], _round(value for _, value in points)
        return {**description, "x": x, "y": y, "low": low, "high": high, "interval": True}
    # ---- A smoothed line with a band of one standard deviation ----
    steps, means, deviations = smooth(curve)
    # Smooth all points before thinning, so that the line does not depend on the number of drawn points.
    indices = thin_indices(len(steps))
    return {
        **description,
        "x": [steps[i] for i in indices],
        "y": _round(means[i] for i in indices),
        "low": _round(means[i] - deviations[i] for i in indices),
        "high": _round(means[i] + deviations[i] for i in indices),
    }


def kl_against_reward(curves: Mapping[str, Curve]) -> dict[str, Any] | None:
    """Return the smoothed path of a run through KL and reward, with its validations; None without a KL."""
    lines = []
    for stage, label in (("train", "training, smoothed"), ("val", "validation")):
        kl, reward = curves.get(f"{stage}/kl"), curves.get(f"{stage}/reward")
        if kl is None or reward is None:
            continue
        # A point needs both values.
        common = sorted(set(kl.steps) & set(reward.steps))
        x, y = (_values_at(smooth_values(curve) if stage == "train" else curve, common) for curve in (kl, reward))
        indices = thin_indices(len(common), POINTS // 2)
        line = {
            "step": [common[i] for i in indices],
            "x": _round(x[i] for i in indices),
            "y": _round(y[i] for i in indices),
        }
        lines.append({**line, "label": label, "points": stage == "val"})
    if not any(line["step"] for line in lines):
        return None
    return {"kind": "path", "title": "Mean reward against KL, nats per token", "lines": lines, "wide": False}


def _values_at(curve: Curve, steps: Sequence[int]) -> list[float]:
    values = dict(zip(curve.steps, curve.values, strict=True))
    return [values[step] for step in steps]


def _round(values: Any) -> list[float]:
    return [float(f"{value:.5g}") for value in values]  # more digits than a chart shows would only fill the page
