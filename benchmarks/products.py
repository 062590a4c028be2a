"""Linear layers of few rows in both orders: `python benchmarks/products.py`; writes results/products.jsonl.

On a CPU in float32, `(W x^T)^T` and `x W^T` take different kernels, and which is quicker depends on the processor, the
rows and the layer. `ratio` is the time of the first, put in the usual order again, over that of the second, and
`is_taken` whether rollouts take it here (`remax_lightning/rollout/fused_layers.py`). A processor keeps its own lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, description
from timing import interleaved, medians, save, seconds
from torch import Tensor, nn

from remax_lightning.rollout.fused_layers import is_quicker_transposed, transposed_product

LAYERS = ((256, 256), (256, 688), (688, 256), (256, 4096), (512, 512), (512, 1376), (1376, 512), (512, 8192))
LAYERS += ((576, 192), (576, 1536), (1536, 576), (576, 49152), (896, 4864), (4864, 896), (1536, 256), (2048, 2048))
"""Inputs and outputs: of the benchmarks' tiny and small models, of one of 135 M and one of 0.5 B, and of wider ones,
with keys of grouped heads among them."""
ROWS = (2, 4, 8, 16, 24, 32, 48, 64)
NUMBERS = 10_000_000
"""Weights that are read between two looks at the clock."""


def main(arguments: list[str] | None = None) -> None:
    """Measure every layer and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="as many of the first ones")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS / "products.jsonl", help="default: %(default)s")
    options = parser.parse_args(arguments)
    lines = []
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        for inputs, outputs in LAYERS[: options.layers]:
            lines += [measure(inputs, outputs, rows, threads, options.repetitions) for rows in options.rows]
    save(options.results, lines)


@torch.no_grad()
def measure(inputs: int, outputs: int, rows: int, threads: int, repetitions: int) -> dict[str, Any]:
    """Return the line of a layer and a number of rows."""
    layer = nn.Linear(inputs, outputs, bias=False)
    given = torch.randn(rows, inputs)  # [M, in]
    orders = {
        "plain": partial(nn.functional.linear, given, layer.weight),
        "transposed": partial(transposed_product, layer, given),
    }
    calls = max(3, NUMBERS // layer.weight.numel())
    times = interleaved({name: partial(_timed, run, calls) for name, run in orders.items()}, repetitions, warmup=1)
    plain, transposed = (medians(times[name])["seconds"] for name in orders)
    return {
        "benchmark": "products",
        "size": f"{inputs} to {outputs}, {rows} rows",
        "variant": f"{description()['processor']}, {threads} threads",
        "device": "cpu",
        "dtype": "float32",
        "plain": plain,
        "transposed": transposed,
        "ratio": transposed / plain,
        "is_taken": is_quicker_transposed(rows, layer),
        "repetitions": repetitions,
    }


def _timed(run: Callable[[], Tensor], calls: int, _turn: int) -> dict[str, float]:
    """Return the seconds of one call, of as many in a row."""

    def many() -> None:
        for _ in range(calls):
            run()

    return {"seconds": seconds(many, torch.device("cpu"))[0] / calls}


if __name__ == "__main__":
    main()
