"""Operators per decoded token: `python benchmarks/operators.py`; writes results/operators.jsonl.

One decoding step of `PairedEngine` runs on tensors without memory, so no weights and no device are needed. Every
operator that launches a kernel counts; views do not. On a GPU without graphs each costs some microseconds of the host,
and with graphs those outside products and attention each read and write what the one before has written.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_models import WORKS, Work, build
from machine import RESULTS
from timing import save
from torch.utils._python_dispatch import TorchDispatchMode

from remax_lightning.models.forward import prompt_index_per_row
from remax_lightning.models.sampling import next_tokens
from remax_lightning.rollout import GenerationRequest, fused_layers
from remax_lightning.rollout.decode_loop import DecodeLoop
from remax_lightning.rollout.row_lengths import RowLengths
from remax_lightning.tools.plan.activation_memory import shapes_only

PRODUCTS = {"addmm", "baddbmm", "bmm", "linear", "mm"}
ATTENTION = "varlen_attn"
NO_KERNEL = {"_unsafe_view", "detach", "device", "empty", "empty_like"}


class Operators(TorchDispatchMode):
    """Counts the operators that launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in NO_KERNEL:
            name = func.overloadpacket.__name__
            self.counts["rms_norm" if name == "sgn" else name] += 1
        return func(*args, **(kwargs or {}))


def main(arguments: list[str] | None = None) -> None:
    """Count the operators of every shape that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [name for name in WORKS if name != "toy"]
    parser.add_argument("--shape", nargs="+", choices=list(WORKS), default=shapes)
    parser.add_argument("--results", type=Path, default=RESULTS / "operators.jsonl", help="default: %(default)s")
    options = parser.parse_args(arguments)
    for name in options.shape:
        with shapes_only(torch.bfloat16), torch.no_grad():
            forward, drawing = count(WORKS[name])
        total = forward + drawing
        products = sum(number for operator, number in total.items() if operator in PRODUCTS)
        attention = sum(number for operator, number in total.items() if ATTENTION in operator)
        line = {
            "benchmark": "operators",
            "size": name,
            "device": "none",
            "dtype": "bfloat16",
            "operators": total.total(),
        }
        line |= {"products": products, "attention": attention, "others": total.total() - products - attention}
        line |= {"of_drawing": drawing.total(), "most": dict(total.most_common(12))}
        save(options.results, [line])


def count(work: Work) -> tuple[Counter[str], Counter[str]]:
    """Return the operators of a decoding step, of the model's pass and of choosing the next token.

    Call it inside `shapes_only`.
    """
    model = build(work, torch.device("cpu"))
    ids = torch.zeros(work.prompts, work.prompt, dtype=torch.long)
    mask = torch.ones_like(ids, dtype=torch.bool)
    request = GenerationRequest(ids, mask, work.sampling, [], 0, torch.Generator())
    rows = prompt_index_per_row(ids, work.sampling.num_samples, greedy=True)
    # ---- As `PairedEngine` decodes on CUDA. Tensors without memory are no plain parameters ----
    norms = mock.patch.object(
        fused_layers, "_rms_norm_epsilon", lambda module: 1e-6 if type(module).__name__.endswith("RMSNorm") else None
    )
    kernel = mock.patch.object(torch.nn.functional, "rms_norm", _one_kernel)
    with norms, kernel, fused_layers.fused_norms(model, _AllFusible()), fused_layers.fused_rotary(model, _AllFusible()):
        return _count_step(model, request, rows)


class _AllFusible(dict[Hashable, bool]):
    """Takes every norm for one that torch's kernel computes: there are no numbers to compare."""

    def __contains__(self, _: object) -> bool:
        return True

    def __missing__(self, _: Hashable) -> bool:
        return True


def _one_kernel(inputs: torch.Tensor, *_: Any) -> torch.Tensor:
    """Stand in for the norm that CUDA has a kernel for, and the CPU eight operators."""
    return torch.sgn(inputs)  # which no family uses


def _count_step(model: Any, request: GenerationRequest, rows: torch.Tensor) -> tuple[Counter[str], Counter[str]]:
    loop = DecodeLoop(model, request, rows, None, RowLengths.create)
    tokens = next_tokens(loop.logits, request.num_sampled, request.sampling, request.generator)
    loop.decode_step(0, tokens)  # makes what is made once for each shape
    with Operators() as forward:
        loop.decode_step(1, tokens)
    with Operators() as drawing:
        next_tokens(loop.logits, request.num_sampled, request.sampling, request.generator)
    return forward.counts, drawing.counts


if __name__ == "__main__":
    main()
