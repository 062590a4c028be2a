"""A whole optimizer step side by side: `python benchmarks/step.py`; writes results/step.jsonl.

Ours is `ReMaxModule` in a Lightning `Trainer`, with a reference and a `ClassifierReward` as large as the policy, all
prompts in one training pass (`ours`) or four at a time (`ours_micro_batches`); `papers_way` is the paper's algorithm as
its code takes it; `trl_rloo` is TRL's RLOOTrainer with two sampled responses per prompt instead of a sampled and a
greedy one. No response ends before the limit; all train with AdamW in float32 on the CPU. `rollout` is making the
responses, `scoring` everything between that and the only pass with gradients, `training` that pass and the optimizer.

Memory is taken in a process of its own per variant: the most that a run of two steps held, over what it held when all
models were loaded and the first step began.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from machine import RESULTS
from shapes import SHAPES, Shape, prompt_texts, prompts
from shapes import save as save_models
from timing import interleaved, medians, save, trl_version

BASE, PHASES = "papers_way", ("rollout", "scoring", "training")
Step = Callable[[int], dict[str, float]]
"""Takes one optimizer step and returns its seconds by phase."""
Begin = Callable[[], None]
"""Called when a step begins, its models being loaded."""


def main(arguments: list[str] | None = None) -> None:
    """Measure every size that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["tiny", "small"])
    parser.add_argument("--variants", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS / "step.jsonl")
    parser.add_argument("--memory-of", nargs=2, metavar=("FOLDER", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if options.memory_of:
        print("MEMORY", json.dumps(_memory_here(Path(options.memory_of[0]), options.memory_of[1], options.sizes[0])))
        return
    if "trl_rloo" in options.variants and trl_version() is None:
        from trl_peer import MISSING

        print(MISSING, flush=True)
        options.variants.remove("trl_rloo")
    for size in options.sizes:
        measure(size, options)


def measure(size: str, options: argparse.Namespace) -> None:
    """Measure the variants on one size, in turn, then the memory of each, and write the lines down."""
    shape, names = SHAPES[size], list(dict.fromkeys([BASE, *options.variants]))
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        save_models(folder, shape)
        steps = {name: MAKERS[name](folder, shape, lambda: None) for name in names}
        found = {
            name: medians(figures)
            for name, figures in interleaved(
                {name: _with_total(step) for name, step in steps.items()}, options.repetitions, options.warmup
            ).items()
        }
        del steps
        memory = {name: _memory(folder, name, size) for name in names}
    base = found[BASE]["seconds"]
    lines = []
    for name in names:
        line: dict[str, Any] = {"benchmark": "step", "size": size, "variant": name, "device": "cpu", "dtype": "float32"}
        line |= {"seconds": found[name]["seconds"], "ratio": found[name]["seconds"] / base}
        line |= {phase: found[name][phase] for phase in PHASES}
        line |= {"peak_over_base_gb": memory[name], "memory_ratio": memory[name] / max(memory[BASE], 1e-9)}
        lines.append(line | {"repetitions": options.repetitions})
    save(options.results, lines)


def _with_total(step: Step) -> Step:
    def once(turn: int) -> dict[str, float]:
        figures = step(turn)
        return figures | {"seconds": sum(figures.values())}

    return once


# The variants


def papers_way(folder: Path, shape: Shape, begin: Begin) -> Step:
    """Return a step of the paper's way."""
    from papers_way import PapersWay

    trainer = PapersWay(folder, shape)

    def step(turn: int) -> dict[str, float]:
        prompt_ids = prompts(shape, turn + 1000)
        begin()
        return trainer.step(prompt_ids)

    return step


class Clock(Callback):
    """Takes the time of a Lightning step from its first batch to the end of its last, the optimizer included."""

    def __init__(self, begin: Begin) -> None:
        self.begin = begin
        self.start = self.end = 0.0
        self.times: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start with the first part of a rollout batch."""
        if batch.split == 0:
            self.begin()
            self.times, self.start = {"rollout": 0.0, "reward": 0.0}, time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add what the module says of its phases."""
        self.end = time.perf_counter()
        for phase in self.times:
            self.times[phase] += outputs["times"][phase]

    def phases(self) -> dict[str, float]:
        """Return seconds by phase."""
        rollout, reward = self.times["rollout"], self.times["reward"]
        return {"rollout": rollout, "scoring": reward, "training": self.end - self.start - rollout - reward}


def ours(folder: Path, shape: Shape, begin: Begin, micro_batch_size: int | None = None) -> Step:
    """Return a step of `ReMaxModule`: each call is a `fit` of one step that keeps the optimizer of the one before."""
    from lightning.pytorch import Trainer

    from remax_lightning.data import PromptDataModule
    from remax_lightning.models import PretrainedModel
    from remax_lightning.modules import ReMaxModule
    from remax_lightning.rewards import ClassifierReward
    from remax_lightning.rollout import SamplingConfig

    kept: list[torch.optim.Optimizer] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if not kept:
            kept.append(torch.optim.AdamW(parameters, lr=1e-6))
        return kept[0]

    policy = str(folder / "policy")
    module = ReMaxModule(
        PretrainedModel(policy),
        ClassifierReward(str(folder / "reward"), template="{prompt} {response}"),
        reference=PretrainedModel(policy),
        sampling=SamplingConfig(max_response_length=shape.response),
        optimizer=optimizer,
    )

    def step(turn: int) -> dict[str, float]:
        path = folder / "prompts_of_turn.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompt_texts(shape, turn + 1000)))
        data = PromptDataModule(
            str(path),
            policy,
            batch_size=shape.prompts,
            micro_batch_size=micro_batch_size,
            max_prompt_length=shape.prompt,
        )
        clock = Clock(begin)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            accumulate_grad_batches=data.num_splits,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            callbacks=[clock],
        )
        trainer.fit(module, data)
        return clock.phases()

    return step


def ours_micro_batches(folder: Path, shape: Shape, begin: Begin) -> Step:
    """Return a step of `ReMaxModule` that trains on four prompts at a time."""
    return ours(folder, shape, begin, micro_batch_size=min(4, shape.prompts))


def trl_rloo(folder: Path, shape: Shape, begin: Begin) -> Step:
    """Return a step of TRL's RLOOTrainer."""
    import trl_peer
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    rows = [{"prompt": text} for text in prompt_texts(shape, 0)]
    trainer = trl_peer.make_trainer(policy, reward, shape, rows, folder, kl_coef=0.05, bfloat16=False)
    return trl_peer.timed_step(trainer, begin)


MAKERS: dict[str, Callable[[Path, Shape, Begin], Step]] = {
    "papers_way": papers_way,
    "ours": ours,
    "ours_micro_batches": ours_micro_batches,
    "trl_rloo": trl_rloo,
}


# Memory


def _memory(folder: Path, name: str, size: str) -> float:
    """Return the peak of `name` over its base in GB, measured in a process of its own."""
    command = [sys.executable, __file__, "--sizes", size, "--memory-of", str(folder), name]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [found] = [line for line in output.splitlines() if line.startswith("MEMORY")]
    return float(json.loads(found.removeprefix("MEMORY")))


def _memory_here(folder: Path, name: str, size: str) -> float:
    bases: list[float] = []

    def begin() -> None:
        if not bases:
            Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
            bases.append(_resident("VmRSS"))

    step = MAKERS[name](folder, SHAPES[size], begin)
    for turn in range(2):
        step(turn)
    return _resident("VmHWM") - bases[0]


def _resident(name: str) -> float:
    """Return the resident memory of this process, `VmRSS` now or `VmHWM` at its peak, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [found] = [line for line in lines if line.startswith(name + ":")]
    return int(found.split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    main()
