"""Ending early: at the end of a step, on all ranks at the same one, and with a checkpoint where the machine is taken.

Lightning's own handlers act wherever the signal finds the process: they save, and wait for other ranks, in the middle
of a step. Here a signal is only noted.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from remax_lightning.distributed import max_over_ranks

END, REQUEUE = 1, 2
EXIT_CODE = 128 + signal.SIGTERM


class DeferredSignals(_SignalConnector):
    """Lightning's handling of signals, put off: `noted` says what is asked for."""

    noted = 0

    def register_signal_handlers(self) -> None:
        """Take the handlers; a new run has been asked for nothing."""
        self.noted = 0
        super().register_signal_handlers()

    def _sigterm_notifier_fn(self, signum: Any, _: Any) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.noted = max(self.noted, END)
            return
        launcher = self.trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)
        raise SystemExit(EXIT_CODE)  # there is nothing to save

    def _slurm_sigusr_handler_fn(self, signum: Any, _: Any) -> None:
        self.noted = REQUEUE

    def requeue(self, signum: int) -> None:
        """Save a checkpoint that Lightning finds by itself when SLURM runs the job again, and ask SLURM for that."""
        super()._slurm_sigusr_handler_fn(signum, cast(Any, None))


def note_signals(trainer: Trainer) -> None:
    """Let signals wait for the end of the step; call it before Lightning takes its handlers."""
    if not isinstance(trainer._signal_connector, DeferredSignals):
        trainer._signal_connector = DeferredSignals(trainer)


class StopAtStepEnd:
    """Ends a run at the end of an optimizer step, on all ranks where one was told to.

    Args:
        trainer: a trainer that begins to train; its signals are noted.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._signals = cast(DeferredSignals, trainer._signal_connector)
        self._step, self._should_stop, self._told = trainer.global_step, False, False

    def after_batch(self) -> None:
        """End where a rank was told to; every rank has to call this after each batch and all callbacks.

        In the middle of an optimizer step nothing is decided: its gradients are in no checkpoint.
        """
        trainer = self._trainer
        self._should_stop |= trainer.should_stop
        trainer.should_stop = False
        if trainer.global_step == self._step:
            return
        self._step, trainer.should_stop, self._should_stop = trainer.global_step, self._should_stop, False
        self.end_early_together()

    def end_early_together(self) -> None:
        """Make `should_stop` the same on all ranks, and after a signal save the run and let Lightning end it."""
        trainer, signals = self._trainer, self._signals
        noted, stop = map(int, max_over_ranks(trainer, [signals.noted, trainer.should_stop]))
        trainer.should_stop = bool(stop)
        if not noted or self._told:
            return
        self._told = True
        if noted == REQUEUE:
            signals.requeue(signal.SIGUSR1)
        elif not cast(Any, trainer).fast_dev_run:
            _save(trainer)
        # Lightning leaves its loops as soon as it sees this. After the last step it would leave out what ends a run.
        signals.received_sigterm = not _is_done(trainer)


def _is_done(trainer: Trainer) -> bool:
    last_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or last_epoch


def _save(trainer: Trainer) -> None:
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    resumable = [each for each in callbacks if not each.save_weights_only]
    if not resumable:
        rank_zero_warn(
            "The run was told to end and nothing is saved, because no ModelCheckpoint saves all of it; set"
            " trainer.enable_checkpointing to true"
        )
        return
    if not any(each._last_global_step_saved == trainer.global_step for each in resumable):
        trainer.save_checkpoint(Path(cast(str, resumable[0].dirpath)) / "last.ckpt")
    rank_zero_info(f"Told to end: saved after optimizer step {trainer.global_step}; --ckpt_path last goes on.")
