"""Rollouts by a vLLM server beside the own engine: `python benchmarks/vllm_rollout.py`; writes results/vllm.jsonl.

It takes the real model of 135 M parameters of `tests/real`, in float32 on a CPU, and starts the server with the command
of `remax serve` (`make vllm`). The parts:

- `fixed`, `uneven`: a rollout of 32 prompts of 48 tokens with a sampled and a greedy response each, of 64 tokens, or of
  as many as there are to the first token that ends a sentence, a clause or a line; by the server, by the own engine and
  by two `generate` calls, in turn. Trainer and server take turns, so each has all cores.
- `updates`: seconds and bytes of an update with all weights and with an adapter alone.
- `steps`: whole optimizer steps; what the proof of every tenth rollout and the correction cost of them.
- `ahead`: whole steps with and without a rollout ahead, smaller ones, where server and trainer have a core each.

It is not called `vllm.py`, or vllm_peer.py beside it would import it in place of vLLM.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from machine import RESULTS
from timing import interleaved, medians, save

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the real model is fetched there

from remax_lightning.config import LossConfig, MismatchConfig
from remax_lightning.data import PromptDataModule
from remax_lightning.files import DEFAULT_PYTHON
from remax_lightning.models import ModelConfig
from remax_lightning.modules import ReMaxModule
from remax_lightning.rollout import GenerationRequest, PairedEngine, ProofConfig, SamplingConfig, VLLMEngine
from remax_lightning.tools.serve import serve_command
from remax_lightning.training.objective import Objective

PROMPTS, PROMPT_LENGTH = 32, 48
ENDS = [0, 2, 28, 30, 198]
"""The ends of a text, comma, full stop and line break, by SmolLM2's tokenizer."""
PARTS = ("fixed", "uneven", "updates", "steps", "ahead")
COMMON = {"benchmark": "vllm", "size": "smollm2-135m", "device": "cpu", "dtype": "float32"}


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--python", default=DEFAULT_PYTHON, help="of the environment with vLLM")
    parser.add_argument("--policy", type=Path, default=None, help="a folder; the real model by default")
    parser.add_argument("--length", type=int, default=64, help="tokens of a response, at most")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS / "vllm.jsonl")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if options.policy is None:
        from real.fetch import fetch

        options.policy = fetch("smollm2")
    # ---- Parts that share a server ----
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if set(options.parts) & {"fixed", "uneven", "updates", "steps"}:
            with serving(folder / "weights", options, lora=False) as url:
                measure_weights(url, folder / "weights", options)
        if "updates" in options.parts:
            with serving(folder / "adapter", options, lora=True) as url:
                save(options.results, [update(url, folder / "adapter", options, lora=True)])
        if "ahead" in options.parts:
            save(options.results, ahead(folder, options))


@contextmanager
def serving(folder: Path, options: argparse.Namespace, *, lora: bool, core: int | None = None) -> Iterator[str]:
    """Run a server in a process group of its own, with the command of `remax serve`; yields its URL."""
    folder.mkdir()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    model = {
        "policy": {"path": str(options.policy), "dtype": "float32"} | ({"lora": {"r": 16}} if lora else {}),
        "kl_coef": 0.0,
        "reward": "remax_lightning.rewards.exact_match",
        "rollout": {"class_path": "VLLMEngine", "init_args": {"urls": [url]}},
        "sampling": {"max_response_length": options.length},
    }
    (folder / "rows.jsonl").write_text('{"prompt": "Hello"}\n')
    data = {"path": str(folder / "rows.jsonl"), "max_prompt_length": PROMPT_LENGTH + 16}
    config = {"model": model, "data": data, "trainer": {"accelerator": "cpu"}}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    command = serve_command(["--config", str(folder / "serve.yaml")], options.python, None, None, ["--enforce-eager"])
    environment = {**os.environ, **command.environment, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment["REMAX_VLLM_PARENT"] = str(os.getpid())  # it ends with this process, however that ends
    if core is not None:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command.arguments, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measure_weights(url: str, folder: Path, options: argparse.Namespace) -> None:
    """Measure the parts that a server with all weights serves, and write each down when it is there."""
    for lengths in ("fixed", "uneven"):
        if lengths in options.parts:
            save(options.results, rollouts(url, folder, options, lengths))
    if "updates" in options.parts:
        save(options.results, [update(url, folder, options, lora=False)])
    if "steps" in options.parts:
        save(options.results, steps(url, folder, options))


def engine(url: str, folder: Path, **proof: Any) -> VLLMEngine:
    """Return an engine that proves its first rollout, and then as `proof` says."""
    config = ProofConfig(**({"every": 10**6} | proof))
    return VLLMEngine([url], transfer_dir=str(folder / "files"), restart_timeout=300.0, proof=config)


def common(server: VLLMEngine, options: argparse.Namespace) -> dict[str, Any]:
    """Return what all lines have, and what the server is: its packages are not those of this process."""
    return {**COMMON, "server": f"vllm {server.servers[0].version()}", "repetitions": options.repetitions}


def load(options: argparse.Namespace, *, lora: bool = False) -> Any:
    """Return the policy."""
    return ModelConfig(str(options.policy), dtype="float32", lora=_adapter() if lora else None).load("policy").eval()


def _adapter() -> Any:
    from remax_lightning.models import LoRAConfig

    return LoRAConfig(r=16, alpha=32)


# ---- Rollouts ----


def rollouts(url: str, folder: Path, options: argparse.Namespace, lengths: str) -> list[dict[str, Any]]:
    """Return a line for each way of writing the responses."""
    model, server = load(options), engine(url, folder)
    server.generate(model, request(2, 0, lengths))  # starts and proves
    ways: dict[str, Callable[[GenerationRequest], Any]] = {
        "vllm": lambda asked: server.generate(model, asked),
        "ours": lambda asked: PairedEngine().generate(model, asked),
        "two generate calls": lambda asked: two_calls(model, asked),
    }
    counted: dict[str, int] = {}

    def timed(name: str, turn: int) -> dict[str, float]:
        asked = request(options.length if turn >= 0 else 2, turn + 1, lengths)  # a short one warms up
        with torch.no_grad():
            start = time.perf_counter()
            output = ways[name](asked)
            taken = time.perf_counter() - start
        if output is not None and turn >= 0:
            counted[name] = sum(written(ids, asked) for ids in (output.sampled_ids, output.greedy_ids))
        return {"seconds": taken}

    figures = interleaved({name: partial(timed, name) for name in ways}, options.repetitions, 1)
    lines = [
        {**common(server, options), "variant": name, "lengths": lengths, **medians(taken), "tokens": counted.get(name)}
        for name, taken in figures.items()
    ]
    for line in lines:
        line["ratio"] = line["seconds"] / lines[-1]["seconds"]
    return lines


def request(length: int, seed: int, lengths: str) -> GenerationRequest:
    """Return what an engine is asked for: the same prompts for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 40000, (PROMPTS, PROMPT_LENGTH), generator=generator)
    sampling = SamplingConfig(max_response_length=length)
    ends = ENDS if lengths == "uneven" else []
    return GenerationRequest(ids, torch.ones_like(ids, dtype=torch.bool), sampling, ends, 2, generator)


def written(ids: torch.Tensor, asked: GenerationRequest) -> int:
    """Return the tokens of responses up to their ends."""
    is_end = torch.isin(ids, torch.tensor(asked.eos_ids, dtype=torch.long))
    return int(((is_end.cumsum(1) - is_end.long()) == 0).sum())


def two_calls(model: Any, asked: GenerationRequest) -> None:
    """Sample, then decode greedily, as the paper's code does."""
    for sample in (True, False):
        model.generate(
            asked.prompt_ids,
            attention_mask=asked.prompt_mask.long(),
            do_sample=sample,
            top_k=0,
            max_new_tokens=asked.sampling.max_response_length,
            eos_token_id=asked.eos_ids or None,
            pad_token_id=asked.pad_id,
        )


# ---- Updates ----


def update(url: str, folder: Path, options: argparse.Namespace, *, lora: bool) -> dict[str, Any]:
    """Return the line of an update: what is trained changes a little, as by an optimizer, and is sent."""
    model, server = load(options, lora=lora), engine(url, folder)
    figures: list[dict[str, float]] = []
    for turn in range(options.repetitions + 1):
        generator = torch.Generator().manual_seed(turn)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1e-5 * torch.randn(parameter.shape, generator=generator))
            server.generate(model, request(1, turn, "fixed"))
        figures.append(server.metrics())
    names = {"seconds": "time/weight_sync_s", "bytes": "rollout/weight_sync_bytes"}
    values = {name: statistics.median(line[key] for line in figures[1:]) for name, key in names.items()}
    what = "adapter" if lora else "all weights"
    return {
        **common(server, options),
        "phase": "update",
        "variant": what,
        **values,
    }


# ---- Whole steps ----


class Steps(Callback):
    """Keeps the seconds of each step, and the figures that were logged."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._start)
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def train(
    folder: Path, options: argparse.Namespace, rollout: VLLMEngine, count: int, prompts: int, length: int
) -> Steps:
    """Take `count` optimizer steps with responses of `length` tokens."""
    recorder = Steps()
    module = ReMaxModule(
        ModelConfig(str(options.policy), dtype="float32"),
        _length_reward,
        rollout=rollout,
        kl_coef=0.0,
        sampling=SamplingConfig(max_response_length=length),
        loss=LossConfig(mismatch=MismatchConfig("tis")),
        optimizer=partial(torch.optim.AdamW, lr=1e-6),
        check_on_policy=False,
        stall_timeout=None,
    )
    rows = [{"prompt": f"Write a few words about the number {number}, and why it is one."} for number in range(64)]
    data = PromptDataModule(
        data=rows, tokenizer=str(options.policy), batch_size=prompts, max_prompt_length=64, val_size=0
    )
    trainer = Trainer(
        accelerator="cpu", max_steps=count, max_epochs=count, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, default_root_dir=folder,
        callbacks=[recorder],
    )  # fmt: skip
    trainer.fit(module, data)
    return recorder


def _length_reward(completions: list[str], **_: Any) -> list[float]:
    return [len(set(response)) / 32 for response in completions]


def steps(url: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the line of whole steps, with the seconds of proof and correction in them."""
    corrected, rollout = [0.0], engine(url, folder, every=1)
    with _timed(Objective, ("mismatch", "mismatch_values"), corrected):
        recorder = train(folder, options, rollout, options.repetitions + 1, PROMPTS, options.length)
    whole = statistics.median(recorder.seconds[1:])
    proof = statistics.median(logged["time/proof_s"] for logged in recorder.logged[1:])
    sync = statistics.median(logged["time/weight_sync_s"] for logged in recorder.logged[1:])
    correction = corrected[0] / len(recorder.seconds)
    step = whole - proof  # every step was proven here, and every tenth is by default
    line = {**common(rollout, options), "phase": "step", "variant": "vllm", "seconds": step}
    line |= {"weight_sync": sync, "proof": proof, "correction": correction}
    return [line | {"overhead": (proof / ProofConfig().every + correction) / step}]


@contextmanager
def _timed(kind: Any, names: tuple[str, ...], total: list[float]) -> Iterator[None]:
    """Add the seconds of some methods to `total[0]`; of one that calls another, once."""
    originals = {name: getattr(kind, name) for name in names}
    depth = [0]

    def timed(original: Callable[..., Any], *arguments: Any) -> Any:
        depth[0] += 1
        start = time.perf_counter()
        try:
            return original(*arguments)
        finally:
            depth[0] -= 1
            total[0] += 0.0 if depth[0] else time.perf_counter() - start

    for name, original in originals.items():
        setattr(kind, name, lambda *arguments, original=original: timed(original, *arguments))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(kind, name, original)


def ahead(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a line of steps with a rollout ahead, and one without, server and trainer on a core each."""
    prompts, length, lines = 8, min(32, options.length), []
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    first, *_, last = sorted(cores)
    with serving(folder / "ahead", options, lora=False, core=first) as url:
        os.sched_setaffinity(0, {last})
        torch.set_num_threads(1)
        try:
            for count in (0, 1):
                rollout = engine(url, folder / f"files{count}")
                rollout.ahead = count
                recorder = train(folder, options, rollout, options.repetitions + 3, prompts, length)
                taken = recorder.seconds[2:-1]  # the first ones are proven, and the last one asks for nothing
                line = {
                    **common(rollout, options),
                    "phase": "ahead",
                    "variant": f"ahead {count}",
                }
                lines.append(line | {"seconds": statistics.median(taken)})
        finally:
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(threads)
    lines[1]["ratio"] = lines[1]["seconds"] / lines[0]["seconds"]
    return lines


if __name__ == "__main__":
    main()
