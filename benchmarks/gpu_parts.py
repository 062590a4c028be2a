"""The parts of benchmarks/gpu.py: each returns the figures of one line."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_models import TOP_P, Work, build, padded_prompts, planned, save_weights, training_parts
from lightning.pytorch import Callback, Trainer
from timing import seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from remax_lightning.callbacks import Throughput
from remax_lightning.models.loading import enable_gradient_checkpointing
from remax_lightning.rollout import GenerationRequest, PairedEngine

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
LENGTHS = (320, 448, 512)
"""Tokens of padded rows: modulo 128 the first two are 64, where cuDNN's backward pass has returned NaN."""
REPETITIONS = 5
HEADROOM = 0.9
"""Share of a device's memory that the plan of a step may take to be tried."""


class Budget:
    """The time until `deadline`, of `time.monotonic`."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.monotonic()


def repeated(run: Callable[[], Any], device: torch.device, budget: Budget | None = None) -> tuple[float, int]:
    """Return the median of the seconds of some runs, after one that warms up, and how many they are.

    Where no other fits, 0 runs and the seconds of the one that warms up.
    """
    warm = seconds(run, device)[0]
    values: list[float] = []
    while len(values) < REPETITIONS and (budget is None or budget.left() > max([warm, *values[-1:]])):
        values.append(seconds(run, device)[0])
    return statistics.median(values or [warm]), len(values)


def device_limits(device: torch.device) -> dict[str, float]:
    """Measure what the device copies (read and written bytes) and multiplies in bfloat16."""
    big = device.type == "cuda"
    source = torch.empty(2**31 if big else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy, _ = repeated(lambda: target.copy_(source), device)
    size = 8192 if big else 64
    left = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    product, _ = repeated(lambda: left @ left, device)
    return {"copy_gb_per_s": 2 * source.numel() / copy / 1e9, "matmul_tflops": 2 * size**3 / product / 1e12}


# ---- Attention ----


def attention_kernels(kernel: str, device: torch.device) -> dict[str, Any]:
    """Train two layers of a Llama on padded rows with one kernel: seconds, and gradients that are not finite."""
    big = device.type == "cuda"
    shape = {"hidden_size": 2048 if big else 64, "intermediate_size": 4096 if big else 64, "vocab_size": 1024}
    work = Work("llama", shape | {"num_hidden_layers": 2, "num_attention_heads": 16 if big else 2})
    model, figures = build(work, device).train(), {}
    for length in LENGTHS:
        rows = work._replace(prompt=length, prompts=8 if big else 2)
        ids, mask = padded_prompts(rows, device)

        def once(ids: Tensor = ids, mask: Tensor = mask) -> None:
            model.zero_grad(set_to_none=True)
            with sdpa_kernel(KERNELS[kernel]):
                labels = ids.masked_fill(~mask, -100)
                model(ids, attention_mask=mask.long(), labels=labels, use_cache=False).loss.backward()

        figures[f"first_s_{length}"] = seconds(once, device)[0]  # plans for a shape that is new
        figures[f"seconds_{length}"], _ = repeated(once, device)
        bad = sum(int((~weight.grad.isfinite()).any()) for weight in model.parameters() if weight.grad is not None)
        figures[f"nonfinite_gradients_{length}"] = bad
    return figures


# ---- Decoding ----


def decode_figures(model: Any, work: Work, graphs: bool, budget: Budget, limits: dict[str, float]) -> dict[str, Any]:
    """Measure a decoded token, as half of the difference of a rollout of all tokens and of one of half of them.

    No response ends, so that both have as many tokens as they may. The model is as it is trained: with gradient
    checkpointing, whose hooks must not keep graphs off.
    """
    enable_gradient_checkpointing(model)
    engine, device = PairedEngine(cuda_graphs=graphs), model.device
    runs = [_rollout(engine, model, work, length, []) for length in (work.response, work.response // 2)]
    share = Budget(time.monotonic() + budget.left() / 2)  # so that the second rollout is repeated, too
    (whole, repetitions), (half, fewest) = repeated(runs[0], device, share), repeated(runs[1], device, budget)
    taken = (whole - half) / (work.response - work.response // 2)
    repetitions = min(repetitions, fewest)
    figures = {"decode_ms_per_token": 1e3 * taken, "graphs": engine.num_graphs, "repetitions": repetitions}
    if limits:
        bound = decode_bytes(model, work) / (limits["copy_gb_per_s"] * 1e9)
        figures |= {"bound_ms": 1e3 * bound, "over_bound": taken / bound}
    return figures


def decode_bytes(model: Any, work: Work) -> float:
    """Return the bytes that a decoding step has to read, as a mean over the second half of the response.

    All weights but the embedding table, of which it reads a few rows (unless it is the output embedding too), and the
    keys and values of all rows.
    """
    config = model.config
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = heads * config.hidden_size // config.num_attention_heads  # of the keys, and of the values, of a layer
    length = work.prompt + 0.75 * work.response
    return weights + 2 * work.prompts * length * 2 * config.num_hidden_layers * width * 2


def rollout_figures(model: Any, work: Work, way: str, budget: Budget) -> dict[str, Any]:
    """Measure rollouts whose responses end after geometric lengths: ours, or two `generate` calls."""
    if way == "two generate calls":
        run = _two_calls(model, work)
    else:
        run = _rollout(PairedEngine(), model, work, work.response, work.eos_ids, greedy=way == "ours")
    _reset_peak(model.device)
    made: list[Tensor] = []
    middle, repetitions = repeated(lambda: made.append(run()), model.device, budget)
    ids = made[-1]
    tokens = _count(ids, work)
    return {
        "seconds": middle,
        "tokens": tokens,
        "tokens_per_s": tokens / middle,
        "mean_length": tokens / len(ids),
        "peak_gb": _peak(model.device),
        "repetitions": repetitions,
    }


def _count(ids: Tensor, work: Work) -> int:
    """Return the tokens of `[M, R]` responses up to their ends."""
    ends = torch.isin(ids, torch.tensor(work.eos_ids, device=ids.device)).int()
    return int((ends.cumsum(-1) - ends == 0).sum())  # no end before the token


def _rollout(
    engine: PairedEngine, model: Any, work: Work, length: int, eos_ids: list[int], *, greedy: bool = True
) -> Callable[[], Tensor]:
    ids, mask = padded_prompts(work, model.device)
    sampling = type(work.sampling)(max_response_length=length, top_p=TOP_P)

    def run() -> Tensor:
        generator = torch.Generator(ids.device).manual_seed(0)
        made = engine.generate(model, GenerationRequest(ids, mask, sampling, eos_ids, 0, generator, greedy))
        return made.sampled_ids if made.greedy_ids is None else torch.cat([made.sampled_ids, made.greedy_ids])

    return run


def _two_calls(model: Any, work: Work) -> Callable[[], Tensor]:
    ids, mask = padded_prompts(work, model.device)
    common: dict[str, Any] = {"attention_mask": mask.long(), "max_new_tokens": work.response, "pad_token_id": 0}

    def run() -> Tensor:
        torch.manual_seed(0)  # as many tokens each time
        parts = [
            model.generate(ids, eos_token_id=work.eos_ids, **common, **options)[:, work.prompt :]
            for options in ({"do_sample": True, "top_k": 0, "top_p": TOP_P}, {"do_sample": False})
        ]
        missing = [work.response - part.shape[1] for part in parts]
        return torch.cat([torch.nn.functional.pad(p, (0, m), value=1) for p, m in zip(parts, missing, strict=True)])

    return run


def vllm(work: Work, folder: Path, budget: Budget) -> dict[str, Any]:
    """Let vLLM generate twice, in a process of its own, on a model of the same shape with weights of its own."""
    if find_spec("vllm") is None:
        return {"skipped": "vllm is not installed"}
    model = build(work, torch.device("meta"))
    model.config.save_pretrained(folder)
    ids, mask = padded_prompts(work, torch.device("cpu"))
    request = {
        "prompts": [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)],
        "response": work.response,
        "eos_ids": work.eos_ids,
        "top_p": TOP_P,
        "length": work.prompt + work.response,
    }
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, str(Path(__file__).with_name("vllm_peer.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(1.0, budget.left()))
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


# ---- Training steps ----


class _Steps(Callback):
    """Keeps what a run logs of each step, and ends it when no further step fits."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.logged = budget, []
        self.tokens: list[tuple[int, int]] = []  # real tokens of sampled and of greedy sequences, with their prompts

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rollout, read = outputs["rollout"], int(outputs["rollout"].prompt.prompt_mask.sum())
        sampled, greedy = (read + int(part.response_mask.sum()) for part in (rollout.sampled, rollout.greedy))
        self.tokens.append((sampled, greedy))
        if outputs["closes_step"]:
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            trainer.should_stop = self.budget.left() < self.logged[-1]["time/step_s"]


def step_figures(
    work: Work, folder: Path, device: torch.device, budget: Budget, limits: dict[str, float]
) -> dict[str, Any]:
    """Measure whole training steps with reference and reward model, in bf16-mixed, and hold them against the plan."""
    module, loader = training_parts(work, folder)
    figures = planned(work, module)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        if figures["planned_peak_gb"] > HEADROOM * memory:
            return figures | {"skipped": f"the plan does not fit into {memory:.0f} GB"}
    save_weights(work, folder, device)
    steps, splits = _Steps(budget), work.prompts // work.micro_batch
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, precision="bf16-mixed", max_epochs=1,
        max_steps=REPETITIONS + 1, accumulate_grad_batches=splits, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        use_distributed_sampler=False, log_every_n_steps=1, default_root_dir=folder, callbacks=[Throughput(), steps],
    )  # fmt: skip
    _reset_peak(device)
    trainer.fit(module, loader)
    # ---- The first step captures graphs and makes the optimizer's state ----
    counted = steps.logged[1:] or steps.logged
    names = ("rollout_s", "reward_s", "train_s", "step_s")
    middle = {name: statistics.median(step[f"time/{name}"] for step in counted) for name in names}
    sampled, greedy = (sum(part) / len(steps.logged) for part in zip(*steps.tokens, strict=True))
    figures |= middle | {"repetitions": len(steps.logged) - 1, "peak_gb": _peak(device)}
    figures |= {"tokens": sampled + greedy, "tokens_per_s": (sampled + greedy) / middle["step_s"]}
    return figures | _share_of_peak(module.policy, sampled, greedy, middle, limits)


def _share_of_peak(
    policy: Any, sampled: float, greedy: float, taken: dict[str, float], limits: dict[str, float]
) -> dict[str, float]:
    """Return the share of the measured products per second that the work of real tokens takes (MFU).

    Two operations per weight and token of a forward pass, twice as many more of a backward pass; attention, and what is
    recomputed, do not count. Rollout: both halves. Scoring: the reward model of both, and the reference of the sampled
    ones, as large as the policy. Training: sampled ones, forward and backward.
    """
    if not limits:
        return {}
    table = policy.get_input_embeddings().weight.numel() if not policy.config.tie_word_embeddings else 0
    pass_of_a_token = 2 * (sum(parameter.numel() for parameter in policy.parameters()) - table)
    training, both = 3 * sampled * pass_of_a_token, (sampled + greedy) * pass_of_a_token
    whole = training + 2 * both + sampled * pass_of_a_token
    peak = limits["matmul_tflops"] * 1e12
    return {"training_mfu": training / taken["train_s"] / peak, "step_mfu": whole / taken["step_s"] / peak}


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float:
    """Return the most memory held since the last reset in GB, weights included; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
