"""Memory and time of log-probs and their gradient at a large vocabulary, all logits at once against a few at a time.

`python benchmarks/log_probs_memory.py`; each way runs in a process of its own, and one JSON line for each goes to
results/log_probs_memory.jsonl. Peak memory is what the pass adds to hidden states and weight, in MiB: in all, and
beside the gradients that it is there to make.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import RESULTS, description, resident

from remax_lightning.functional import OutputHead, hidden_statistics, token_statistics

WAYS = ("plain", "chunked", "plain_kl", "chunked_kl")
"""`kl`: with the KL to a reference over the vocabulary and its gradient."""
MIB = 2**20


class Pass:
    """Forward and backward of one way over the same numbers; gradients reach hidden states and weight."""

    def __init__(self, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        self.way, self.device = options.way, torch.device(options.device)
        dtype = getattr(torch, options.dtype)
        shapes = [(options.tokens, options.hidden), (options.vocabulary, options.hidden)]
        shapes += shapes if options.way.endswith("kl") else []
        made = [torch.randn(shape, generator=generator).to(self.device, dtype) for shape in shapes]
        self.hidden, self.weight, self.reference = made[0], made[1].div_(options.hidden**0.5), made[2:]
        self.ids = torch.randint(options.vocabulary, (options.tokens,), generator=generator).to(self.device)

    def run(self) -> list[torch.Tensor]:
        """Return the gradients."""
        leaves = [tensor.detach().requires_grad_() for tensor in (self.hidden, self.weight)]
        if self.way == "plain":
            log_probs = token_statistics(F.linear(*leaves)[None], self.ids[None]).log_probs
        elif self.way == "chunked":
            log_probs = hidden_statistics(leaves[0], OutputHead(leaves[1]), self.ids).log_probs
        elif self.way == "plain_kl":
            own, other = (F.linear(*pair).float().log_softmax(-1) for pair in (leaves, self.reference))
            log_probs = own.gather(-1, self.ids[:, None]).sum(-1) + (own.exp() * (own - other)).sum(-1)
        else:
            reference = self.reference[0], OutputHead(self.reference[1])
            statistics = hidden_statistics(leaves[0], OutputHead(leaves[1]), self.ids, reference=reference)
            log_probs = statistics.log_probs + statistics.kl
        return list(torch.autograd.grad(log_probs.sum(), leaves))

    def peak(self) -> float:
        """Return how many MiB a pass adds at its peak."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.run()
            return (torch.cuda.max_memory_allocated() - before) / MIB
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is in use now
        before = resident("VmRSS")
        self.run()
        return (resident("VmHWM") - before) / MIB

    def seconds(self) -> float:
        """Return how long a pass takes."""
        start = time.perf_counter()
        self.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(options: argparse.Namespace) -> None:
    """Print the figures of one way as JSON."""
    one = Pass(options)
    peak = one.peak()  # first: nothing of an earlier pass is there for it to use again
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in one.run()) / MIB
    seconds = statistics.median(one.seconds() for _ in range(options.repeats))
    figures = {"peak_mib": peak, "gradients_mib": gradients, "beside_gradients_mib": peak - gradients}
    print(json.dumps({name: round(value, 1) for name, value in figures.items()} | {"seconds": round(seconds, 3)}))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each way in a process of its own and write a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="passes whose median time counts (default: 5)")
    parser.add_argument("--results", type=Path, default=RESULTS / "log_probs_memory.jsonl", help="default: %(default)s")
    parser.add_argument("--way", choices=WAYS, help="measure this one only, in this process, and print it")
    options = parser.parse_args(arguments)
    if options.way:
        measure(options)
        return
    sizes = {name: getattr(options, name) for name in ("tokens", "vocabulary", "hidden", "dtype", "device", "repeats")}
    given = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    lines, plain = [], {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, *given]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        plain = figures if way.startswith("plain") else plain
        names = ("peak_mib", "beside_gradients_mib", "seconds")
        shares = {f"{name}_of_plain": round(figures[name] / plain[name], 3) for name in names}
        line = {"benchmark": "log_probs_memory", "way": way, **sizes, **figures, **shares, **description()}
        lines.append(json.dumps(line))
        print(lines[-1], flush=True)
    options.results.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
