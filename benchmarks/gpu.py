"""The hardware's limit and how near we are to it: `python benchmarks/gpu.py`; writes results/gpu.jsonl.

On a CUDA device, for models of the shape of OPT-1.3B and Llama-2-7B with random weights in bfloat16: a rollout of ours
with and without its greedy half, two `generate` calls, and the training pass, against what the device was measured to
copy and to multiply; peaks of memory stand beside what `remax plan` predicts. Lengths are the full ones. Without CUDA
it says so and does nothing. Each shape has a share of `--seconds`; rounds that no longer fit are left out, and
`repetitions` tells how many were made.
`--shape toy --device cpu` runs the same code on a small model: a test, not a figure.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import RESULTS
from predicted import predicted
from timing import device_name, save, seconds
from torch import Tensor

from remax_lightning.tools.plan.activation_memory import shapes_only

REMAX_BYTES, PPO_BYTES = 20, 36
"""Bytes per parameter of states where all models are of one size: bfloat16 weights and gradients with float32 master
weights and two moments make 16 for a model that is trained, 2 for a frozen one. ReMax trains the policy beside two
frozen models, PPO the value model too."""


class StepShape(NamedTuple):
    """A model and the work it is given."""

    family: str
    config: dict[str, int]
    prompt: int = 256
    response: int = 256
    prompts: int = 32
    micro_batch: int = 8


def _llama(width: int, layers: int, inner: int, vocab: int) -> dict[str, int]:
    heads = {"num_attention_heads": width // 128 or 1, "num_hidden_layers": layers}
    return {"hidden_size": width, "intermediate_size": inner, "vocab_size": vocab, **heads}


WORKS = {
    "opt-1.3b": StepShape(
        "opt",
        {
            "hidden_size": 2048,
            "ffn_dim": 8192,
            "word_embed_proj_dim": 2048,
            "vocab_size": 50272,
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
        },
    ),
    "llama-2-7b": StepShape("llama", _llama(4096, 32, 11008, 32000), micro_batch=4),
    "toy": StepShape("llama", _llama(64, 2, 128, 256), prompt=8, response=8, prompts=4, micro_batch=2),
}


def main(arguments: list[str] | None = None) -> None:
    """Measure the device, then every shape that was asked for."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(WORKS), default=["opt-1.3b", "llama-2-7b"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=480.0, help="for all shapes together")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.jsonl")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu benchmark: there is no CUDA device here, so nothing is measured", flush=True)
        return
    limits = device_limits(device)
    print(f"copy {limits['copy_gb_per_s']:.0f} GB/s, matmul {limits['matmul_tflops']:.1f} TFLOP/s", flush=True)
    for i, name in enumerate(options.shape):
        deadline = start + options.seconds * (i + 1) / len(options.shape)
        line = {"benchmark": "gpu", "size": name, "device": device_name(device), "dtype": "bfloat16", **limits}
        save(options.results, [line | measure(WORKS[name], device, options.repetitions, deadline, limits)])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def device_limits(device: torch.device) -> dict[str, float]:
    """Measure what the device copies (read and written bytes) and multiplies in bfloat16."""
    big = device.type == "cuda"
    source = torch.empty(2**31 if big else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), device, 10)
    size = 8192 if big else 64
    left = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    product = _median(lambda: left @ left, device, 10)
    return {"copy_gb_per_s": 2 * source.numel() / copy / 1e9, "matmul_tflops": 2 * size**3 / product / 1e12}


def _median(run: Callable[[], Any], device: torch.device, repetitions: int, warmup: int = 3) -> float:
    for _ in range(warmup):
        run()
    return statistics.median(seconds(run, device)[0] for _ in range(repetitions))


def measure(
    work: StepShape, device: torch.device, repetitions: int, deadline: float, limits: dict[str, float]
) -> dict[str, Any]:
    """Measure rollouts and the training pass of one shape."""
    with shapes_only(torch.bfloat16):
        plain = build(work, torch.device("cpu"))
        expected = predicted(plain, work.prompts, work.prompt, work.response, work.micro_batch)
    model = build(work, device).to(device)
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(10, work.config["vocab_size"], (work.prompts, work.prompt), device=device, generator=generator)
    figures = training(model, work, ids, device, repetitions, limits)
    figures |= rollouts(model, work, ids, device, repetitions, deadline, limits)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    states = {"remax_states_gb": REMAX_BYTES, "ppo_states_gb": PPO_BYTES, "ppo_extra_gb": PPO_BYTES - REMAX_BYTES}
    return figures | expected | {name: size * parameters / 1e9 for name, size in states.items()}


def build(work: StepShape, device: torch.device) -> Any:
    """Return a random model, made on the device itself; no response of it ever ends."""
    from transformers import AutoConfig, AutoModelForCausalLM

    length = max(2048, work.prompt + work.response)
    config = AutoConfig.for_model(work.family, **work.config, max_position_embeddings=length)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    for name in ("dropout", "attention_dropout", "layerdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def rollouts(
    model: Any,
    work: StepShape,
    ids: Tensor,
    device: torch.device,
    repetitions: int,
    deadline: float,
    limits: dict[str, float],
) -> dict[str, Any]:
    """Measure rollouts in turn: ours, ours half as long, ours without the greedy rows, and two `generate` calls."""
    runs: dict[str, Callable[[], Any]] = {
        "ours": _our_rollout(model, work, ids, work.response, greedy=True),
        "half": _our_rollout(model, work, ids, work.response // 2, greedy=True),
        "sampled_only": _our_rollout(model, work, ids, work.response, greedy=False),
        "two_generate_calls": lambda: _two_calls(model, work, ids),
    }
    for name, run in runs.items():
        _reset_peak(device)
        run()
        if name == "ours":
            peak = _peak(device)
    for name in ("ours", "half", "sampled_only"):
        runs[name]()  # once more: graphs may be captured on a second call
    found: dict[str, list[float]] = {name: [] for name in runs}
    longest = 0.0
    for turn in range(repetitions):
        before = time.monotonic()
        if turn and before + longest > deadline:
            break
        for name, run in runs.items():
            found[name].append(seconds(run, device)[0])
        longest = max(longest, time.monotonic() - before)
    middle = {name: statistics.median(values) for name, values in found.items()}
    steps = work.response - work.response // 2
    decode = (middle["ours"] - middle["half"]) / steps
    bound = decode_bytes(model, work) / (limits["copy_gb_per_s"] * 1e9)
    return {
        "rollout_s": middle["ours"],
        "two_generate_calls_s": middle["two_generate_calls"],
        "rollout_ratio": middle["ours"] / middle["two_generate_calls"],
        "greedy_extra": middle["ours"] / middle["sampled_only"] - 1,
        "decode_ms_per_token": 1e3 * decode,
        "decode_bound_ms": 1e3 * bound,
        "decode_over_bound": decode / bound,
        "rollout_peak_gb": peak,
        "repetitions": len(found["ours"]),
    }


def decode_bytes(model: Any, work: StepShape) -> float:
    """Return the bytes that a decoding step has to read, as a mean over the second half of the response.

    All weights but the embedding table, of which it reads a few rows (unless it is the output embedding too), and the
    keys and values of all rows.
    """
    config = model.config
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if not config.tie_word_embeddings:
        table = model.get_input_embeddings().weight
        weights -= table.numel() * table.element_size()
    length = work.prompt + 0.75 * work.response
    return weights + 2 * work.prompts * length * 2 * config.num_hidden_layers * config.hidden_size * 2


def _our_rollout(model: Any, work: StepShape, ids: Tensor, length: int, *, greedy: bool) -> Callable[[], Any]:
    from remax_lightning.rollout import AutoEngine, GenerationRequest, SamplingConfig

    engine, sampling = AutoEngine(), SamplingConfig(max_response_length=length)

    def run() -> Any:
        request = GenerationRequest(
            prompt_ids=ids,
            prompt_mask=torch.ones_like(ids, dtype=torch.bool),
            sampling=sampling,
            eos_ids=[work.config["vocab_size"]],  # a token that does not exist
            pad_id=0,
            generator=torch.Generator(ids.device).manual_seed(0),
            greedy=greedy,
        )
        return engine.generate(model, request)

    return run


def _two_calls(model: Any, work: StepShape, ids: Tensor) -> None:
    for sampled in ({"do_sample": True, "top_k": 0}, {"do_sample": False}):
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=work.response, pad_token_id=0, **sampled)


def training(
    model: Any, work: StepShape, ids: Tensor, device: torch.device, repetitions: int, limits: dict[str, float]
) -> dict[str, float]:
    """Measure the training pass over all prompts, forward and backward, in micro-batches."""
    from remax_lightning.models.log_probs import response_statistics
    from remax_lightning.types import PromptBatch, Responses

    responses = torch.randint(10, work.config["vocab_size"], (work.prompts, work.response), device=device)
    mask = torch.ones_like(responses, dtype=torch.bool)

    def once() -> None:
        for start in range(0, work.prompts, work.micro_batch):
            rows = slice(start, start + work.micro_batch)
            count = len(ids[rows])
            prompt = PromptBatch(ids[rows], torch.ones_like(ids[rows], dtype=torch.bool), [""] * count, [{}] * count)
            written = Responses(responses[rows], mask[rows], ~mask[rows, 0], [""] * count)
            (-response_statistics(model, prompt, written).log_probs.mean()).backward()

    model.train()
    _reset_peak(device)
    taken = _median(once, device, repetitions, warmup=2)
    model.eval()
    model.zero_grad(set_to_none=True)
    rate = training_flops(model, work) / taken / 1e12
    return {
        "training_s": taken,
        "training_tflops": rate,
        "training_of_peak": rate / limits["matmul_tflops"],
        "training_peak_gb": _peak(device),
    }


def training_flops(model: Any, work: StepShape) -> float:
    """Return the training pass's operations: 6 per weight and token, causal attention, logits of responses only."""
    config, length = model.config, work.prompt + work.response
    tables = {id(each.weight): each.weight.numel() for each in (model.get_input_embeddings(), model.lm_head)}
    blocks = sum(parameter.numel() for parameter in model.parameters()) - sum(tables.values())
    attention = 6 * config.num_hidden_layers * config.hidden_size * length**2
    logits = 6 * work.response * config.vocab_size * config.hidden_size
    return float(work.prompts * (6 * blocks * length + attention + logits))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float:
    """Return the most memory held since the last reset in GB, weights included; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


if __name__ == "__main__":
    main()
