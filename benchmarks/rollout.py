"""Rollouts side by side: `python benchmarks/rollout.py`; writes results/rollout.jsonl.

The paper's way is two `generate` calls per batch of prompts, one sampled and one greedy. Beside it stand one call of
twice the rows whose second half is made greedy by a logits processor, the package's two engines, and what TRL's
RLOOTrainer does (two sampled responses per prompt). All run the same weights on the same prompts, with new prompts each
round. `fixed` lengths: no response ends before the limit. `geometric`: responses end by the model's own weights, with
a mean of a quarter of the limit; `shapes.set_ending` says how. `mean_length` tells what they came to.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS
from shapes import EOS, PAD, SHAPES, Shape, llama, prompts, set_ending
from timing import device_name, interleaved, medians, save, seconds, trl_version
from torch import Tensor

BASE = "two_generate_calls"
Run = Callable[[Tensor, int], list[Tensor]]
"""Makes responses to `[B, P]` prompts with a seed and returns their token ids, padded or cut on the right."""


def main(arguments: list[str] | None = None) -> None:
    """Measure every size and kind of lengths that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["tiny", "small"])
    parser.add_argument("--geometric", nargs="*", choices=list(SHAPES), default=["tiny"], help="sizes, with EOS on")
    parser.add_argument("--variants", nargs="+", default=None, help=f"beside {BASE}; all by default")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--geometric-repetitions", type=int, default=31, help="more, since lengths are drawn")
    parser.add_argument("--warmup", type=int, default=3, help="until CUDA graphs are captured")
    parser.add_argument("--geometric-warmup", type=int, default=15, help="more, since there are more shapes of steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "mixed"], default="float32")
    parser.add_argument("--results", type=Path, default=RESULTS / "rollout.jsonl")
    options = parser.parse_args(arguments)
    for size in options.sizes:
        measure(size, "fixed", options.warmup, options.repetitions, options)
    for size in options.geometric:
        measure(size, "geometric", options.geometric_warmup, options.geometric_repetitions, options)


def measure(size: str, lengths: str, warmup: int, repetitions: int, options: argparse.Namespace) -> None:
    """Measure all variants on one size, in turn, and write the lines down."""
    shape, device = SHAPES[size], torch.device(options.device)
    rate = 4 / shape.response if lengths == "geometric" else None
    with tempfile.TemporaryDirectory() as folder:
        dtype = torch.float32 if options.dtype == "mixed" else getattr(torch, options.dtype)
        runs = make_variants(shape, rate, device, dtype, Path(folder))
        names = [BASE, *(name for name in runs if name != BASE and name in (options.variants or runs))]
        rounds = {name: _round(runs[name], shape, device) for name in names}
        # As Lightning opens it in mixed precision.
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "mixed", cache_enabled=False):
            measured = interleaved(rounds, repetitions, warmup)
    base = medians(measured[BASE])["seconds"]
    lines = []
    for name, figures in measured.items():
        middle = medians(figures)
        lines.append(
            {
                "benchmark": "rollout",
                "size": size,
                "lengths": lengths,
                "variant": name,
                "device": device_name(device),
                "dtype": options.dtype,
                "seconds": middle["seconds"],
                "ratio": middle["seconds"] / base,
                "fastest": min(figures["seconds"]),
                "slowest": max(figures["seconds"]),
                "mean_length": sum(figures["length"]) / repetitions,
                "repetitions": repetitions,
            }
        )
    save(options.results, lines)


def _round(run: Run, shape: Shape, device: torch.device) -> Callable[[int], dict[str, float]]:
    def once(turn: int) -> dict[str, float]:
        prompt_ids = prompts(shape, seed=turn + 1000).to(device)
        taken, rows = seconds(lambda: run(prompt_ids, turn + 1000), device)
        return {"seconds": taken, "length": sum(map(_length, rows)) / len(rows)}

    return once


def _length(row: Tensor) -> int:
    """Return the tokens of a response, its end included."""
    ends = (row == EOS).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(row)


def make_variants(
    shape: Shape, rate: float | None, device: torch.device, dtype: torch.dtype, folder: Path
) -> dict[str, Run]:
    """Return every way of making a rollout, by name."""
    from remax_lightning.rollout import AutoEngine, HuggingFaceEngine

    model = _model(shape, rate, device, dtype)
    variants: dict[str, Run] = {
        BASE: lambda ids, seed: _two_calls(model, ids, seed, shape),
        "one_generate_call": lambda ids, seed: _one_call(model, ids, seed, shape),
        "huggingface_engine": _engine(HuggingFaceEngine(), model, shape),
        "ours": _engine(AutoEngine(), model, shape),
    }
    if trl_version() is None:
        from trl_peer import MISSING

        print(MISSING, flush=True)
        return variants
    return variants | {"trl_rloo": _trl(shape, rate, device, dtype, folder)}


def _model(shape: Shape, rate: float | None, device: torch.device, dtype: torch.dtype) -> Any:
    model = llama(shape)
    set_ending(model, rate)
    return model.to(device=device, dtype=dtype)


def _options(shape: Shape) -> dict[str, Any]:
    return {"max_new_tokens": shape.response, "eos_token_id": EOS, "pad_token_id": PAD}


def _two_calls(model: Any, prompt_ids: Tensor, seed: int, shape: Shape) -> list[Tensor]:
    """Sample, then decode greedily, as the paper's code does; without the top-k 50 that transformers would add."""
    torch.manual_seed(seed)
    mask, start = torch.ones_like(prompt_ids), prompt_ids.shape[1]
    sampled = model.generate(prompt_ids, attention_mask=mask, do_sample=True, top_k=0, **_options(shape))
    greedy = model.generate(prompt_ids, attention_mask=mask, do_sample=False, **_options(shape))
    return [*sampled[:, start:], *greedy[:, start:]]


def _one_call(model: Any, prompt_ids: Tensor, seed: int, shape: Shape) -> list[Tensor]:
    """Sample twice the rows; on the second half a logits processor leaves only the most likely token."""
    from transformers import LogitsProcessorList

    torch.manual_seed(seed)
    batch, start = prompt_ids.shape

    def greedy_on_second_half(input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG001 (transformers hands both over)
        greedy = scores[batch:]
        only = torch.full_like(greedy, -torch.inf).scatter_(1, greedy.argmax(-1, keepdim=True), 0.0)
        return torch.cat([scores[:batch], only])

    twice = prompt_ids.repeat(2, 1)
    ids = model.generate(
        twice,
        attention_mask=torch.ones_like(twice),
        do_sample=True,
        top_k=0,
        logits_processor=LogitsProcessorList([greedy_on_second_half]),
        **_options(shape),
    )
    return [*ids[:, start:]]


def _engine(engine: Any, model: Any, shape: Shape) -> Run:
    """Return the rollout by an engine of the package."""
    from remax_lightning.rollout import GenerationRequest, SamplingConfig

    sampling = SamplingConfig(max_response_length=shape.response)

    def run(prompt_ids: Tensor, seed: int) -> list[Tensor]:
        mask, generator = torch.ones_like(prompt_ids, dtype=torch.bool), torch.Generator(prompt_ids.device)
        request = GenerationRequest(prompt_ids, mask, sampling, [EOS], PAD, generator.manual_seed(seed))
        output = engine.generate(model, request)
        return [*output.sampled_ids, *output.greedy_ids]

    return run


def _trl(shape: Shape, rate: float | None, device: torch.device, dtype: torch.dtype, folder: Path) -> Run:
    """Return TRL's own generation; on a copy of the model, because its trainer changes the one it is given."""
    import trl_peer

    trainer = trl_peer.make_trainer(
        _model(shape, rate, device, dtype),
        lambda completions, **_: [0.0] * len(completions),
        shape,
        [{"prompt": "w3"}] * shape.prompts,
        folder,
        kl_coef=0.0,
        bfloat16=dtype == torch.bfloat16,
    )

    def run(prompt_ids: Tensor, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [torch.tensor(row) for row in trl_peer.generate(trainer, prompt_ids)]

    return run


if __name__ == "__main__":
    main()
