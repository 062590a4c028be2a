"""How well cheap norms stand in for true ones: `python -m benchmarks.baselines norms {demo,dialogues,sentiment,sums}`.

The monitor of a run weighs each response by the squared norm of its gradient at the logits, since a backward pass for
each response would cost too much. This compares it, the norm of the output head, exact and token by token, and the
length, with the norm over all weights: by rank, by slope, and by the second moments of the gradient under every
baseline that come out, as a share of the greedy one's. The policy is the one that the study's runs of the task start
from; further arguments are those of `remax baselines`, and come last.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.baselines.records import machine, replace
from benchmarks.baselines.tasks import ARMS, FOLDER, TASKS, arguments, prepared, working_folder
from benchmarks.machine import RESULTS
from remax_lightning.tools.baselines import Figure, compare, load_and_measure
from remax_lightning.tools.gradient_norms import Sample, Seconds, SquaredNorms, agreement

NORMS = RESULTS / "gradient_norms.jsonl"
"""A line per task and cheap norm."""
SECONDS = Seconds(1.0, 0.0, 0.0)
"""Second moments alone are compared."""


def lines_of(task: str, sample: Sample, batch_size: int) -> list[dict[str, Any]]:
    """Return a line for each cheap norm.

    Args:
        task: name of the lines.
        sample: what was measured on the task.
        batch_size: prompts of a rollout batch.
    """
    true = {figure.name: figure for figure in compare(sample, SECONDS, batch_size)}
    # With a value for each token, only the norm at the logits has its own second moment.
    optimal = None if sample.optimal is None else SquaredNorms(sample.optimal.logits, sample.optimal.logits)
    cheap = {
        "logits": (sample.norms.logits, optimal),
        "head": (sample.norms.head, None),
        "head_tokens": (sample.norms.head_tokens, None),
        "length": (sample.lengths, None),
    }
    lines = []
    for name, (values, of_optimal) in cheap.items():
        if values is None:
            continue
        norms = sample.norms._replace(weights=values.double())
        replaced = sample._replace(norms=norms, optimal=of_optimal)
        found = agreement(sample.norms.weights, values.double(), sample.num_samples)
        # A length that is the same for all has no ranks.
        value, low, high = (None if math.isnan(number) else round(number, 4) for number in found.rank_correlation)
        line = {"benchmark": "gradient_norms", "size": task, "variant": name, "responses": len(sample.reward)}
        line |= {"rank_correlation": value, "rank_correlation_low": low, "rank_correlation_high": high}
        line |= {"slope": round(found.slope, 3)}
        lines.append(
            line | _calibration(true, {figure.name: figure for figure in compare(replaced, SECONDS, batch_size)})
        )
    return lines


def _calibration(true: dict[str, Figure], cheap: dict[str, Figure]) -> dict[str, Any]:
    """Return second moments by true and by cheap norms, and how far they are apart."""
    errors = [abs(math.log(figure.variance[0] / true[name].variance[0])) for name, figure in cheap.items()]
    clear = {name: figure.variance for name, figure in true.items() if name in cheap}
    clear = {name: variance for name, variance in clear.items() if variance[1] > 1 or variance[2] < 1}
    right = [name for name, variance in clear.items() if (variance[0] > 1) == (cheap[name].variance[0] > 1)]
    moments = {
        name: {
            "true": [round(number, 4) for number in true[name].variance],
            "cheap": [round(number, 4) for number in figure.variance],
        }
        for name, figure in cheap.items()
    }
    error = round(math.exp(max(errors)) - 1, 4)
    return {"largest_error": error, "clear": len(clear), "right_side": len(right), "second_moments": moments}


def main(given: Sequence[str] | None = None) -> None:
    """Measure one task and write the lines down, in the place of older ones of the same task."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.baselines norms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", help="of the study; with a --config of your own, the name of its lines")
    parser.add_argument("--num_prompts", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=NORMS, help="default: %(default)s")
    options, rest = parser.parse_known_args(given)
    results = options.results.resolve()
    if "--config" in rest:
        measured = load_and_measure(rest, options.num_prompts, _report)
    elif options.task in TASKS:
        task = TASKS[options.task]
        with working_folder(prepared(task, options.folder.resolve())):
            start = [*arguments(task, ARMS["greedy"], task.rates[0], 0), *rest]
            measured = load_and_measure(start, options.num_prompts, _report)
    else:
        parser.error(f"task must be of {', '.join(TASKS)}, or come with --config FILE, got {options.task!r}")
    lines = [machine() | line for line in lines_of(options.task, measured.sample, measured.batch_size)]
    for line in lines:
        print({name: line[name] for name in ("variant", "rank_correlation", "slope", "largest_error", "right_side")})
    replace(results, lines, ("benchmark", "size", "variant"))


def _report(text: str) -> None:
    print(text, flush=True)
