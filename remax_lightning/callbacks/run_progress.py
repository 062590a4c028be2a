"""Shows how far a run is: bars on a terminal, and elsewhere a line for each logged step."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from remax_lightning.baselines import Auto
from remax_lightning.evaluation.statistics import cheapest_baseline
from remax_lightning.types import PreferenceBatch, SupervisedBatch

FIGURES = {
    "reward": ".4f", "baseline_reward": ".4f", "kl": ".4f", "loss": ".4f", "accuracy": ".1%", "perplexity": ".2f",
}  # fmt: skip
"""Metrics in a line, of those that the stage logs, and how they are written."""
BAR_DELAY = 2.0
"""Seconds after which a bar within a step appears: Lightning's moves often enough where steps are shorter."""
EVALUATION_INTERVAL = 30.0
"""Seconds between two lines of an evaluation."""


class RunProgress(Callback):
    """Shows how far a run is.

    On a terminal, Lightning's bar counts the batches, and one below it the tokens of a rollout that takes longer than
    two seconds. Elsewhere, as under nohup or SLURM, rank 0 prints a line for each optimizer step that is logged
    (`trainer.log_every_n_steps`), for the result of each validation, and every 30 seconds of an evaluation:

        step 12/500  reward 0.5312  baseline_reward 0.4688  kl 0.0021  1,843 tokens/s  4.1 s/step  0:33:20 left

    Tokens per second are those of `Throughput` for ReMax. The time left is that of the steps so far, with their
    validations and checkpoints.

    Args:
        lines: whether lines are printed. None prints them where standard output is no terminal.
    """

    def __init__(self, lines: bool | None = None) -> None:
        super().__init__()
        self.lines = lines
        self._prints = False
        self._tokens: Tensor | float = 0.0  # of this rank since the last line, of supervised stages
        self._first_step = self._last_step = 0
        self._started = self._last_line = 0.0
        self._total = math.inf

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decide between bars and lines; give the worker of rollouts a bar where Lightning has one of the same kind."""
        is_terminal = sys.stdout.isatty()
        self._prints = trainer.is_global_zero and (not is_terminal if self.lines is None else self.lines)
        worker: Any = getattr(pl_module, "worker", None)
        # tqdm's bars stand below each other; those of rich would be overwritten.
        bar = trainer.progress_bar_callback
        draws = trainer.is_global_zero and isinstance(bar, TQDMProgressBar) and not bar.is_disabled
        if worker is not None and draws and is_terminal:
            worker.progress_bar = token_bar

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the bar back."""
        worker: Any = getattr(pl_module, "worker", None)
        if worker is not None:
            worker.progress_bar = None

    # ---- Training ----

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count time and steps from here."""
        self._first_step = self._last_step = trainer.global_step
        self._started = self._last_line = time.perf_counter()
        self._tokens = 0.0
        self._total = float(trainer.estimated_stepping_batches)  # of all epochs; inf without an end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line at the end of an optimizer step that is logged."""
        if not self._prints:
            return
        self._tokens = self._tokens + _trained_tokens(batch)
        step, interval = trainer.global_step, cast("Any", trainer).log_every_n_steps
        if step == self._last_step or step % max(1, interval):  # no step, or none that is logged
            return
        now = time.perf_counter()
        parts = [f"step {step}/{self._total:.0f}" if math.isfinite(self._total) else f"step {step}"]
        parts += _figures(trainer, "train")
        baseline = getattr(getattr(pl_module, "objective", None), "baseline", None)
        if isinstance(baseline, Auto):
            parts.append(f"baseline {baseline.chosen}")
        cheapest = cheapest_baseline({name: float(value) for name, value in trainer.callback_metrics.items()})
        if cheapest is not None and cheapest.high < 1:
            parts.append(f"{cheapest.name} {cheapest.value:.2f} of the seconds of {cheapest.used}")
        parts += self._rates(trainer, step, now)
        self._last_step, self._last_line, self._tokens = step, now, 0.0
        _print("  ".join(parts))

    def _rates(self, trainer: Trainer, step: int, now: float) -> Iterator[str]:
        """Yield tokens per second and seconds per step since the last line, and the time left."""
        seconds = max(now - self._last_line, 1e-9)
        rate = trainer.callback_metrics.get("throughput/tokens_per_s")
        tokens = float(self._tokens) * trainer.world_size / seconds if rate is None else float(rate)
        if tokens:
            yield f"{tokens:,.0f} tokens/s"
        yield f"{seconds / (step - self._last_step):.3g} s/step"
        if math.isfinite(self._total):
            left = (now - self._started) / (step - self._first_step) * max(0.0, self._total - step)
            yield f"{timedelta(seconds=round(left))} left"

    # ---- Evaluation ----

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count its time from here."""
        self._began = self._last_evaluation_line = time.perf_counter()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line every 30 seconds."""
        self._evaluation_line("validation", batch_idx + 1, trainer.num_val_batches, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line every 30 seconds."""
        self._evaluation_line("test", batch_idx + 1, trainer.num_test_batches, dataloader_idx)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line every 30 seconds."""
        self._evaluation_line("predict", batch_idx + 1, trainer.num_predict_batches, dataloader_idx)

    def _evaluation_line(self, name: str, done: int, sizes: list[int | float], loader: int) -> None:
        now = time.perf_counter()
        if not self._prints or now - self._last_evaluation_line < EVALUATION_INTERVAL:
            return
        self._last_evaluation_line = now
        total = sizes[loader] if loader < len(sizes) else math.inf
        left = (now - self._began) / done * (total - done)
        of_total = f"/{total:.0f}  {timedelta(seconds=round(left))} left" if math.isfinite(total) else ""
        _print(f"{name} batch {done}{of_total}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what was measured; after `remax validate` Lightning prints it."""
        if self._prints and trainer.state.fn == "fit" and not trainer.sanity_checking:
            _print("  ".join([f"validation at step {trainer.global_step}", *_figures(trainer, "val")]))


def _figures(trainer: Trainer, stage: str) -> Iterator[str]:
    metrics = trainer.callback_metrics
    for name, form in FIGURES.items():
        if f"{stage}/{name}" in metrics:
            yield f"{name} {format(float(metrics[f'{stage}/{name}']), form)}"


def _trained_tokens(batch: Any) -> Tensor | float:
    """Return the tokens that a batch of a supervised stage runs the model on; 0 for others."""
    if not isinstance(batch, SupervisedBatch | PreferenceBatch):
        return 0.0
    masks = [getattr(batch, name) for name in batch._fields if name.endswith("_mask")]
    return torch.stack([mask.sum() for mask in masks]).sum()


def _print(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stdout)  # above the bars, where there are any
    sys.stdout.flush()  # a log file is read while the run goes on


class RunBar(TQDMProgressBar):
    """Lightning's bar with the figures of training first: a terminal has room for a few."""

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the figures behind the bar, without the number of the run's folder."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return dict(sorted(metrics.items(), key=lambda item: not item[0].startswith("train/")))


def _writes_to_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)


@contextmanager
def messages_above_bars() -> Iterator[None]:
    """Print messages of loggers, and warnings, above the bars of a terminal; they would be written into them."""
    if not sys.stdout.isatty():
        yield
        return
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    def show(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None
    ) -> None:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        tqdm.write(text, file=sys.stderr if file is None else file, end="")

    known = [logging.root, *logging.root.manager.loggerDict.values()]
    loggers = [logger for logger in known if isinstance(logger, logging.Logger)]
    with logging_redirect_tqdm([logger for logger in loggers if any(map(_writes_to_terminal, logger.handlers))]):
        shown, warnings.showwarning = warnings.showwarning, show
        try:
            yield
        finally:
            warnings.showwarning = shown


@contextmanager
def token_bar(length: int) -> Iterator[Callable[[int], None]]:
    """Show a bar for the tokens of a rollout; inside, call what is yielded with the number of tokens so far.

    Args:
        length: tokens of the longest possible response.
    """
    from tqdm import tqdm

    # It leaves no line behind, and responses that end early end it early.
    with tqdm(total=length, desc="Rollout", unit=" tokens", delay=BAR_DELAY, leave=False, file=sys.stdout) as bar:

        def advance(tokens: int) -> None:
            bar.update(tokens - bar.n)

        yield advance
