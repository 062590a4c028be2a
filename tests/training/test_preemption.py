"""A signal ends a run after the step that it found it in, with a checkpoint that repeats the uninterrupted run."""

from __future__ import annotations

import multiprocessing
import os
import random
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers.forks import start_code
from helpers.training import PROMPTS, make_trainer, prompt_data, remax_module, save_policy
from helpers.waiting import LONG, wait_until
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from remax_lightning.modules import LossConfig
from remax_lightning.strategies import latest_checkpoint
from remax_lightning.training.resume import random_state, set_random_state

STEPS = 4
RARELY = {"every_n_epochs": 9}


class Tell(Callback):
    """Keeps the losses of the steps, and sends this process a signal at a point of the run, named by its hook."""

    def __init__(self, hook: str = "", step: int = 0, batch: int = 0, signum: int = signal.SIGTERM) -> None:
        self.losses: list[float] = []
        self.validated = 0
        self.due = (hook, step, batch)
        self.signum = signum

    def told(self, trainer: Trainer, hook: str, batch: int) -> None:
        if (hook, trainer.global_step, batch) == self.due and not trainer.sanity_checking:
            os.kill(os.getpid(), self.signum)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.told(trainer, "train", batch.micro_batch_index)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs["closes_step"]:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.told(trainer, "validation", batch_idx)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated += 1


class Runs:
    """Starts runs of four steps, of two micro-batches each, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy = save_policy(folder / "policy")
        self.reference = save_policy(folder / "reference", noise=0.02)

    def start(
        self, tell: Tell, checkpoint: Path | None = None, saves: dict[str, Any] | None = RARELY, **options: Any
    ) -> Trainer:
        module = remax_module(self.policy, self.reference, loss=LossConfig("clipped"))
        data = prompt_data(self.folder, self.policy, PROMPTS, batch_size=4, micro_batch_size=1)
        callbacks: list[Callback] = [tell]
        if saves is not None:
            callbacks.append(ModelCheckpoint(self.folder / "checkpoints", "{step}", **saves))
        defaults = {"max_steps": STEPS, "accumulate_grad_batches": 2, "enable_checkpointing": saves is not None}
        trainer = make_trainer(self.folder, callbacks, **defaults | options)
        trainer.fit(module, data, ckpt_path=checkpoint)
        return trainer

    def saved(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    tell = Tell()
    Runs(tmp_path_factory.mktemp("whole")).start(tell)
    assert len(set(tell.losses)) == STEPS
    return tell.losses


def test_every_generator_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Rewards and data of a user's own may draw from any of them; NumPy's normal numbers are made in pairs."""

    def drawn() -> list[float]:
        return [*torch.rand(2).tolist(), random.random(), np.random.rand(), *np.random.standard_normal(3)]

    cpu, before = torch.device("cpu"), random_state(torch.device("cpu"))
    try:
        np.random.standard_normal()
        torch.save(random_state(cpu), tmp_path / "state.pt")
        expected = drawn()
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        set_random_state(state, cpu)
        assert drawn() == expected
        del state["numpy"]  # as older checkpoints
        set_random_state(state, cpu)
        assert drawn()[:3] == expected[:3]
    finally:
        set_random_state(before, cpu)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 3], ids=["before a step", "within a step"])
def test_the_step_is_ended_saved_and_repeated(batch: int, whole: list[float], tmp_path: Path) -> None:
    runs, told, rest = Runs(tmp_path), Tell("train", 1, batch), Tell()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        runs.start(told)
    assert told.losses == whole[:2]
    assert runs.saved() == ["last.ckpt"]
    assert signal.getsignal(signal.SIGTERM) == handler
    runs.start(rest, tmp_path / "checkpoints" / "last.ckpt")
    assert rest.losses == whole[2:]


@pytest.mark.slow
def test_a_checkpoint_of_the_step_is_not_written_twice(whole: list[float], tmp_path: Path) -> None:
    runs, told = Runs(tmp_path), Tell("train", 1, 2)
    with pytest.raises(SIGTERMException):
        runs.start(told, saves={"every_n_train_steps": 1})
    assert runs.saved() == ["step=2.ckpt"]


@pytest.mark.slow
def test_a_validation_is_left_and_the_steps_before_it_are_kept(whole: list[float], tmp_path: Path) -> None:
    validates = {"limit_val_batches": 1.0, "val_check_interval": 2}
    runs, told, rest = Runs(tmp_path), Tell("validation", 2, 0), Tell()
    with pytest.raises(SIGTERMException):
        runs.start(told, **validates)
    assert (told.losses, told.validated) == (whole[:2], 1)
    runs.start(rest, tmp_path / "checkpoints" / "last.ckpt", **validates)
    assert rest.losses == whole[2:]
    assert rest.validated == 2


@pytest.mark.slow
def test_a_run_that_is_done_with_the_step_ends_as_ever(whole: list[float], tmp_path: Path) -> None:
    runs, told = Runs(tmp_path), Tell("train", STEPS - 1, 2)
    trainer = runs.start(told)
    assert trainer.state.finished
    assert told.losses == whole
    assert runs.saved() == ["last.ckpt"]


@pytest.mark.slow
def test_a_run_counted_in_epochs_that_is_done_ends_as_ever(tmp_path: Path) -> None:
    told = Tell("train", 2 * STEPS - 1, 2)
    trainer = Runs(tmp_path).start(told, max_steps=-1, max_epochs=2)
    assert trainer.state.finished
    assert len(told.losses) == 2 * STEPS


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("saves", [None, {"save_weights_only": True}])
def test_it_says_so_where_nothing_can_be_saved(saves: dict[str, Any] | None, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="saves nothing"), pytest.raises(SIGTERMException):
        Runs(tmp_path).start(Tell("train", 0, 0), saves=saves)


@pytest.mark.slow
def test_an_early_stop_waits_for_the_end_of_the_step(whole: list[float], tmp_path: Path) -> None:
    """A stop in the middle of a step would throw its gradients away, on this rank alone."""

    class Stop(Tell):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            trainer.should_stop = trainer.global_step == 1 and batch.micro_batch_index == 2

    stop = Stop()
    trainer = Runs(tmp_path).start(stop)
    assert trainer.state.finished
    assert stop.losses == whole[:2]


@pytest.mark.slow
def test_slurms_signal_requeues_the_job_and_lightning_finds_the_checkpoint(
    whole: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    scontrol = programs / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    for name, value in {"JOB_ID": "17", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "training")
    runs, told, rest = Runs(tmp_path), Tell("train", 1, 3, signal.SIGUSR1), Tell()
    with pytest.raises(SIGTERMException):
        runs.start(told, plugins=[SLURMEnvironment()])
    assert told.losses == whole[:2]
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert latest_checkpoint([], tmp_path) == tmp_path / "hpc_ckpt_1.ckpt"
    runs.start(rest, None, plugins=[SLURMEnvironment()])  # as the job is run again: with the same command
    assert rest.losses == whole[2:]


@pytest.mark.slow(0.3)
def test_outside_of_training_it_ends_at_once(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    module, data = remax_module(runs.policy, runs.reference), prompt_data(tmp_path, runs.policy)
    with pytest.raises(SystemExit) as ended:
        make_trainer(tmp_path, [Tell("validation", 0, 0)], limit_val_batches=1.0).validate(module, data)
    assert ended.value.code == 143


HANGS = """
import ctypes, sys, time
from pathlib import Path
from helpers.training import make_trainer, prompt_data, remax_module
from helpers.training import CharacterReward

folder, policy, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

class Hangs(CharacterReward):
    def score(self, *arguments):
        (folder / "hangs").touch()
        while how == "Python":
            try:
                time.sleep(0.01)
            except BaseException:
                pass
        mutex, library = ctypes.create_string_buffer(128), ctypes.CDLL(None)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)  # waits for itself, and no handler of Python's runs
        return super().score(*arguments)

module = remax_module(policy, reward=Hangs())
trainer = make_trainer(folder, limit_val_batches=1.0)
getattr(trainer, sys.argv[4])(module, prompt_data(folder, policy))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of Linux stands for a library that hangs")
@pytest.mark.parametrize(("how", "stage"), [("Python", "fit"), ("a library", "fit"), ("a library", "validate")])
def test_a_second_sigterm_ends_a_reward_that_hangs(how: str, stage: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start_code(HANGS, str(tmp_path), save_policy(tmp_path / "policy"), how, stage, log=log)
    try:
        while not (tmp_path / "hangs").exists() and process.is_alive():
            time.sleep(0.05)
        process.terminate()
        time.sleep(1)
        assert process.is_alive()  # the first one waits for the end of the step
        process.terminate()
        process.join(LONG)
    finally:
        process.kill()
    assert process.exitcode == 143
    assert "SIGTERM came a second time" in log.read_text()


CLOSED = """
import os, sys, time
from pathlib import Path
from helpers.training import CharacterReward, make_trainer, prompt_data, remax_module
from lightning.pytorch.callbacks import ModelCheckpoint

folder, policy = Path(sys.argv[1]), sys.argv[2]

class Talks(CharacterReward):
    def score(self, *arguments):
        (folder / "begun").touch()
        while os.readlink("/proc/self/fd/1") != os.devnull:  # until the signal is handled
            time.sleep(0.05)
        print("a word", flush=True)
        return super().score(*arguments)

module = remax_module(policy, reward=Talks())
saves = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_epochs=9)
options = {"max_steps": 99, "enable_checkpointing": True, "enable_progress_bar": True, "limit_val_batches": 0}
make_trainer(folder, [saves], **options).fit(module, prompt_data(folder, policy))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a terminal of Linux")
def test_a_run_whose_terminal_is_closed_saves_and_ends(tmp_path: Path) -> None:
    """As the end of an SSH connection does; what the run writes to the terminal then fails."""
    import fcntl
    import pty
    import termios

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under `nohup`
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    ours, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED, str(tmp_path), save_policy(tmp_path / "policy")],
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
        preexec_fn=take_terminal,
    )  # fmt: skip
    try:
        os.close(terminal)
        while not (tmp_path / "begun").exists() and process.poll() is None:
            if select.select([ours], [], [], 0.05)[0]:
                os.read(ours, 1 << 16)  # a terminal that nobody reads from stops who writes
        os.close(ours)
        process.wait(LONG)
    finally:
        process.kill()
    assert process.returncode == 0  # Lightning's `SIGTERMException`, not -1; a command says 143
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.ckpt")] == ["last.ckpt"]


@pytest.mark.slow
def test_a_process_that_a_reward_forks_ends_by_sigterm_alone_and_the_run_goes_on(tmp_path: Path) -> None:
    """As `multiprocessing.Pool` ends its workers, which the run needs to the end; the run has not got the signal."""
    forking = multiprocessing.get_context("fork")
    is_up, codes = forking.Event(), []

    def wait_for_a_signal() -> None:
        is_up.set()
        time.sleep(LONG)

    class Fork(Tell):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not codes:
                child = forking.Process(target=wait_for_a_signal)
                child.start()
                is_up.wait(LONG)
                os.kill(cast(int, child.pid), signal.SIGHUP)  # of a terminal, which the whole process group gets
                child.terminate()
                child.join(10)
                codes.append(child.exitcode)
                child.kill()

    trainer = Runs(tmp_path).start(Fork())
    assert codes == [-signal.SIGTERM]
    assert trainer.global_step == STEPS


@pytest.mark.slow
def test_handlers_are_as_before_after_a_run(tmp_path: Path) -> None:
    before, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    Runs(tmp_path).start(Tell(), max_steps=1)
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1
    wait_until(lambda: threading.active_count() <= threads)
    assert "second-sigterm" not in {thread.name for thread in threading.enumerate()}
