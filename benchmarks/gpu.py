"""How near a GPU's limits a step comes: `python benchmarks/gpu.py`; writes results/gpu.jsonl.

Needs torch, transformers and lightning, and nothing else: no other package, no installation of this one, no network.
Models have published shapes and random weights in bfloat16, prompts are padded, responses end after geometric lengths,
sampling has top_p 0.9. Every result is written as soon as it is there; what fails is written with its error, what no
longer fits into `--seconds`, warm-ups included, as skipped. The parts, once for the device and then for every shape:

- `limits`: bytes copied and operations multiplied per second, which the rest is held against;
- `attention`: each kernel of torch over padded rows, at lengths where cuDNN has returned NaN gradients
  (pytorch#196678), with the cost of a new shape;
- `decode`: milliseconds per token with and without CUDA graphs, of a model with gradient checkpointing, against the
  time to read weights, keys and values;
- `rollout`: with and without its greedy half, and two `generate` calls, the paper's way; vLLM's two where installed;
- `step`: whole training steps with reference and reward model: seconds by phase, the share of the device's operations
  that real tokens take (MFU), peak memory against `remax plan`, and what PPO would need more.

Without CUDA it says so and does nothing; `--shape toy --device cpu` runs all of it on a small model, as a test.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # the package need not be installed

import torch
from gpu_models import WORKS, Work, build
from gpu_parts import Budget, attention_kernels, decode_figures, device_limits, rollout_figures, step_figures, vllm
from machine import RESULTS
from timing import device_name, save

from remax_lightning.models.forward import choose_attention_kernels

Part = Callable[[], dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    """Measure the device, then every shape that was asked for."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(WORKS), default=["opt-1.3b", "qwen2.5-1.5b", "llama-2-7b"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything together")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.jsonl", help="default: %(default)s")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu benchmark: there is no CUDA device here, so nothing is measured", flush=True)
        return
    record = Recorder(options.results, device)
    whole = Budget(start + options.seconds)
    limits: dict[str, float] = {}
    record.part("device", "limits", "", whole, partial(_measure_limits, device, limits))
    for kernel in ("cudnn", "efficient", "flash", "math"):
        record.part("device", "attention", kernel, whole, partial(attention_kernels, kernel, device))
    choose_attention_kernels(device, cudnn=False)  # as a run does; cuDNN would plan every length of `generate`
    for i, name in enumerate(options.shape):
        # What a shape leaves over is for the next ones.
        share = share_of(whole, 1 / (len(options.shape) - i))
        measure_shape(name, WORKS[name], device, share, limits, record)
        release(device)


def _measure_limits(device: torch.device, limits: dict[str, float]) -> dict[str, float]:
    """Measure the limits and put them into `limits`, for the parts that follow."""
    limits.update(device_limits(device))
    return dict(limits)


def measure_shape(
    name: str, work: Work, device: torch.device, budget: Budget, limits: dict[str, float], record: Recorder
) -> None:
    """Measure the parts of one shape."""
    if budget.left() <= 0:
        record.line(name, "all", "", {"skipped": "no time left"})
        return
    _measure_generation(name, work, device, share_of(budget, 3 / 4), limits, record)  # the step has the rest
    release(device)
    # ---- In processes and folders of their own ----
    with tempfile.TemporaryDirectory() as folder:
        record.part(name, "rollout", "vllm", budget, partial(vllm, work, Path(folder), budget))
    with tempfile.TemporaryDirectory() as folder:
        record.part(name, "step", "", budget, partial(step_figures, work, Path(folder), device, budget, limits))


def _measure_generation(
    name: str, work: Work, device: torch.device, budget: Budget, limits: dict[str, float], record: Recorder
) -> None:
    """Measure decoding and rollouts on one model, which is freed at the end."""
    try:
        model = build(work, device)
    except Exception as error:  # a device that is too small for the model; its step, and other shapes, go on
        record.line(name, "generation", "", {"error": described(error)})
        return
    ways = "ours", "sampled only", "two generate calls"
    # What a part leaves over is for the next ones.
    for graphs, parts in ((True, 5), (False, 4)):
        variant, share = "graphs" if graphs else "no graphs", share_of(budget, 1 / parts)
        record.part(name, "decode", variant, share, partial(decode_figures, model, work, graphs, share, limits))
    for way, parts in zip(ways, (3, 2, 1), strict=True):
        share = share_of(budget, 1 / parts)
        record.part(name, "rollout", way, share, partial(rollout_figures, model, work, way, share))


def share_of(budget: Budget, share: float) -> Budget:
    """Return a share of the time that is left, counted from now."""
    return Budget(time.monotonic() + share * budget.left())


def described(error: Exception) -> str:
    """Return what an error says in a line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:300]}"


def release(device: torch.device) -> None:
    """Free what a part has left on the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Recorder:
    """Writes every result at once.

    Args:
        path: a file of JSON lines; a result takes the place of an older one of the same part.
        device: that is measured.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device

    def part(self, size: str, phase: str, variant: str, budget: Budget, run: Part) -> None:
        """Run a part and write its figures, its error, or that there was no time for it."""
        if budget.left() <= 0:
            figures: dict[str, Any] = {"skipped": "no time left"}
        else:
            before = time.monotonic()
            try:
                figures = run()
            except Exception as error:  # such as a lack of memory: the other parts go on
                figures = {"error": described(error)}
            figures["part_s"] = time.monotonic() - before
        self.line(size, phase, variant, figures)

    def line(self, size: str, phase: str, variant: str, figures: dict[str, Any]) -> None:
        """Write figures, with what they are of."""
        name = {"benchmark": "gpu", "size": size, "phase": phase, "variant": variant}
        save(self.path, [name | {"device": device_name(self.device), "dtype": "bfloat16"} | figures])


if __name__ == "__main__":
    main()
