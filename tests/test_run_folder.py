"""Every run has a folder of its own, under every logger and without one; two live runs never share one unnoticed."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.forks import start_code
from helpers.training import make_trainer, prompt_data, remax_module, save_policy
from helpers.waiting import wait_until
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger

from remax_lightning import run_folder as module
from remax_lightning.callbacks import ExportPolicy, PredictionWriter, SampleDump
from remax_lightning.errors import UserError
from remax_lightning.run_folder import FolderLock, earlier_checkpoint_folders, run_folder


class TrackingLogger(Logger):
    """What Lightning sees of a tracking service, such as Weights & Biases: a folder, a project, the id of a run."""

    def __init__(self, save_dir: Path | str | None, project: str, version: Any) -> None:
        super().__init__()
        self._save_dir, self._project, self._version_of_service = save_dir, project, version

    @property
    def save_dir(self) -> Any:
        return self._save_dir

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> Any:
        return self._version_of_service

    def log_metrics(self, metrics: Any, step: Any = None) -> None: ...

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


class StoreLogger(MLFlowLogger):
    """MLflow's logger without MLflow: the store on this machine, the number of the experiment, the id of the run."""

    def __init__(self, store: Path, version: str) -> None:
        Logger.__init__(self)
        self._store, self._run_id, self._experiment_name, self._checkpoint_callback = store, version, "helpful", None
        self._tracking_uri = f"file:{store}"
        self._mlflow_client = SimpleNamespace(get_experiment_by_name=lambda _: SimpleNamespace(experiment_id="42"))

    save_dir = property(lambda self: str(self._store))  # type: ignore[assignment]
    name = property(lambda self: "42")  # type: ignore[assignment]
    version = property(lambda self: self._run_id)  # type: ignore[assignment]
    experiment = property(lambda self: SimpleNamespace(log_table=lambda *_, **__: None))  # type: ignore[assignment]

    def log_metrics(self, metrics: Any, step: Any = None) -> None: ...

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def finalize(self, *_: Any) -> None: ...

    def after_save_checkpoint(self, *_: Any) -> None: ...


LOGGERS = {
    "none": lambda folder, run: False,
    "tensorboard": lambda folder, run: TensorBoardLogger(folder / "logs", "mine"),
    "csv": lambda folder, run: CSVLogger(folder / "logs", "mine"),
    "tracking": lambda folder, run: TrackingLogger(folder / "logs", "mine", f"id{run}"),
    "tracking without a folder": lambda folder, run: TrackingLogger(None, "mine", f"id{run}"),
    "remote": lambda folder, run: TrackingLogger("s3://bucket/logs", "mine", f"id{run}"),
    "without a version": lambda folder, run: TrackingLogger(folder / "logs", "mine", None),
    "store": lambda folder, run: StoreLogger(folder / "store", f"id{run}"),
}
EXPECTED = {
    "none": ("version_0", "version_1"),
    "tensorboard": ("logs/mine/version_0", "logs/mine/version_1"),
    "csv": ("logs/mine/version_0", "logs/mine/version_1"),
    "tracking": ("logs/mine/id0", "logs/mine/id1"),
    "tracking without a folder": ("mine/id0", "mine/id1"),
    "remote": ("mine/id0", "mine/id1"),
    "without a version": ("logs/mine/version_0", "logs/mine/version_1"),
    "store": ("helpful/id0", "helpful/id1"),
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def fit(folder: Path, policy: str, logger: Any, callbacks: Any = None, **options: Any) -> Any:
    """A step with the callbacks that write files; returns the trainer."""
    callbacks = [ExportPolicy(best=False), SampleDump(every_n_steps=1)] if callbacks is None else callbacks
    trainer = make_trainer(folder, callbacks, logger=logger, enable_checkpointing=True, **options)
    trainer.fit(remax_module(policy), prompt_data(folder, policy))
    return trainer


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGGERS)
def test_two_runs_under_one_logger_keep_all_that_they_wrote(name: str, policy: str, tmp_path: Path) -> None:
    first, second = (tmp_path / path for path in EXPECTED[name])
    assert run_folder(fit(tmp_path, policy, LOGGERS[name](tmp_path, 0))) == first
    before = files(first)
    written = {path for path in before if not path.startswith(("events", "metrics.csv", "hparams"))}
    assert {"policy/last/model.safetensors", "samples/train.jsonl"} < written
    assert [path for path in written if path.startswith("checkpoints/")]
    assert not list(tmp_path.rglob(module.LOCK))
    later = fit(tmp_path, policy, LOGGERS[name](tmp_path, 1))
    assert run_folder(later) == second
    assert files(first) == before
    assert {path for path in files(second) if not path.startswith("events")} >= written
    # ---- A run after them finds the checkpoints of both, and nothing lies outside their folders ----
    third = make_trainer(tmp_path, logger=LOGGERS[name](tmp_path, 2), enable_checkpointing=True)
    folders = {path.resolve() for path in earlier_checkpoint_folders(third) if path.exists()}
    assert folders == {(run / "checkpoints").resolve() for run in (first, second)}
    assert {path.parent.parent for path in tmp_path.rglob("*.ckpt")} == {first, second}


def test_checkpoints_of_earlier_versions_are_found(tmp_path: Path) -> None:
    for path in ("checkpoints", "store/42/old/checkpoints", "logs/mine/old/checkpoints", "elsewhere"):
        (tmp_path / path).mkdir(parents=True)

    def found(logger: Any, *callbacks: Any) -> set[str]:
        trainer = make_trainer(tmp_path, callbacks, logger=logger, enable_checkpointing=True)
        return {str(path.relative_to(tmp_path)) for path in earlier_checkpoint_folders(trainer) if path.exists()}

    assert found(False) == {"checkpoints"}
    assert found(StoreLogger(tmp_path / "store", "new")) == {"store/42/old/checkpoints"}
    assert found(TrackingLogger(tmp_path / "logs", "mine", "new")) == {"logs/mine/old/checkpoints"}
    assert found(False, ModelCheckpoint(tmp_path / "elsewhere")) == {"elsewhere"}


@pytest.mark.slow(0.3)
def test_a_dirpath_of_the_user_stays(policy: str, tmp_path: Path) -> None:
    fit(tmp_path, policy, False, [ModelCheckpoint(tmp_path / "chosen")])
    assert [path.parent.name for path in tmp_path.rglob("*.ckpt")] == ["chosen"]


@pytest.mark.slow
def test_a_trainer_keeps_its_folder_from_stage_to_stage(policy: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [PredictionWriter()], enable_checkpointing=True, limit_val_batches=1)
    model, data = remax_module(policy), prompt_data(tmp_path, policy)
    trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    trainer.predict(model, data)
    assert (tmp_path / "version_0" / "predictions.jsonl").exists()
    assert [path.parent.parent for path in tmp_path.rglob("*.ckpt")] == [tmp_path / "version_0"]
    assert not (tmp_path / "version_1").exists()


@pytest.mark.slow(0.3)
def test_a_dry_run_writes_nothing(policy: str, tmp_path: Path) -> None:
    data = prompt_data(tmp_path, policy)
    before = sorted(tmp_path.iterdir())
    trainer = make_trainer(tmp_path, [ExportPolicy(best=False), SampleDump(1)], fast_dev_run=True)
    trainer.fit(remax_module(policy), data)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger, None])
def test_runs_that_start_at_once_get_different_folders(kind: Any, tmp_path: Path) -> None:
    def start(_: int) -> Path:
        trainer = make_trainer(tmp_path, logger=kind(tmp_path, "mine") if kind else False)
        module.reserve_versions(trainer.loggers)
        return run_folder(trainer)

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(start, range(16)))
    assert len(set(folders)) == 16
    assert all(folder.is_dir() for folder in folders)


def test_a_folder_that_cannot_be_created_is_named(policy: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"(?s)cannot create the folder of the run.*file.*trainer\.default_root_dir"):
        run_folder(make_trainer(tmp_path / "file"))


# ---- Locks ----

HOLD = """
import sys, time
from pathlib import Path
from remax_lightning.run_folder import FolderLock
lock = FolderLock(Path(sys.argv[1]), "export.folder")
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_live_run_is_refused_and_a_killed_one_taken_over(policy: str, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    log = tmp_path / "holder"
    holder = start_code(HOLD, str(folder), log=log)
    try:
        assert wait_until(lambda: log.exists() and log.read_text() == "held\n")
        for callbacks, key in (
            ([ExportPolicy(folder=str(folder), best=False)], "export.folder"),
            ([SampleDump(folder=str(folder))], "samples.folder"),
            ([ModelCheckpoint(folder)], "ModelCheckpoint.dirpath"),
        ):
            with pytest.raises(UserError, match=rf"{key} must be .*policy.*process {holder.pid} on "):
                fit(tmp_path, policy, False, callbacks)
        with pytest.raises(UserError, match=rf"folder of the run must be .*process {holder.pid} on "):
            fit(tmp_path, policy, TrackingLogger(tmp_path, "", "policy"))
    finally:
        holder.kill()
        holder.join()
    assert (folder / module.LOCK).exists()
    fit(tmp_path, policy, False, [ExportPolicy(folder=str(folder), best=False)])
    assert (folder / "last" / "model.safetensors").exists()
    assert not (folder / module.LOCK).exists()


def test_another_host_is_warned_about(tmp_path: Path) -> None:
    (tmp_path / module.LOCK).write_text("elsewhere 1\n")
    with pytest.warns(UserWarning, match=r"process 1 on elsewhere writes to .*overwrite each other's files"):
        lock = FolderLock(tmp_path, "export.folder")
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "no lock at all\n", "\0\0\0"])
def test_what_is_no_lock_is_taken_over(content: str, tmp_path: Path) -> None:
    (tmp_path / module.LOCK).write_text(content)
    FolderLock(tmp_path, "export.folder").release()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_of_the_file_system_the_process_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fcntl", None)
    host = os.uname().nodename
    (tmp_path / module.LOCK).write_text(f"{host} {os.getppid()}\n")
    with pytest.raises(UserError, match=f"process {os.getppid()} on {host}"):
        FolderLock(tmp_path, "export.folder")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / module.LOCK).write_text(f"{host} {ended.pid}\n")
    FolderLock(tmp_path, "export.folder").release()


def test_a_failed_run_gives_its_folders_back(policy: str, tmp_path: Path) -> None:
    class Failing(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("of a user")

    folder = tmp_path / "policy"
    with pytest.raises(RuntimeError, match="of a user"):
        fit(tmp_path, policy, False, [ExportPolicy(folder=str(folder)), Failing()])
    assert not list(tmp_path.rglob(module.LOCK))
