"""Stopping and resuming: signals and early stops, random states, and checkpoints that resume exactly.

A run stops at the end of the same step on all ranks, with a checkpoint after SIGTERM or SLURM's signal. Lightning's
handlers act at once: they save and wait for other ranks in the middle of a step. Here a signal is only recorded, and
handled at the end of the step. A step may never end, because a reward hangs: a second SIGTERM ends the process at once.
"""

from __future__ import annotations

import os
import random
import signal
import stat
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeAlias, cast
from weakref import WeakSet

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from remax_lightning.distributed import gather_objects, max_over_ranks
from remax_lightning.errors import TERMINATED, SignalExit, UserError, above
from remax_lightning.run_folder import run_folder
from remax_lightning.strategies import nonfinite_state
from remax_lightning.strategies.stall_watchdog import StallWatchdog


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of this process's generators: torch's, Python's, NumPy's and, on a GPU, the device's."""
    # NumPy's has an array among its parts, which `torch.load(weights_only=True)` refuses.
    kind, key, *rest = cast("tuple[Any, ...]", np.random.get_state())
    numpy_state = [kind, torch.from_numpy(key.astype(np.int64)), *rest]
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy_state}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the generators to a state of `random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    if "numpy" in state:  # not in older checkpoints
        kind, key, *rest = state["numpy"]
        np.random.set_state((kind, key.cpu().numpy().astype(np.uint32), *rest))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def gather_rank_states(state: dict[str, Any] | None) -> list[dict[str, Any] | None]:
    """Return the states of all ranks on the CPU, because strategies save that of rank 0. A collective."""
    return gather_objects(move_data_to_device(state, torch.device("cpu")))


def checkpoint_folders(trainer: Trainer) -> set[Path]:
    """Return the local checkpoint folders of this run, and that of the checkpoint it resumed from."""
    folders = [getattr(item, "dirpath", None) for item in trainer.checkpoint_callbacks]
    if trainer.ckpt_path is not None:
        folders.append(str(Path(trainer.ckpt_path).parent))
    # Remote folders are left out: their files are not renamed.
    return {Path(item) for item in folders if item is not None and "://" not in str(item)}


def select_rank_state(states: list[dict[str, Any] | None] | None, trainer: Trainer) -> Any:
    """Return the state of this rank from `gather_rank_states`, on its device.

    Raises:
        UserError: if the checkpoint holds an unfinished rollout of another number of processes.
    """
    if not states or not any(states):  # None in a checkpoint of 0.1.0
        return None
    if len(states) != trainer.world_size:
        raise UserError(
            f"trainer.devices x num_nodes must be {len(states)}, got {trainer.world_size}: the checkpoint"
            " holds an unfinished rollout; resume with as many processes, or from a checkpoint between two rollouts"
        )
    return move_data_to_device(states[trainer.global_rank], trainer.strategy.root_device)


def resume_after_last_batch(checkpoint: dict[str, Any]) -> None:
    """Change the loop state of a checkpoint to that of the end of a training batch.

    Lightning 2.6 resumes exactly only from there. From a checkpoint at the end of an epoch or of a validation, which
    `ModelCheckpoint` saves by default, it counts one epoch too many or trains one batch too many in the old epoch, and
    later epochs have another order. The data loader saves its own position, so nothing is lost.
    """
    # ---- Only a checkpoint of a running fit, saved between two batches, is changed ----
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    batches, epochs = loops.get("epoch_loop.batch_progress"), loops.get("epoch_progress")
    if batches is None or epochs is None:
        return
    now = batches["current"]  # batches of this epoch
    if not 0 < now["ready"] == now["started"] == now["processed"]:
        return  # inside a batch, or before the first
    # One back: the last batch is processed but not completed, and its epoch is started but not processed.
    for part in ("total", "current"):
        batches[part]["completed"] = batches[part]["processed"] - 1
        epochs[part]["processed"] = epochs[part]["completed"] = epochs[part]["started"] - 1


def num_cut_batches(checkpoint: dict[str, Any], accumulate: int) -> int:
    """Return how many batches of an optimizer step were trained on before a checkpoint that cuts it; 0 between two.

    No checkpoint holds their gradients. `ModelCheckpoint` saves there after a validation in the middle of a step, and
    by `train_time_interval`.
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    # The last batch of an epoch ends a step, however many it has.
    return 0 if progress is None or progress["is_last_batch"] else int(progress["current"]["processed"] % accumulate)


END, REQUEUE = 1, 2
_ONE_SIGNAL = 0.2
"""Seconds within which signals count as one: a wrapper may pass one on that the whole process group has got."""


class DeferredSignals(_SignalConnector):
    """Lightning's handling of signals, deferred: `requested` says what was requested."""

    requested = 0
    _watch: _SecondSigterm | None = None

    def register_signal_handlers(self) -> None:
        """Install the handlers and clear earlier requests."""
        self.requested = 0
        _installed.add(self)
        super().register_signal_handlers()
        if threading.current_thread() is not threading.main_thread():
            return
        if self._watch is None:
            self._watch = _SecondSigterm(self.trainer)
        # `nohup` has it ignored. Lightning's teardown restores every handler.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self._end_without_terminal)

    @property
    def ends_with_terminal(self) -> bool:
        """Whether SIGHUP ends the run by the handler that is installed here."""
        return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == self._end_without_terminal

    def teardown(self) -> None:
        """Restore what was there before."""
        _installed.discard(self)
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        super().teardown()

    def _sigterm_notifier_fn(self, signum: Any, _: Any) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.requested = max(self.requested, END)
            return
        launcher = self.trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)
        raise SignalExit(TERMINATED)  # outside of training there is nothing to save

    def _end_without_terminal(self, signum: Any, frame: Any) -> None:
        """End the run as SIGTERM does when its terminal is closed."""
        _leave_terminal()
        self._sigterm_notifier_fn(signum, frame)

    def _slurm_sigusr_handler_fn(self, signum: Any, _: Any) -> None:
        self.requested = REQUEUE

    def requeue(self, signum: int) -> None:
        """Save a checkpoint that Lightning loads when SLURM runs the job again, and requeue the job."""
        super()._slurm_sigusr_handler_fn(signum, cast(Any, None))


def _leave_terminal(*_: Any) -> None:
    """Write to nothing what would go to a closed terminal, where writing fails."""
    for output in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(output).st_mode):  # not a file or a pipe
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, output)
                os.close(silence)


_installed: WeakSet[DeferredSignals] = WeakSet()


def _forget_signals() -> None:
    """Give a child process the signal handlers of before the run: it is none of the run's own.

    A reward forks where it takes a `multiprocessing.Pool`, which ends its workers by SIGTERM and waits for them. With
    the run's handler they would live on, and the pipe that they share would tell the run that SIGTERM came to itself.
    A terminal that is closed tells all of its processes, though, and the run needs them for the step that it ends.
    """
    for signals in list(_installed):
        outlives = signals.ends_with_terminal
        signals.teardown()
        if outlives:
            signal.signal(signal.SIGHUP, _leave_terminal)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_signals)


class _SecondSigterm:
    """Ends the process, and those that it launched, when a second SIGTERM arrives.

    Python runs signal handlers between two instructions of the main thread, so none runs while that is inside of a
    library: in a collective, or in a reward that waits. The interpreter writes the number of a signal to a pipe at
    once, and a thread reads it there.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        # ---- The interpreter writes to one end, the thread reads the other ----
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # a signal handler must not wait
        self._replaced = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, daemon=True, name="second-sigterm").start()

    def stop(self) -> None:
        """Give the pipe back; the thread ends with it."""
        signal.set_wakeup_fd(self._replaced)
        os.close(self._write)

    def _wait(self) -> None:
        first = None
        while number := os.read(self._read, 1):
            now = time.monotonic()
            # One signal can arrive twice, from the scheduler and from a wrapper.
            if number[0] == signal.SIGTERM and first is not None and now - first > _ONE_SIGNAL:
                self._end()
            elif number[0] == signal.SIGTERM and first is None:
                first = now
        os.close(self._read)

    def _end(self) -> None:
        with suppress(OSError, ValueError):  # standard error may be closed
            sys.stderr.write("remax: SIGTERM came a second time: the run ends at once, without another checkpoint\n")
            sys.stderr.flush()
        for process in getattr(self._trainer.strategy.launcher, "procs", ()):
            process.kill()
        # Not `sys.exit`: the main thread may be in a library that never returns.
        os._exit(TERMINATED)


def defer_signals(trainer: Trainer) -> None:
    """Defer signals to the end of the step; call this before Lightning installs its handlers."""
    if not isinstance(trainer._signal_connector, DeferredSignals):
        trainer._signal_connector = DeferredSignals(trainer)


class StopAtStepEnd:
    """Stops a run on all ranks, at the end of the optimizer step in which one rank has to stop.

    Args:
        trainer: a trainer that starts to train, with deferred signals.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._signals = cast(DeferredSignals, trainer._signal_connector)
        self._step, self._should_stop, self._handled = trainer.global_step, False, False

    def after_batch(self) -> None:
        """Stop if any rank has to stop. Every rank calls this after each batch and all callbacks.

        Nothing is decided in the middle of an optimizer step, because no checkpoint holds its gradients.
        """
        trainer = self._trainer
        # An early stop in the middle of a step is remembered, and hidden from Lightning until the step ends.
        self._should_stop |= trainer.should_stop
        trainer.should_stop = False
        if trainer.global_step == self._step:
            return
        self._step, trainer.should_stop, self._should_stop = trainer.global_step, self._should_stop, False
        self.stop_on_all_ranks()

    def stop_on_all_ranks(self) -> None:
        """Make `should_stop` the same on all ranks, and after a signal save the run and let Lightning end it."""
        # The same decision on all ranks: the strongest request of any of them.
        trainer, signals = self._trainer, self._signals
        requested, stop = map(int, max_over_ranks(trainer, [signals.requested, trainer.should_stop]))
        trainer.should_stop = bool(stop)
        if not requested or self._handled:
            return
        self._handled = True
        if requested == REQUEUE:
            signals.requeue(signal.SIGUSR1)
        elif not cast(Any, trainer).fast_dev_run:
            _save(trainer)
        # Lightning then leaves its loops at once. After the last step it would skip the hooks that end a run.
        signals.received_sigterm = not _is_last_step(trainer)


def _is_last_step(trainer: Trainer) -> bool:
    last_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or last_epoch


def _save(trainer: Trainer) -> None:
    if trainer.global_step == 0:  # in the evaluation before it
        rank_zero_info("Told to end before the first optimizer step: there is nothing to save.")
        return
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    resumable = [callback for callback in callbacks if not callback.save_weights_only]
    if not resumable:
        rank_zero_warn(
            "The run received SIGTERM but saves nothing, because there is no ModelCheckpoint that saves full"
            " checkpoints; set trainer.enable_checkpointing to true"
        )
        return
    # Not where a callback has just saved this very step.
    if not any(callback._last_global_step_saved == trainer.global_step for callback in resumable):
        if nonfinite_state(trainer) is not None:
            rank_zero_warn(
                "Received SIGTERM: weights or optimizer state are not finite, and no checkpoint is saved; --ckpt_path"
                " last resumes from an earlier one."
            )
            return
        trainer.save_checkpoint(Path(cast(str, resumable[0].dirpath)) / "last.ckpt")
    rank_zero_info(
        f"Received SIGTERM: saved a checkpoint after optimizer step {trainer.global_step}; --ckpt_path last resumes."
    )


# ---- A run that makes no progress ends: the watchdog is told what was reached ----


StallSeconds: TypeAlias = Annotated[float | None, above(0, note="seconds")]
"""`model.stall_timeout` of every module."""


class StallTimeout(Callback):
    """Ends a run that makes no progress for too long, with the stacks of all ranks in the folder of the run.

    The modules of this package add it to every run. It watches from the start of the fit or the evaluation, when models
    are loaded, to the end.

    Args:
        seconds: without a batch, a rollout, a score or a checkpoint.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self._watchdog: StallWatchdog | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to watch."""
        self._start(trainer, "the fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to watch, unless the evaluation is part of a fit."""
        self._start(trainer, "an evaluation")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to watch."""
        self._start(trainer, "an evaluation")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to watch."""
        self._start(trainer, "predictions")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Report a batch."""
        self._report(f"training batch {batch_idx} after optimizer step {trainer.global_step}")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Report the end of a batch."""
        self._report(f"what follows optimizer step {trainer.global_step}: callbacks, checkpoints, the next batch")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Report a batch of an evaluation."""
        self._report(f"batch {batch_idx} of an evaluation")

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Report a checkpoint."""
        self._report("saving a checkpoint")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the end of training: checkpoints and exports follow."""
        self._report("the end of training")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch no longer."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Watch no longer: the run has ended."""
        self._stop()

    def _start(self, trainer: Trainer, what: str) -> None:
        # The evaluations of a fit come here too, and go on with its watchdog. It needs POSIX signals.
        if self._watchdog is None and os.name == "posix":
            self._watchdog = StallWatchdog(self.seconds, run_folder(trainer), trainer.global_rank, trainer.world_size)
        self._report(what)

    def _report(self, what: str) -> None:
        if self._watchdog is not None:
            self._watchdog.report(what)

    def _stop(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
