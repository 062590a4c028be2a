"""The folder of a run: one for every run, under every logger and without one, and locks where two live runs would meet.

Whatever a run writes goes there: configuration, samples, checkpoints, exported policies, evaluations, predictions.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from remax_lightning.distributed import broadcast
from remax_lightning.errors import RankUserError, UserError
from remax_lightning.files import RECORD, recorded_versions, tolerate_disk_errors, write_record
from remax_lightning.loggers.adapters import adapt

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CHECKPOINTS = "checkpoints"
LOCK = ".lock"
RUN_FOLDER = "run_folder"
"""The key under which a checkpoint names the folder of its run."""
_NUMBERED = re.compile(r"version_(\d+)")
_folders: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()
_continued: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()


# ---- Which folder ----


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the run; call it on every rank, at the earliest in `setup`.

    It is `save_dir/name/version` of the first logger, as for Lightning's checkpoints. Without a logger, or where that
    has no version, it is a new folder `version_N`. A `fast_dev_run` writes nothing, and gets no folder of its own.

    Raises:
        UserError: if the folder cannot be created.
    """
    if cast("Any", trainer).fast_dev_run:
        return Path(trainer.default_root_dir)
    if trainer not in _folders:
        # ---- Rank 0 chooses and creates the folder; the others get it, or the error ----
        folder: Path | None = None
        problem = None
        if trainer.is_global_zero:  # other ranks do not know the version of the logger
            try:
                folder = _continued.get(trainer) or _logger_folder(trainer) or _create_numbered(_parent_folder(trainer))
            except OSError as error:
                problem = f"cannot create the folder of the run ({error}); set trainer.default_root_dir, or save_dir"
                problem += " of trainer.logger, to a folder that can be written to"
        folder, problem = broadcast(trainer.strategy, (folder, problem))
        if folder is None:
            raise _error_on_all_ranks(trainer, str(problem))
        _folders[trainer] = folder
    return _folders[trainer]


def known_run_folder(trainer: Trainer) -> Path | None:
    """Return the folder of the run as soon as `run_folder` has chosen it, on any rank alone; None before."""
    return _folders.get(trainer)


def earlier_checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Return the folders in which this run and earlier ones with the same logger or root have their checkpoints.

    Also those in which versions 0.1 and 0.2 wrote. A `dirpath` of `ModelCheckpoint` counts instead.
    """
    folders: list[Path] = []
    for callback in trainer.checkpoint_callbacks:
        dirpath = getattr(callback, "dirpath", None)
        if dirpath is not None:
            folders.append(Path(dirpath))
            continue
        parent = _parent_folder(trainer)
        folders += [*parent.glob(f"*/{CHECKPOINTS}"), parent / CHECKPOINTS]
        if trainer.loggers:
            runs = adapt(trainer.loggers[0]).lightning_folder(Path(trainer.default_root_dir))
            folders += [] if runs is None else runs.glob(f"*/{CHECKPOINTS}")
    return list(dict.fromkeys(folders))


def _parent_folder(trainer: Trainer) -> Path:
    """Return the folder that holds the folders of all runs with the same logger."""
    root = Path(trainer.default_root_dir)
    return adapt(trainer.loggers[0]).runs_folder(root) if trainer.loggers else root


def _logger_folder(trainer: Trainer) -> Path | None:
    """Return the folder of this run by its logger; None if there is no logger, or it has no version."""
    if not trainer.loggers:
        return None
    logger = trainer.loggers[0]
    # ---- The logger's own folder, or one by its version ----
    if adapt(logger).has_folder and "://" not in str(logger.log_dir):
        return Path(cast(str, logger.log_dir))
    version = logger.version
    if version is None or version == "":
        return None
    return _parent_folder(trainer) / (version if isinstance(version, str) else f"version_{version}")


def _create_numbered(parent: Path) -> Path:
    """Create the next folder `version_N`; two runs that start at once get different ones, because mkdir is atomic."""
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(match[1]) for path in parent.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
    number = max(numbers, default=-1) + 1
    while True:
        folder = parent / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def reserve_versions(loggers: Iterable[Logger]) -> None:
    """Prepare loggers, and create the folders of those that choose the next free number; call this before they write.

    They look which numbers are taken and create the folder later, so two runs that start at once would share one.
    """
    for logger in loggers:
        adapt(logger).prepare()
        if not adapt(logger).has_folder or cast("Any", logger)._version is not None or "://" in str(logger.save_dir):
            continue
        while True:
            folder = Path(cast(str, logger.log_dir))
            # TensorBoard's logger adds it to the version's folder, which is the one to create
            if sub_dir := getattr(logger, "sub_dir", None):
                folder = folder.parents[len(Path(sub_dir).parts) - 1]
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir()
            except FileExistsError:
                cast("Any", logger)._version = None  # taken meanwhile: ask for the next one
            except OSError:
                break  # the logger says so when it writes
            else:
                break


# ---- Going on with an earlier run ----


def folder_of_checkpoint(checkpoint: Path, recorded: str = "") -> Path | None:
    """Return the folder of the run that saved a checkpoint; None where that cannot be told.

    Args:
        checkpoint: the checkpoint.
        recorded: the folder that the checkpoint itself names, for those that lie elsewhere.
    """
    if checkpoint.parent.name == CHECKPOINTS:
        return checkpoint.parent.parent
    return Path(recorded) if recorded and (Path(recorded) / RECORD).is_file() else None


def continue_run(trainer: Trainer, folder: Path, step: int) -> str | None:
    """Have a fit go on in the folder of an earlier run, and its loggers with their earlier runs; call it before fit.

    Args:
        trainer: a trainer that has not started.
        folder: the folder of the earlier run.
        step: optimizer steps of the checkpoint; what was logged after them is logged again.

    Returns:
        Why it is not: this run belongs to another experiment, or the user has set its version. None if it goes on.

    Raises:
        UserError: if the earlier run is live.
    """
    loggers = [adapt(logger) for logger in trainer.loggers]
    if folder.absolute().parent.resolve() != _parent_folder(trainer).absolute().resolve():
        return f"{folder} is not of the same logger, name and save_dir"
    chosen = loggers[0].chosen_version if loggers else None
    if chosen not in (None, folder.name):
        return f"the logger has the version {chosen}"
    if trainer.is_global_zero:
        FolderLock(folder, "the folder of the run").release()  # before anything there is changed
    versions = recorded_versions(folder)
    for number, adapter in enumerate(loggers):
        name = type(adapter.logger).__name__
        version = versions.get((number, name)) or (folder.name if number == 0 else None)
        if version is not None and adapter.chosen_version in (None, version):
            adapter.continue_run(version, step)
    _continued[trainer] = folder
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    return None


def _write_record(trainer: Trainer, folder: Path) -> None:
    """Write which loggers a run has, and by which version or id each of them knows it."""
    entries = []
    for logger in trainer.loggers:
        adapter = adapt(logger)
        entry = {"class": type(logger).__name__, "version": adapter.chosen_version, "files": adapter.files()}
        entries.append(entry)
    with tolerate_disk_errors(folder / RECORD, set(), "A resumed run may not know the runs of its loggers."):
        write_record(folder, entries)


# ---- Who writes there ----


class FolderLock:
    """Keeps a second live run from writing to a folder, by a file `.lock` with host and process id.

    The operating system gives the lock back when the process ends, however that happens, so a killed run never blocks
    the next one. On file systems without locks the process id decides, on this host only.

    Args:
        folder: the folder to lock; it is created.
        key: the option that names the folder, for messages.

    Raises:
        UserError: if a live run of this host has the lock.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / LOCK
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = self._open(key)
        host, process = self._read()
        if host not in ("", socket.gethostname()):
            rank_zero_warn(
                f"{key}: process {process} on {host} writes to {folder}, or ended without removing {self.path}. If it"
                " is still running, the two runs will overwrite each other's files."
            )
        elif host and process != os.getpid():
            rank_zero_info(f"Took {folder} over from process {process}, which has ended.")
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Remove the lock."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self, key: str) -> int:
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                is_held = not self._lock()
                # The run before may remove the file between opening and locking: then the lock is on a removed file.
                opened = os.fstat(self._descriptor)
                is_current = self.path.exists() and os.path.samestat(opened, self.path.stat())
                host, process = self._read()
            except BaseException:
                os.close(self._descriptor)
                raise
            if is_current and not is_held:
                return self._descriptor
            os.close(self._descriptor)  # the run before has just removed its lock, or is live
            if is_held:
                raise UserError(
                    f"{key} must be a folder that no other run writes to, got {str(self.path.parent)!r}, to which"
                    f" process {process or '?'} on {host or 'this host'} writes; wait until it has ended, or give this"
                    " run another folder, name or version"
                )

    def _lock(self) -> bool:
        """Take the lock if no other process has it; return whether this process has it now."""
        if fcntl is not None:
            try:
                # A lock of POSIX: unlike one of `flock`, it does not survive in the workers of a data loader.
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
            else:
                return True
        host, process = self._read()
        return host != socket.gethostname() or process == os.getpid() or not _is_alive(process)

    def _read(self) -> tuple[str, int]:
        """Return host and process in the file; an empty host if it names none."""
        # "gpu-node-3 12345\n"
        words = os.pread(self._descriptor, 1000, 0).decode(errors="replace").split()
        return (words[0], int(words[1])) if len(words) == 2 and words[1].isdecimal() else ("", 0)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


class RunFolder(Callback):
    """Gives checkpoints their place in the folder of the run, and locks the folders that a fit writes to.

    The modules of this package add it to every run. A callback with an option `folder` that a whole run writes to has
    the key of that option as `folder_key`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._locks: list[FolderLock] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder before any other callback writes; Lightning sets checkpoint callbacks up last.

        Raises:
            UserError: if the folder cannot be created.
        """
        if cast("Any", trainer).fast_dev_run:
            return
        folder = run_folder(trainer)
        # Lightning's rule is that of the run's folder, except without a logger and for stores.
        if not (trainer.loggers and adapt(trainer.loggers[0]).has_folder):
            for callback in _model_checkpoints(trainer):
                callback.dirpath = callback.dirpath or str(folder / CHECKPOINTS)

    def lock(self, trainer: Trainer) -> None:
        """Lock the run's folder and the folders that the user chose; call this on every rank after `setup`.

        Not in `setup`, because Lightning looks there whether folders of checkpoints are empty.

        Raises:
            UserError: if a live run of this host writes there.
        """
        if cast("Any", trainer).fast_dev_run:
            return
        folder = run_folder(trainer)
        # ---- Folders that the user chose, which may lie outside of the run's ----
        chosen = {"ModelCheckpoint.dirpath": [item.dirpath for item in _model_checkpoints(trainer)]}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if key := getattr(callback, "folder_key", None):
                chosen[key] = [callback.folder]
        problem = None
        if trainer.is_global_zero:
            try:
                self._lock(folder, chosen)
                _write_record(trainer, folder)
            except UserError as error:
                self._release()
                problem = str(error)
        if problem := broadcast(trainer.strategy, problem):
            raise _error_on_all_ranks(trainer, problem)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the locks."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the locks: the run has ended."""
        self._release()

    def _lock(self, folder: Path, chosen: dict[str, list[Any]]) -> None:
        folder = folder.absolute()
        # What lies inside of the run's folder is locked with it.
        wanted = {folder: "the folder of the run"}
        for key, folders in chosen.items():
            for item in folders:
                if item is not None and "://" not in str(item) and folder not in Path(item).absolute().parents:
                    wanted.setdefault(Path(item).absolute(), key)
        for path, key in wanted.items():
            try:
                self._locks.append(FolderLock(path, key))
            except OSError as error:
                rank_zero_warn(f"{key}: cannot lock {path} ({error}); another run that writes there is not noticed.")

    def _release(self) -> None:
        while self._locks:
            self._locks.pop().release()


def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [item for item in trainer.checkpoint_callbacks if isinstance(item, ModelCheckpoint)]


def _error_on_all_ranks(trainer: Trainer, message: str) -> UserError:
    return UserError(message) if trainer.world_size == 1 else RankUserError(message)
