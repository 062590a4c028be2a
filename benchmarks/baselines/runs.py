"""Runs of the study in pieces: each run is stopped and resumed at will, and writes its evaluations as it goes."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.baselines.records import Cell, Curves, Evaluation, PeakMemory, append, machine, read_curves
from benchmarks.baselines.summary import BASE, best_rate, mean_reward
from benchmarks.baselines.tasks import ARMS, TASKS, Arm, Task, arguments, prepared, working_folder

CHECKPOINT = "piece.ckpt"
COUNTS = ("steps", "greedy_steps", "trained", "generated")


class PieceEnded(Exception):  # noqa: N818 - nothing went wrong
    """The time of a piece is over, and its checkpoint is written."""


class Recorder(Callback):
    """Writes the evaluations of a run, counts what its seconds are made of, and ends its pieces.

    Args:
        cell: the run.
        path: file that evaluations are appended to.
        checkpoint: where a piece ends.
        deadline: `time.monotonic()` at which it does.
    """

    def __init__(self, cell: Cell, path: Path, checkpoint: Path, deadline: float) -> None:
        self.cell, self.path, self.checkpoint, self.deadline = cell, path, checkpoint, deadline
        self.every = TASKS[cell.task].every
        self.machine = machine()
        self.counts = dict.fromkeys(COUNTS, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, which go on in the next piece."""
        return dict(self.counts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.counts = dict(state_dict)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step; end the piece when its time is over."""
        rollout = outputs["rollout"]
        self.counts["steps"] += 1
        self.counts["greedy_steps"] += rollout.greedy is not None
        self.counts["trained"] += len(rollout.reward)
        selector: Any = cast(Any, pl_module).rollouts.selector
        batches = 1 if selector is None else selector.batches
        self.counts["generated"] += batches * len(rollout.reward)
        # Between evaluations only: one that is due at this step is still to come.
        due = trainer.global_step % self.every == 0
        if time.monotonic() > self.deadline and not due and trainer.global_step < trainer.max_steps:
            trainer.save_checkpoint(self.checkpoint)
            raise PieceEnded

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the evaluation."""
        if trainer.sanity_checking:
            return
        metrics = {name: round(float(value), 5) for name, value in trainer.callback_metrics.items()}
        evaluation = Evaluation(
            step=trainer.global_step,
            samples=self.counts["trained"],
            greedy_steps=self.counts["greedy_steps"],
            figures=_part(metrics, "val/"),
            variance=_part(metrics, "train/gradient_variance/"),
            rollouts=round(self.counts["generated"] / max(1, self.counts["trained"]), 4),
        )
        # Once for a run; the commit may change between its pieces.
        described = self.machine if evaluation.step == 0 else {"commit": self.machine["commit"]}
        append(self.path, {**self.cell._asdict(), **evaluation._asdict(), **described})


def _part(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


class Limits(NamedTuple):
    """How long the study may compute now.

    Args:
        end: `time.monotonic()` after which no piece begins.
        piece: seconds of a piece.
    """

    end: float
    piece: float


def is_complete(evaluations: Sequence[Evaluation], task: Task) -> bool:
    """Whether a run has reached its last step."""
    return bool(evaluations) and evaluations[-1].step >= task.steps


def run_piece(cell: Cell, results: Path, folder: Path, limits: Limits) -> bool:
    """Run a cell until it ends or the time of a piece is over; return whether it has ended."""
    from remax_lightning.cli_run import RemaxCLI, run

    task, arm = TASKS[cell.task], ARMS[cell.arm]
    place = prepared(task, folder)
    runs = place / "pieces" / f"{arm.name}-{cell.rate:g}-{cell.seed}"
    runs.mkdir(parents=True, exist_ok=True)
    checkpoint = runs / CHECKPOINT
    recorder = Recorder(cell, results, checkpoint, min(limits.end, time.monotonic() + limits.piece))

    class _Recorded(RemaxCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(recorder)
            return trainer

    command = ["fit", *arguments(task, arm, cell.rate, cell.seed), f"--trainer.default_root_dir={runs}"]
    if checkpoint.exists():
        command.append(f"--ckpt_path={checkpoint}")
    if str(Path(__file__).parents[2]) not in sys.path:  # the rewards of this package
        sys.path.append(str(Path(__file__).parents[2]))
    with working_folder(place):
        try:
            trainer = run(command, _Recorded).trainer
        except PieceEnded:
            return False
    if trainer.interrupted:
        raise KeyboardInterrupt  # the study ends with its run
    checkpoint.unlink(missing_ok=True)
    return True


# ---- Which runs come next ----


def wanted_cells(task: Task, arms: Sequence[Arm], curves: Curves) -> Iterator[Cell]:
    """Yield the runs that are not complete yet, those that choose a learning rate first, those at a common one last.

    The grid of an arm starts around the best rate of the base, once that is known, and goes on upwards or downwards by
    factors of 2 until its best rate has a worse one on both sides.
    """
    tuned: list[tuple[Arm, float]] = []
    for arm in arms:
        rates = rates_to_try(task, arm, curves)
        cells = [Cell(task.name, arm.name, rate, seed) for rate in rates for seed in task.tuning_seeds]
        waiting = [cell for cell in cells if not is_complete(curves.get(cell, []), task)]
        yield from waiting
        rate = best_rate(task, arm, curves)
        if not waiting and rate is not None:
            tuned.append((arm, rate))
    # Seed by seed, so that what is there compares all arms at any time.
    common = [] if task.common_rate is None else [(arm, task.common_rate) for arm in arms]
    for pairs in (tuned, common):
        for seed in task.seeds:
            for arm, rate in pairs:
                cell = Cell(task.name, arm.name, rate, seed)
                if not is_complete(curves.get(cell, []), task):
                    yield cell


def rates_to_try(task: Task, arm: Arm, curves: Curves) -> list[float]:
    """Return the learning rates that the choice for an arm needs, as far as that is known."""
    scores = {}
    for cell, evaluations in curves.items():
        mine = (cell.task, cell.arm) == (task.name, arm.name) and cell.seed in task.tuning_seeds
        if mine and is_complete(evaluations, task):
            scores.setdefault(cell.rate, []).append(mean_reward(evaluations))
    means = {rate: sum(values) / len(values) for rate, values in scores.items()
             if len(values) == len(task.tuning_seeds)}  # fmt: skip
    best = max(means, key=lambda rate: means[rate], default=None)
    around = set() if best is None else {best / 2, best, 2 * best}
    if best is not None and around <= set(means):
        return sorted(means)
    base = None if arm.name == BASE else best_rate(task, ARMS[BASE], curves)
    start = set(task.rates) if base is None else {base / 2, base, 2 * base}
    return sorted(start | set(scores) if not start <= set(means) else around | set(means))


def compute(tasks: Sequence[Task], arms: Sequence[Arm], results: Path, folder: Path, limits: Limits) -> int:
    """Compute pieces of the study until the time is over or nothing is left; return how many runs ended."""
    ended, failed = 0, set()
    while time.monotonic() < limits.end:
        curves = read_curves([results])
        cells = (cell for task in tasks for cell in wanted_cells(task, arms, curves) if cell not in failed)
        cell = next(cells, None)
        if cell is None:
            print("nothing is left to compute", flush=True)
            break
        started = time.perf_counter()
        try:
            is_done = run_piece(cell, results, folder, limits)
        except Exception:
            traceback.print_exc()
            failed.add(cell)
            continue
        ended += is_done
        print(f"{cell} {'ended' if is_done else 'goes on'}, {time.perf_counter() - started:.0f} s", flush=True)
    return ended


# ---- Seconds of a step ----


class StepClock(Callback):
    """Measures the memory of steps, and the seconds of those after the first few: by the clock, and of the processor.

    Args:
        warmup: steps that do not count.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.steps: list[tuple[float, float, float]] = []
        """Seconds by the clock and of the processor, and the share of rollout and scoring."""
        self._start = (0.0, 0.0)
        self._memory: PeakMemory | None = None
        self.peak_over_base_gb = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure memory from here on: the models are loaded."""
        self._memory = PeakMemory()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read how much more the steps held."""
        self.peak_over_base_gb = self._memory.gigabytes() if self._memory else 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clocks."""
        self._start = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clocks."""
        wall, processor = self._start
        if trainer.global_step > self.warmup:
            seconds = time.perf_counter() - wall
            rollout = outputs["times"]["rollout"] + outputs["times"]["reward"]
            self.steps.append((seconds, time.process_time() - processor, rollout / seconds))


def time_steps(task: Task, arm: Arm, folder: Path, steps: int, warmup: int) -> StepClock:
    """Return the clock of the first steps of an arm.

    Neither the monitor nor evaluations run.
    """
    from remax_lightning.cli_run import RemaxCLI, run

    clock = StepClock(warmup)

    class _Clocked(RemaxCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(clock)
            return trainer

    place = prepared(task, folder)
    (place / "seconds").mkdir(exist_ok=True)
    more = [f"--trainer.max_steps={warmup + steps}", "--trainer.limit_val_batches=0"]
    more += ["--evaluation.at_start=false", "--gradient_variance.every_n_rollouts=0"]
    more += [f"--trainer.default_root_dir={place / 'seconds'}"]
    with working_folder(place):
        run(["fit", *arguments(task, arm, task.rates[0], 0), *more], _Clocked)
    return clock


def load_average() -> float:
    """Return how many processes want to run besides this one, over the last minute."""
    return round(max(0.0, os.getloadavg()[0] - 1), 1)
