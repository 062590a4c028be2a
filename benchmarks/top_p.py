"""Top-p without sorting the vocabulary: `python benchmarks/top_p.py`; writes results/top_p.jsonl.

Milliseconds of one draw's truncation to 0.9 of the probability, for 32 rows, by a sort as transformers does it and by
the package's two ways. `peaked` logits are like those of a trained model (about a hundred tokens reach 0.9), of `flat`
ones most of the vocabulary is kept, so that a CPU has to sort after all, which numpy does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from machine import RESULTS
from timing import device_name, interleaved, medians, save, seconds
from torch import Tensor

from remax_lightning.models.sampling import _top_p_by_digits, _top_p_of_likeliest

VOCABULARIES, ROWS, TOP_P = (32000, 50272, 151936), 32, 0.9
SPREADS = {"peaked": 5.0, "flat": 1.0}
"""Standard deviations of the logits in nats."""


def by_sort(logits: Tensor, top_p: float) -> Tensor:
    """Apply top-p as it was done before."""
    in_order, order = logits.sort(dim=-1, descending=True)
    probs = in_order.softmax(-1)
    dropped = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, probs.cumsum(-1) - probs >= top_p)
    return logits.masked_fill(dropped, -torch.inf)


WAYS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sort": by_sort,
    "likeliest_then_sort": _top_p_of_likeliest,
    "digits": _top_p_by_digits,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure every vocabulary and both kinds of logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=VOCABULARIES)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS / "top_p.jsonl", help="default: %(default)s")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    ways = {name: way for name, way in WAYS.items() if name != "likeliest_then_sort" or device.type == "cpu"}
    for size in options.vocabularies:
        for kind, spread in SPREADS.items():
            logits = spread * torch.randn(ROWS, size, generator=torch.Generator().manual_seed(0)).to(device)
            rounds = {name: _round(way, logits, device) for name, way in ways.items()}
            measured = {
                name: medians(figures)["seconds"]
                for name, figures in interleaved(rounds, options.repetitions, 2).items()
            }
            kept = float((by_sort(logits, TOP_P) > -torch.inf).sum(-1).float().mean())
            save(
                options.results,
                [
                    {
                        "benchmark": "top_p",
                        "size": str(size),
                        "lengths": kind,
                        "variant": name,
                        "device": device_name(device),
                        "dtype": "float32",
                        "milliseconds": 1000 * taken,
                        "ratio": taken / measured["sort"],
                        "kept": kept,
                    }
                    for name, taken in measured.items()
                ],
            )


def _round(
    way: Callable[[Tensor, float], Tensor], logits: Tensor, device: torch.device
) -> Callable[[int], dict[str, float]]:
    return lambda _: {"seconds": seconds(lambda: way(logits, TOP_P), device)[0]}


if __name__ == "__main__":
    main()
