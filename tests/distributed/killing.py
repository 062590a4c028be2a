"""Two processes under the command, a callback that ends one of them, and what was left of the run."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from helpers.cli import changed, small_config, write_config
from helpers.forks import warm_context
from lightning.pytorch import Callback

from benchmarks.chaos import warm
from benchmarks.chaos.runs import PROMPTS, STEPS
from remax_lightning.shipped_configs import config_folder

TESTS = Path(__file__).parents[1]
PLACES = ("rollout", "between", "saving", "saved")


class Hit(Callback):
    """Sends one rank a signal at a place of the step after `step` others, and notes the time.

    Args:
        folder: where the time is written down.
        place: `rollout`: in its middle; `between`: before its batch; `validation`; `saving`: with one of the
            checkpoint's files half written; `saved`: as soon as the checkpoint is there.
        rank: whose process.
        step: optimizer steps done before.
        signum: by name; SIGKILL is what a machine's end is to a process.
    """

    def __init__(self, folder: str, place: str, rank: int, step: int = 1, signum: str = "SIGKILL") -> None:
        self.folder, self.place, self.rank, self.step = Path(folder), place, rank, step
        self.signum = signal.Signals[signum]

    def due(self, trainer: Any, place: str, after: int = 0) -> bool:
        """Whether this is the place; `after` steps more are done than before the step."""
        now = (place, trainer.global_rank, trainer.global_step - after)
        return now == (self.place, self.rank, self.step)

    def hit(self) -> None:
        (self.folder / "hit").write_text(repr(time.time()))
        os.kill(os.getpid(), self.signum)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        worker, save, write = pl_module.worker, trainer.save_checkpoint, torch.save
        generate = worker.generate_responses

        def hit_in_rollout(*args: Any, **options: Any) -> Any:
            if self.due(trainer, "rollout") and trainer.training:
                self.hit()
            return generate(*args, **options)

        def hit_after_save(*args: Any, **options: Any) -> None:
            save(*args, **options)
            if self.due(trainer, "saved", after=1):
                self.hit()

        def hit_in_file(obj: Any, file: Any, *args: Any, **options: Any) -> None:
            # Into memory tensors go that are sent to other ranks.
            if self.due(trainer, "saving", after=1) and not isinstance(file, io.BytesIO):
                whole = io.BytesIO()
                write(obj, whole)
                half = whole.getvalue()[: len(whole.getvalue()) // 2]
                Path(file).write_bytes(half) if isinstance(file, str | Path) else file.write(half)
                self.hit()
            write(obj, file, *args, **options)

        worker.generate_responses, trainer.save_checkpoint, torch.save = hit_in_rollout, hit_after_save, hit_in_file

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.due(trainer, "between"):
            self.hit()

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if self.due(trainer, "validation") and not trainer.sanity_checking:
            self.hit()


class StopAlone(Callback):
    """Stops the run on one rank only, as a callback does that looks at its own figures."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop |= trainer.global_rank == 1 and trainer.global_step == 2


class FailAlone(Callback):
    """Fails on rank 1 only, where the other rank finds it out in its next collective."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            raise OSError(28, "No space left on device", "/scratch/rank1")


class StopCheck(NamedTuple):
    """How a run ended: exit code, what it printed, seconds from the hit to the end of its last process."""

    code: int | None
    out: str
    seconds: float | None


def write_run(
    folder: Path, policy: str, strategy: str, callbacks: list[dict[str, Any]], save_every: int = 1, **values: Any
) -> list[str]:
    """Write the configuration of a run of four steps, each with a rollout and a checkpoint; return its arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    every = {"every_n_train_steps": save_every, "filename": "{step}"}  # keeps the last one only, as by default
    saves = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": every}
    losses = {"class_path": "benchmarks.chaos.runs.WriteLosses", "init_args": {"folder": str(folder)}}
    config = small_config(folder, policy, rows=PROMPTS)
    trainer = {"devices": 2, "max_steps": STEPS, "callbacks": [losses, saves, *callbacks]}
    config = changed(config, data__batch_size=4, export={"best": False, "last": False})
    config["trainer"] |= trainer
    config = changed(config, **values)
    overlay = yaml.safe_load((config_folder() / "strategies" / f"{strategy}.yaml").read_text())
    config["trainer"] |= overlay["trainer"]
    if strategy == "zero3":  # spread even what is small
        spread = {"stage": 3, "stage3_param_persistence_threshold": 0}
        init_args = {"config": {"zero_allow_untested_optimizer": True, "zero_optimization": spread}}
        config["trainer"]["strategy"]["init_args"] = init_args
    return ["fit", "--config", write_config(folder / "run.yaml", config)]


def hit(folder: Path, place: str, rank: int, **options: Any) -> dict[str, Any]:
    """The entry of `trainer.callbacks` that hits a rank."""
    arguments = {"folder": str(folder), "place": place, "rank": rank, **options}
    return {"class_path": "distributed.killing.Hit", "init_args": arguments}


def remax(folder: Path, *arguments: str, timeout: float = 600) -> StopCheck:
    """Run the command as a shell does, in a session of its own, and wait for all processes of that."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    (folder / "hit").unlink(missing_ok=True)
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, str(TESTS / "command_script.py"), *arguments]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout)
            wait_for_session(process.pid, timeout=120)
            ended = time.time()
        finally:
            end_session(process)
        log.seek(0)
        out = log.read().decode(errors="replace")
    return StopCheck(process.returncode, out, seconds_since_hit(folder, ended))


def seconds_since_hit(folder: Path, ended: float) -> float | None:
    """Seconds from the hit to the end of the run; None if nothing was hit."""
    return ended - float((folder / "hit").read_text()) if (folder / "hit").exists() else None


class WarmCommand:
    """A process with all that a run imports, whose forks become the command and its second rank.

    Two starts of Python take 15 seconds of a run of 3. Only the imports are left out: each rank is a process of its
    own, which Lightning starts, watches and kills.
    """

    def __init__(self) -> None:
        context = warm_context()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=become_commands, args=(theirs,), name="warm command")
        self.process.start()
        theirs.close()

    def __call__(
        self, folder: Path, *arguments: str, during: Callable[[int], None] | None = None, timeout: float = 600
    ) -> StopCheck:
        """Run `remax` with these arguments in `folder`; `during` is called meanwhile, with the id of its process."""
        for name in ("hit", "pid"):
            (folder / name).unlink(missing_ok=True)
        self.connection.send((folder, arguments, timeout))
        if during is not None:
            while not (folder / "pid").exists() and not self.connection.poll():
                time.sleep(0.02)
            during(int((folder / "pid").read_text()))
        ended, at = self.connection.recv()
        return StopCheck(ended.code, ended.text, seconds_since_hit(folder, at))

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join()


def become_commands(connection: Connection) -> None:
    """Run the commands that are asked for, until the other end is closed."""
    warm.warm_up()
    while True:
        try:
            folder, arguments, timeout = connection.recv()
        except EOFError:
            return
        prepare = partial(write_pid, folder)
        ended = warm.command(folder, *arguments, deadline=timeout, ranks=2, prepare=prepare)
        connection.send((ended, time.time()))


def write_pid(folder: Path) -> None:
    """Tell the test which process the command is."""
    new = folder / "pid.new"
    new.write_text(str(os.getpid()))
    new.rename(folder / "pid")


def wait_for_session(group: int, timeout: float) -> None:
    """Wait until no process of the session is left."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a process of the run is still there")


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
