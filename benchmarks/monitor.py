"""What the comparison of baselines costs a run: `python benchmarks/monitor.py`; writes results/monitor.jsonl.

One run per size, whose steps take turns: without `GradientVariance` (`off`), with it in a rollout that is not measured
(`observed`), and in one that is (`measured`). By default one rollout of 4 is measured, without a KL one of 32, where
half of the responses have no advantage and take a pass of their own. Decoding without greedy responses, at rollout 40
and every 200 rollouts, is not in these figures. Seconds are those of the processor, on one thread, so that others on
the machine disturb them little.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS
from shapes import SHAPES, Shape, prompt_texts
from shapes import save as save_models
from timing import save

from remax_lightning.callbacks import GradientVariance, gradient_variance
from remax_lightning.rewards import Reward

SHAPES = SHAPES | {"demo": Shape(2, 128, 64, 8, 5, 256)}
"""With one of the demo's size: what does not grow with the model weighs most there."""
TURNS = ("off", "observed", "measured")


class Halves(Reward):
    """Half of the responses have the reward of the greedy one, in every rollout: as many are trained in each turn."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        """Return a reward for each response: of every second new prompt 0 and 1 in turn, of the others 0."""
        rewards = []
        for prompt in prompts:
            # Counts of new prompts start from 0 and 100 in turn.
            count = self.counts.get(prompt, len(self.counts) % 2 * 100)
            self.counts[prompt] = count + 1
            rewards.append(float(count < 100 and count % 2))
        return rewards


class Turns(GradientVariance):
    """Off in one step, observing in the next, measuring in the third; keeps the seconds of steps and of its own."""

    def __init__(self) -> None:
        super().__init__(every_n_rollouts=1)
        self.steps: dict[str, list[float]] = {turn: [] for turn in TURNS}
        self.hooks: dict[str, list[float]] = {turn: [] for turn in TURNS}
        self.step = -1

    @property
    def turn(self) -> str:
        """What the step in progress is."""
        return TURNS[self.step % len(TURNS)]

    def needs_norms(self, *, is_free: bool) -> bool:
        """Whether this is the turn of measuring."""
        return self.turn == "measured"

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin the monitor in its turns, and start the clock."""
        self.step += 1
        pl_module.norm_askers[:] = [] if self.turn == "off" else [self.needs_norms]
        if self.turn != "off":
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.begun = time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock, and take the time of the monitor apart; the first steps warm up."""
        ended = time.process_time()
        if self.turn != "off":
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.step >= 2 * len(TURNS):
            self.steps[self.turn].append(ended - self.begun)
            self.hooks[self.turn].append(time.process_time() - ended)


def run(shape: Shape, folder: Path, rounds: int, *, has_kl: bool) -> Turns:
    """Train, and return the seconds of each turn."""
    from lightning.pytorch import Trainer

    from remax_lightning.data import PromptDataModule
    from remax_lightning.models import ModelConfig
    from remax_lightning.modules import ReMaxModule
    from remax_lightning.rollout import SamplingConfig

    policy, path, steps = str(folder / "policy"), folder / "prompts.jsonl", (rounds + 2) * len(TURNS)
    texts = [text for turn in range(steps) for text in prompt_texts(shape, turn)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    module = ReMaxModule(
        ModelConfig(policy),
        Halves(),
        kl_coef=0.05 if has_kl else 0.0,
        sampling=SamplingConfig(max_response_length=shape.response),
        check_on_policy=False,
    )
    clock = Turns()
    torch.manual_seed(0)
    Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        log_every_n_steps=1,
        default_root_dir=folder,
        callbacks=[clock],
    ).fit(module, PromptDataModule(str(path), policy, batch_size=shape.prompts, max_prompt_length=shape.prompt))
    return clock


def line_of(size: str, clock: Turns, *, has_kl: bool) -> dict[str, Any]:
    """Return what a step costs more, as a share: in each turn, and on average by default."""
    # Norms are part of the passes: the difference of two large numbers, of medians. What the monitor does apart has a
    # clock of its own, and a mean, since figures are made in some rollouts only.
    steps = {turn: statistics.median(values) for turn, values in clock.steps.items()}
    hooks = {turn: statistics.fmean(values) for turn, values in clock.hooks.items()}
    observed = hooks["observed"] / steps["off"]
    measured = (hooks["measured"] + steps["measured"]) / steps["off"] - 1
    every = 4 if has_kl else 4 * gradient_variance.IDLE_EVERY
    average = observed + (measured - observed) / every
    return {
        "benchmark": "monitor",
        "size": size,
        "variant": "kl" if has_kl else "no_kl",
        "device": "cpu",
        "dtype": "float32",
        "seconds": round(steps["off"], 4),
        "observed": round(observed, 4),
        "measured": round(measured, 4),
        "by_default": round(average, 4),
        "repetitions": len(clock.steps["off"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every size with and without a KL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["demo", "tiny"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--results", type=Path, default=RESULTS / "monitor.jsonl")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    lines = []
    for size in options.sizes:
        for has_kl in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                save_models(Path(folder), SHAPES[size])
                clock = run(SHAPES[size], Path(folder), options.rounds, has_kl=has_kl)
            lines.append(line_of(size, clock, has_kl=has_kl))
            print(lines[-1], flush=True)
    save(options.results, lines)


if __name__ == "__main__":
    main()
