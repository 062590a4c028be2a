"""A whole optimizer step side by side: `python benchmarks/step.py`; writes results/step.jsonl.

Ours is `ReMaxModule` in a Lightning `Trainer`, with a reference and a `ClassifierReward` as large as the policy, all
prompts in one training pass (`ours`) or four at a time (`ours_micro_batches`); `papers_way` is the paper's algorithm as
its code takes it; `trl_rloo` is TRL's RLOOTrainer with two sampled responses per prompt instead of a sampled and a
greedy one; `trl_ppo` is TRL's PPOTrainer with one response per prompt, a value model as large as the policy and a
single epoch over the responses, which favors PPO: four are usual. No response ends before the limit; all train with
AdamW in float32 on the CPU. `rollout` is making the responses, `scoring` everything between that and the only pass
with gradients, `training` that pass and the optimizer.

TRL's PPO is gone from the TRL whose RLOO is measured, so it takes its steps in turn with the others in a process of
another environment. Memory is taken in a process of its own per variant: the most that a run of two steps held, over
what it held when all models were loaded, PPO's value model among them, and the first step began.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from machine import RESULTS
from shapes import SHAPES, Shape, prompt_texts, prompts
from shapes import save as save_models
from timing import interleaved, medians, save, trl_version
from worker import Worker, serve

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
    parser.add_argument("--warmup", type=int, default=3, help="until CUDA graphs are captured")
    parser.add_argument("--results", type=Path, default=RESULTS / "step.jsonl")
    parser.add_argument("--ppo-python", type=Path, help="interpreter of an environment with '.[bench-ppo]'")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if options.serve:
        folder, name = options.serve
        serve(lambda begin: MAKERS[name](Path(folder), SHAPES[options.sizes[0]], begin))
        return
    options.variants = _installed(options)
    for size in options.sizes:
        measure(size, options)


def _installed(options: argparse.Namespace) -> list[str]:
    """Return the variants without those whose TRL is not there, of which it tells the user."""
    import ppo_peer
    import trl_peer

    missing = {}
    if trl_version() is None:
        missing["trl_rloo"] = trl_peer.MISSING
    if options.ppo_python is None or not options.ppo_python.exists():
        missing["trl_ppo"] = ppo_peer.MISSING
    for name in missing.keys() & set(options.variants):
        print(missing[name], flush=True)
    return [name for name in options.variants if name not in missing]


def measure(size: str, options: argparse.Namespace) -> None:
    """Measure the variants on one size, in turn, then the memory of each, and write the lines down."""
    names = list(dict.fromkeys([BASE, *options.variants]))
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder), SHAPES[size])
        commands = {
            name: [
                str(options.ppo_python if name == "trl_ppo" else sys.executable),
                *(__file__, "--sizes", size, "--serve", folder, name),
            ]
            for name in names
        }
        times = _times(Path(folder), SHAPES[size], commands, options)
        memory = {name: _memory(command) for name, command in commands.items()}
    base, base_memory = times[BASE]["seconds"], memory[BASE]["peak_over_base_gb"]
    lines = []
    for name in names:
        line: dict[str, Any] = {"benchmark": "step", "size": size, "variant": name, "device": "cpu", "dtype": "float32"}
        line |= {"seconds": times[name]["seconds"], "ratio": times[name]["seconds"] / base}
        line |= {phase: times[name][phase] for phase in PHASES} | memory[name]
        line |= {"memory_ratio": line["peak_over_base_gb"] / max(base_memory, 1e-9)}
        lines.append(line | {"repetitions": options.repetitions})
    save(options.results, lines)


def _times(
    folder: Path, shape: Shape, commands: dict[str, list[str]], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return the median seconds of each variant, by phase and in all; `trl_ppo` runs as its command, others here."""
    with ExitStack() as stack:
        steps = {
            name: stack.enter_context(Worker(command)).step
            if name == "trl_ppo"
            else MAKERS[name](folder, shape, lambda: None)
            for name, command in commands.items()
        }
        totals = {name: _with_total(step) for name, step in steps.items()}
        figures = interleaved(totals, options.repetitions, options.warmup)
    return {name: medians(values) for name, values in figures.items()}


def _memory(command: list[str]) -> dict[str, Any]:
    """Return the peak over the base of a variant that runs as `command`, and the versions of the packages there."""
    with Worker(command) as worker:
        for turn in range(2):
            worker.step(turn)
    return {"peak_over_base_gb": worker.peak_over_base_gb, "versions": worker.versions}


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
        if batch.micro_batch_index == 0:
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
    from remax_lightning.models import ModelConfig
    from remax_lightning.modules import ReMaxModule
    from remax_lightning.rewards import ClassifierReward
    from remax_lightning.rollout import SamplingConfig

    made: list[torch.optim.Optimizer] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if not made:
            made.append(torch.optim.AdamW(parameters, lr=1e-6))
        return made[0]

    policy = str(folder / "policy")
    module = ReMaxModule(
        ModelConfig(policy),
        ClassifierReward(str(folder / "reward"), template="{prompt} {response}"),
        reference=ModelConfig(policy),
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
            accumulate_grad_batches=data.num_micro_batches,
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


def trl_ppo(folder: Path, shape: Shape, begin: Begin) -> Step:
    """Return a step of TRL's PPOTrainer; for a process in an environment that has it."""
    import ppo_peer

    return ppo_peer.timed_step(ppo_peer.make_trainer(folder, shape), begin)


MAKERS: dict[str, Callable[[Path, Shape, Begin], Step]] = {
    "papers_way": papers_way,
    "ours": ours,
    "ours_micro_batches": ours_micro_batches,
    "trl_rloo": trl_rloo,
    "trl_ppo": trl_ppo,
}


if __name__ == "__main__":
    main()
