"""`remax baselines`: which baseline pays on a run's own policy, reward and data, measured without any training.

The variance of the policy gradient decides how many responses a step needs, and the seconds of a response decide what
they cost. Their product is the time that a gradient of given precision takes; it is what a baseline is chosen by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from remax_lightning.baselines import (
    KINDS,
    Baseline,
    BaselineInputs,
    BaselineName,
    Tracker,
    checked_values,
    make_baseline,
)
from remax_lightning.errors import UserError
from remax_lightning.evaluation.statistics import percentile_interval, resampled_ratios
from remax_lightning.files import check_output
from remax_lightning.modules import ReMaxModule
from remax_lightning.tools.doctor.command import quiet_lightning
from remax_lightning.tools.doctor.context import load_context
from remax_lightning.tools.gradient_norms import Sample, Seconds, SquaredNorms, agreement, measure
from remax_lightning.tools.parsers import baselines_parser

NUM_RESAMPLES = 2000
"""Draws of the bootstrap, enough for two digits of a 95 % interval."""


class Figure(NamedTuple):
    """One line of the table; ratios are to the greedy baseline, with an interval.

    Args:
        name: of the baseline.
        second_moment: mean of `(r - b)² · |∇ log π(y)|²` over the responses.
        variance: that, divided by the greedy baseline's.
        seconds: per trained response.
        cost: variance times seconds, divided by the greedy baseline's.
    """

    name: str
    second_moment: float
    variance: tuple[float, float, float]
    seconds: float
    cost: tuple[float, float, float]


# ---- Figures from a sample ----


def second_moments(sample: Sample, baseline: Baseline, batch_size: int) -> Tensor:
    """Return `[B]` the mean over a prompt's samples of `(r - b)² · |∇ log π(y)|²`.

    An unbiased baseline changes the second moment of the gradient and not its mean, so second moments compare
    variances. Prompts are put together into batches as in training, since some baselines read them all.

    Args:
        sample: of `B` prompts.
        baseline: needs at most as many samples as there are.
        batch_size: prompts of a rollout batch.
    """
    n, num_prompts = sample.num_samples, len(sample.greedy_reward)
    if baseline.reads_gradients:
        return cast(SquaredNorms, sample.optimal).weights.view(-1, n).mean(1)
    moments = []
    # Batches as in training; where they do not divide the prompts, a little larger or smaller ones.
    for prompts in torch.arange(num_prompts).tensor_split(max(1, round(num_prompts / batch_size))):
        rows = slice(int(prompts[0]) * n, (int(prompts[-1]) + 1) * n)
        greedy, reward = sample.greedy_reward[prompts], sample.reward[rows]
        inputs = BaselineInputs(reward, n, greedy, sample.lengths[rows], prompts.tolist())
        advantages = reward - checked_values(baseline, inputs)  # [S of the batch]
        moments.append((advantages.square() * sample.norms.weights[rows]).view(-1, n).mean(1))
    return torch.cat(moments)


def tracker_moments(sample: Sample, tracker: Tracker, batch_size: int) -> Tensor:
    """Return `[B]` second moments of a tracker at its second visit: it has seen one sample, and values the others."""
    n = sample.num_samples
    prompts = list(range(len(sample.greedy_reward)))

    def part(columns: slice) -> Sample:
        values = (tensor.view(-1, n)[:, columns] for tensor in (sample.reward, sample.lengths, sample.norms.weights))
        reward, lengths, norms = (value.flatten() for value in values)
        part_norms = SquaredNorms(weights=norms, logits=norms, head=None)  # the first alone are read
        return Sample(reward, sample.greedy_reward, lengths, part_norms, len(reward) // len(prompts))

    first, rest = part(slice(0, 1)), part(slice(1, None))
    tracker.observe(BaselineInputs(first.reward, 1, first.greedy_reward, first.lengths, prompts))
    return second_moments(rest, tracker, batch_size)


def compare(sample: Sample, seconds: Seconds, batch_size: int, names: Sequence[str] | None = None) -> list[Figure]:
    """Return the figures of each baseline, the cheapest first; None for all that a sample tells of."""
    if names is None:
        # A biased one, the mean of the group, is leave_one_out times (n - 1) / n, so it has nothing to add.
        kinds = {name: kind() for name, kind in KINDS.items()}
        names = [
            name
            for name, kind in kinds.items()
            if kind.is_unbiased and (sample.optimal is not None or not kind.reads_gradients)
        ]
    made = {name: make_baseline(cast(BaselineName, name)) for name in names}
    moments = {
        name: tracker_moments(sample, baseline, batch_size)
        if isinstance(baseline, Tracker)
        else second_moments(sample, baseline, batch_size)
        for name, baseline in made.items()
    }  # [B] each
    base, base_seconds = moments["greedy"], seconds.of(made["greedy"])
    if not base.sum() > 0:
        raise UserError(
            "model.reward: every sampled response has the reward of its greedy one, so no baseline can be told from"
            " another; take more prompts (--num_prompts), or a reward that tells responses apart"
        )
    # ---- Intervals: prompts drawn anew, the same ones for all baselines ----
    columns = torch.stack(list(moments.values()), 1).cpu()  # [B, baselines]
    resampled = resampled_ratios(columns, base.cpu()[:, None].expand_as(columns), NUM_RESAMPLES, seed=0)
    figures = []
    for (name, values), (low, high) in zip(moments.items(), percentile_interval(resampled).tolist(), strict=True):
        variance = float(values.sum() / base.sum()), low, high
        price = seconds.of(made[name])
        cost = cast("tuple[float, float, float]", tuple(price / base_seconds * value for value in variance))
        figures.append(Figure(name, float(values.mean()), variance, price, cost))
    return sorted(figures, key=lambda figure: figure.cost[0])


def advice(figures: Sequence[Figure]) -> str:
    """Return which baseline to take, in words, as far as the intervals say it."""
    # The cheapest may be one of which little is known, such as one without a baseline.
    best = next((figure for figure in figures if figure.name != "greedy" and figure.cost[2] < 1), None)
    if best is None:
        cheaper = "No baseline is clearly cheaper than the greedy one here"
        return f"{cheaper}: keep model.advantage.baseline: greedy, or measure more prompts (--num_prompts)."
    low, high = (f"{value:.2f}" for value in best.cost[1:])
    samples = make_baseline(cast(BaselineName, best.name)).min_samples
    needed = f" with model.sampling.num_samples: {samples} or more" if samples > 1 else ""
    return (
        f"For a gradient of the same precision {best.name} needs {best.cost[0]:.2f} of the seconds of greedy"
        f" (95 %: {low} to {high}): try model.advantage.baseline: {best.name}{needed},"
        " or auto, which compares them during the run."
    )


# ---- The command ----


class Measured(NamedTuple):
    """A configuration, measured.

    Args:
        sample: what was measured on the responses.
        seconds: per trained response.
        batch_size: prompts of a rollout batch.
    """

    sample: Sample
    seconds: Seconds
    batch_size: int


def load_and_measure(arguments: Sequence[str], num_prompts: int, report: Callable[[str], None]) -> Measured:
    """Load what a configuration of `remax fit` names, and measure it.

    Args:
        arguments: of `remax fit`.
        num_prompts: prompts to measure.
        report: is told what is being done.

    Raises:
        UserError: if the configuration is wrong, or is not one of ReMax.
    """
    with quiet_lightning():
        context = load_context(arguments, num_prompts)
        if not isinstance(context.module, ReMaxModule):
            raise UserError(f"model: remax baselines needs ReMaxModule, got {type(context.module).__name__}")
        context.load_data()
        context.load_models()
        context.load_reward()
        # The leave-one-out family needs a second sample; the others are then measured on both.
        num_samples = max(2, context.module.sampling.num_samples)
        with context.trainer.precision_plugin.forward_context():
            sample, seconds = measure(context, num_samples, report)
    return Measured(sample, seconds, cast(Any, context.data).batch_size)


def main(args: Sequence[str]) -> list[Figure]:
    """Measure the baselines on a configuration of `remax fit`.

    Args:
        args: the arguments after `remax baselines`.

    Returns:
        The lines of the table.

    Raises:
        UserError: if the configuration is wrong, or is not one of ReMax.
    """
    options, rest = baselines_parser().parse_known_args(args)
    if options.num_prompts < 8:
        raise UserError(f"--num_prompts must be at least 8, got {options.num_prompts}: intervals need some prompts")
    check_output(options.json, "--json")
    check_output(options.picture, "--picture")
    sample, seconds, batch_size = load_and_measure(rest, options.num_prompts, lambda text: print(text, flush=True))
    figures = compare(sample, seconds, batch_size)
    cheap = agreement(sample.norms.weights, sample.norms.logits, sample.num_samples)
    print("\n" + table(figures) + "\n\n" + advice(figures))
    value, low, high = cheap.rank_correlation
    print(f"Norms at the logits, which a run is monitored by: rank correlation {value:.2f} ({low:.2f} to {high:.2f}).")
    if options.json is not None:
        written = {
            "num_prompts": len(sample.greedy_reward),
            "num_samples": sample.num_samples,
            "seconds": seconds._asdict(),
            "norms_at_logits": {"rank_correlation": cheap.rank_correlation, "slope": cheap.slope},
            "baselines": [figure._asdict() for figure in figures],
        }
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if options.picture is not None:
        options.picture.write_text(picture(figures), encoding="utf-8")
    return figures


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as lines of text."""
    lines = [
        f"{'baseline':20}{'variance':>10}  {'95 %':13}{'ms per response':>17}{'variance x seconds':>20}  95 %",
        "-" * 96,
    ]
    for figure in figures:
        variance, cost = (f"{values[0]:.2f}" for values in (figure.variance, figure.cost))
        spread, cost_spread = (f"{values[1]:.2f}-{values[2]:.2f}" for values in (figure.variance, figure.cost))
        lines.append(
            f"{figure.name:20}{variance:>10}  {spread:13}{1000 * figure.seconds:>17.1f}{cost:>20}  {cost_spread}"
        )
    return "\n".join(lines) + "\nvariance and variance x seconds are divided by those of greedy"


ROW, LEFT, WIDTH = 26, 170, 720
"""Pixels of the picture."""


def picture(figures: Sequence[Figure]) -> str:
    """Return an SVG: a bar of variance times seconds for each baseline, its interval, and a line at greedy."""
    largest = max(figure.cost[2] for figure in figures)
    scale = (WIDTH - LEFT - 60) / largest
    height = ROW * (len(figures) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
        ' font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="{ROW * 0.7}">variance times seconds of the gradient, divided by greedy; lines: 95 %</text>',
    ]
    one = LEFT + scale
    ends = f'x1="{one:.1f}" x2="{one:.1f}" y1="{ROW}" y2="{height - ROW / 2}"'
    parts.append(f'<line {ends} stroke="#222" stroke-dasharray="4"/>')
    for number, figure in enumerate(figures):
        y = ROW * (number + 1.2)
        value, low, high = (LEFT + scale * part for part in figure.cost)
        middle = y + ROW * 0.35
        color = "#c44e52" if figure.name == "greedy" else "#4c72b0"
        parts += [
            f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end">{figure.name}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{value - LEFT:.1f}" height="{ROW * 0.7}" fill="{color}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="#222"/>',
            # A white edge, where the number stands on the line at greedy.
            f'<text x="{high + 6:.1f}" y="{middle + 4}" stroke="#fff" stroke-width="4" paint-order="stroke">'
            f"{figure.cost[0]:.2f}</text>",
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
