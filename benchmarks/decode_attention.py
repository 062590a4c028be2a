"""Attention of decoded tokens on a CPU: `python benchmarks/decode_attention.py`; writes results/decode_attention.jsonl.

Microseconds of a layer's attention for one token of every row, what it writes included: in masked slots, where every
row has a copy of its prompt, and with prompts that are shared (`rollout/decode_attention.py`). Responses are an eighth
to seven eighths of their limit long. `tiny` and `small` are those of `rollout.py`, `135m` has the heads of
SmolLM2-135M, and `135m_n4` four sampled rows of each prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import RESULTS
from timing import interleaved, medians, save, seconds
from torch.nn.functional import scaled_dot_product_attention

from remax_lightning.models.forward import prompt_index_per_row
from remax_lightning.rollout.decode_attention import RolloutSize
from remax_lightning.rollout.shared_prefix import SharedPrefix
from remax_lightning.rollout.static_cache import allocate_slots

WIDTH = 64


class Heads(NamedTuple):
    """The attention of a model and the rollout it decodes.

    Args:
        layers: with keys and values of their own, so that they do not stay in the caches of the processor.
        heads: of queries, each `WIDTH` wide.
        groups: heads of keys.
        prompts: `B`.
        samples: per prompt; a greedy row comes with them.
        prompt: tokens of a prompt, `P`.
        response: most tokens of a response, `R`.
    """

    layers: int
    heads: int
    groups: int
    prompts: int
    samples: int
    prompt: int
    response: int


SHAPES = {
    "toy": Heads(1, 4, 2, 2, 2, 8, 8),  # for the test suite
    "tiny": Heads(4, 4, 4, 16, 1, 32, 64),
    "small": Heads(8, 8, 8, 16, 1, 64, 128),
    "135m": Heads(6, 9, 3, 16, 1, 128, 128),
    "135m_n4": Heads(6, 9, 3, 8, 4, 256, 128),
}


def main(arguments: list[str] | None = None) -> None:
    """Measure every shape that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [name for name in SHAPES if name != "toy"]
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=shapes)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS / "decode_attention.jsonl", help="default: %(default)s")
    options = parser.parse_args(arguments)
    for size in options.sizes:
        shape = SHAPES[size]
        measured = {
            name: medians(figures)["seconds"]
            for name, figures in interleaved(ways(shape), options.repetitions, 2).items()
        }
        lines: list[dict[str, Any]] = [
            {
                "benchmark": "decode_attention",
                "size": size,
                "variant": name,
                "device": "cpu",
                "dtype": "float32",
                "microseconds": 1e6 * taken,
                "ratio": taken / measured["masked_slots"],
            }
            for name, taken in measured.items()
        ]
        save(options.results, lines)


def ways(shape: Heads) -> dict[str, Callable[[int], dict[str, float]]]:
    """Return rounds over all layers at four lengths of the responses, by way of attending; seconds are per layer."""
    from transformers import DynamicCache

    # ---- A prefilled cache, and both kinds of keys and values made of it ----
    torch.manual_seed(0)
    cache = DynamicCache()
    for layer in range(shape.layers):
        cache.update(*(torch.randn(shape.prompts, shape.groups, shape.prompt, WIDTH) for _ in range(2)), layer)
    mask = torch.ones(shape.prompts, shape.prompt, dtype=torch.bool)
    rows = prompt_index_per_row(mask, shape.samples, greedy=True)
    size = RolloutSize(shape.prompts, len(rows), shape.prompt, shape.response)
    slots, shared = allocate_slots(cache, size), SharedPrefix(cache, size)
    for states in (slots, shared):
        states.fill(cache, mask, rows)
    for suffix in shared.suffix:
        suffix.normal_()
    query = torch.randn(len(rows), shape.heads, 1, WIDTH)
    token = torch.randn(len(rows), shape.groups, 1, WIDTH)

    def in_slots(slot: int) -> None:
        (_, _, seen), in_cache = slots.begin_step(len(rows), slot, (None,) * shape.layers, None)[1:]
        visible = (torch.arange(seen.shape[1]) <= slot).expand(len(rows), 1, 1, -1)
        packed = query.view(len(rows), shape.groups, -1, WIDTH)  # as transformers groups the queries of one token
        for layer in range(shape.layers):
            keys, values = in_cache.update(token, token, layer)
            scaled_dot_product_attention(packed, keys, values, attn_mask=visible)

    def in_prefix(slot: int) -> None:
        shared.begin_step(len(rows), slot, (None,) * shape.layers, None)
        for layer in range(shape.layers):
            shared.write(layer, token, token)
            shared.attend(layer, query.squeeze(2), WIDTH**-0.5)

    return {"masked_slots": _round(in_slots, shape), "shared_prefix": _round(in_prefix, shape)}


def _round(step: Callable[[int], None], shape: Heads) -> Callable[[int], dict[str, float]]:
    places = [shape.prompt + shape.response * eighths // 8 for eighths in (1, 3, 5, 7)]

    def once(turn: int) -> dict[str, float]:  # noqa: ARG001 (the same work in every round)
        taken, _ = seconds(lambda: [step(slot) for slot in places], torch.device("cpu"))
        return {"seconds": taken / len(places) / shape.layers}

    return once


if __name__ == "__main__":
    main()
