"""How well cheap norms stand in for true ones: `python benchmarks/gradient_norms.py TASK ...`.

The monitor of a run weighs each response by the squared norm of its gradient at the logits, since a backward pass for
each response would cost too much. This compares it, the exact norm of the output head, and the length, with the norm
over all weights: by rank, by slope, and by the second moments of the gradient under every baseline that come out, as a
share of the greedy one's. TASK is the name of the lines in results/gradient_norms.jsonl; the other arguments are those
of `remax baselines`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import RESULTS
from timing import save
from torch import Tensor

from remax_lightning.tools.baselines import Sample, Seconds, compare, load_and_measure
from remax_lightning.tools.gradient_norms import agreement


def lines_of(task: str, sample: Sample, batch_size: int) -> list[dict[str, Any]]:
    """Return a line for each cheap norm.

    Args:
        task: name of the lines.
        sample: what was measured on the task.
        batch_size: prompts of a rollout batch.
    """
    seconds = Seconds(1.0, 0.0, 0.0)  # second moments alone
    true = {figure.name: figure.variance for figure in compare(sample, seconds, batch_size)}
    norms: dict[str, Tensor | None] = {
        "logits": sample.norms.logits, "head": sample.norms.head, "length": sample.lengths
    }  # fmt: skip
    lines = []
    for name, values in norms.items():
        if values is None:
            continue
        found = agreement(sample.norms.weights, values.double(), sample.num_samples)
        replaced = sample._replace(norms=sample.norms._replace(weights=values.double()))
        cheap = {figure.name: figure.variance for figure in compare(replaced, seconds, batch_size)}
        errors = [abs(math.log(cheap[baseline][0] / true[baseline][0])) for baseline in true]
        # A length that is the same for all has no ranks.
        value, low, high = (None if math.isnan(number) else round(number, 4) for number in found.rank_correlation)
        lines.append(
            {
                "benchmark": "gradient_norms",
                "size": task,
                "variant": name,
                "responses": len(sample.reward),
                "rank_correlation": value,
                "rank_correlation_low": low,
                "rank_correlation_high": high,
                "slope": round(found.slope, 3),
                "largest_error": round(math.exp(max(errors)) - 1, 4),
                "second_moments": {
                    baseline: {
                        "true": [round(number, 4) for number in true[baseline]],
                        "cheap": [round(number, 4) for number in cheap[baseline]],
                    }
                    for baseline in true
                },
            }
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one task and write the lines down, in the place of older ones of the same task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="name of the lines in the results")
    parser.add_argument("--num_prompts", type=int, default=128)
    parser.add_argument("--results", type=Path, default=RESULTS / "gradient_norms.jsonl")
    options, rest = parser.parse_known_args(arguments)
    measured = load_and_measure(rest, options.num_prompts, lambda text: print(text, flush=True))
    lines = lines_of(options.task, measured.sample, measured.batch_size)
    for line in lines:
        print({name: value for name, value in line.items() if name != "second_moments"}, flush=True)
    save(options.results, lines)


if __name__ == "__main__":
    main()
