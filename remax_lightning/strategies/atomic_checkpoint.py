"""Atomic checkpoints: whenever a run is killed, the latest complete checkpoint can be loaded.

A checkpoint is written under a unique temporary name beside its target, `.NAME.ID.tmp`, and renamed once it is
complete. A rename can replace a file, but not a folder, so an older folder is first renamed to `.NAME.old`. If a run is
killed between the two renames, `recover_interrupted` renames that folder back.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, get_filesystem
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.disk import describe_disk_error, is_disk_error
from remax_lightning.distributed import barrier, broadcast, gather_objects
from remax_lightning.errors import RankError, UserError
from remax_lightning.models.checkpoint_reader import (
    RESUME_KEY,
    checked_run,
    inspect_checkpoint,
    load_torch_file,
    load_torch_stream,
    unreadable_error,
)

TEMPORARY, OLD = ".tmp", ".old"
"""Suffixes of files and folders that are incomplete or about to be deleted, and of complete ones being replaced."""

SUFFIX = ".ckpt"
_STARTED = time.time()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoint files beside their target and renames them when they are complete.

    Lightning writes to the system folder for temporary files first. If that is on another disk, moving the file is a
    copy, and a killed process leaves an incomplete file.

    A checkpoint that the disk has no room for is a warning. Until the next one is complete, checkpoints that are to be
    removed stay, because `ModelCheckpoint` takes the new one for saved.
    """

    def __init__(self) -> None:
        super().__init__()
        self._failed = False
        self._to_remove: list[Path] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the file atomically; on a remote file system, as Lightning does."""
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = _temporary(target)
        try:
            torch.save(checkpoint, new)
            _replace(new, target)
        except Exception as error:
            _delete(new)
            if not is_disk_error(error):
                raise
            self.note_failure(target, describe_disk_error(error, target))
        else:
            self.note_success(target)

    def note_failure(self, target: Path, description: str) -> None:
        """Warn that a checkpoint could not be written, and keep earlier ones until the next is complete."""
        self._failed = True
        rank_zero_warn(
            f"The checkpoint {target.name} was not saved: {description}. Earlier checkpoints stay, and the next save is"
            " tried as usual."
        )

    def note_success(self, target: Path) -> None:
        """Remove what stayed only because a save failed."""
        self._failed, removable, self._to_remove = False, self._to_remove, []
        for path in removable:
            if path != target:
                self.remove_checkpoint(path)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Read the file, and run no code that it may hold, whatever `weights_only` asks for.

        Raises:
            UserError: if it is not whole, would run code, is not of a run, or is a folder, which only the strategy that
                saved it can read.
        """
        check_address(str(path))
        if not _is_local_file_protocol(path):
            try:
                with get_filesystem(path).open(str(path), "rb") as stream:
                    content = load_torch_stream(stream, str(path), key=RESUME_KEY)
            except UserError:
                raise
            except (OSError, ImportError, ValueError) as error:  # no such file, no credentials, no library for it
                raise unreadable_error(str(path), error, RESUME_KEY) from None
            return checked_run(content, path, RESUME_KEY)
        if Path(path).is_dir():
            raise UserError(
                f"ckpt_path: {str(path)!r} is a folder of DeepSpeed or FSDP2, but trainer.strategy reads a file; set"
                " the trainer.strategy that the checkpoint was saved under"
            )
        # Not memory-mapped: the state of the optimizer would stay a view of the file.
        return checked_run(load_torch_file(Path(path), key=RESUME_KEY, mmap=False), path, RESUME_KEY)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file, folder or link. A kill in between leaves no incomplete folder under its name."""
        target = Path(path)
        if not _is_local_file_protocol(path):
            super().remove_checkpoint(path)
        elif self._failed:
            self._to_remove.append(target)
        elif not os.path.lexists(target):
            return  # it could not be saved
        elif target.is_symlink():
            target.unlink()  # older releases of fsspec would remove the folder that it points to
        elif target.is_dir():
            _discard(target)
        else:
            super().remove_checkpoint(path)


@contextmanager
def atomic_folder(strategy: Strategy, target: Any) -> Iterator[Path]:
    """Yield a temporary path for a checkpoint folder, and rename it to `target` once all ranks have written their part.

    Args:
        strategy: the strategy of the trainer; every rank has to enter and leave.
        target: path of the checkpoint; that of rank 0 counts.
    """
    # All ranks write to the same unique name, so rank 0 chooses it.
    target, new = broadcast(strategy, (Path(target), _temporary(Path(target))))
    if strategy.is_global_zero:
        target.parent.mkdir(parents=True, exist_ok=True)
    barrier(strategy, "the folder of checkpoints exists")
    failure: Exception | None = None
    try:
        yield new
    except Exception as error:
        failure = error
    # ---- All ranks agree whether every part is written ----
    parts = gather_objects(None if failure is None else (is_disk_error(failure), describe_disk_error(failure, target)))
    failures = [part for part in parts if part is not None]
    if strategy.is_global_zero and not failures:
        try:
            _replace(new, target)
        except OSError as error:
            failures = [(is_disk_error(error), describe_disk_error(error, target))]
            failure = error
    failures = broadcast(strategy, failures)
    io = strategy.checkpoint_io if isinstance(strategy.checkpoint_io, AtomicCheckpointIO) else None
    if failures:
        if strategy.is_global_zero:
            _delete(new)
        if failure is not None and not is_disk_error(failure):
            raise failure
        if io is None or not all(is_disk for is_disk, _ in failures):
            raise failure or RankError(failures[0][1])
        io.note_failure(target, failures[0][1])
    elif io is not None and strategy.is_global_zero:
        io.note_success(target)


def recover_interrupted(folder: Path) -> None:
    """Restore checkpoints whose replacement was interrupted between the two renames; any rank may call this."""
    for old in _entries(folder, OLD):
        target = _target(old)
        if not os.path.lexists(target):
            with suppress(OSError):  # another rank was faster
                old.rename(target)


def remove_stale(folder: Path) -> None:
    """Delete temporary files that earlier runs left in a folder of checkpoints.

    Files that are newer than this process may belong to another running process and stay.
    """
    recover_interrupted(folder)
    for old in _entries(folder, OLD):
        _discard(old)
    for leftover in _entries(folder, TEMPORARY):
        if leftover.lstat().st_mtime < _STARTED:
            _delete(leftover)


def check_address(path: str) -> None:
    """Refuse a checkpoint at an address of the web, of which neither author nor length is known.

    Raises:
        UserError: if the path is such an address.
    """
    if "http://" in path or "https://" in path or "ftp://" in path:
        raise UserError(f"{RESUME_KEY}: {path!r} is an address; download it from a source you know, and give the path")


def latest_checkpoint(folders: Iterable[Path], requeued: Path) -> Path | None:
    """Return the whole checkpoint with the most optimizer steps; None if there is none.

    Copies and restored backups change the times of files, so these only decide between equal steps. A checkpoint that
    is truncated, or of another kind, is left out with a warning.

    Args:
        folders: folders with checkpoints of any name.
        requeued: folder in which Lightning saves checkpoints of requeued SLURM jobs, under its own names.
    """
    patterns = [(folder, f"*{SUFFIX}") for folder in folders] + [(requeued, f"hpc_ckpt_*{SUFFIX}")]
    checkpoints: list[Path] = []
    for folder, pattern in patterns:
        recover_interrupted(folder)
        checkpoints += [path for path in folder.glob(pattern) if path.exists()]
    whole: dict[Path, tuple[int, float]] = {}
    for path in checkpoints:
        try:
            whole[path] = inspect_checkpoint(path).step, path.stat().st_mtime
        except UserError as error:
            rank_zero_warn(f"{error}. It is left out in the search for the last checkpoint.")
    return max(whole, key=lambda path: whole[path], default=None)


# ---- Names beside a checkpoint ----


def _temporary(target: Path) -> Path:
    """Return an unused name beside the target that no pattern of checkpoints matches."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}{OLD}")


def _target(old: Path) -> Path:
    return old.with_name(old.name.removeprefix(".").removesuffix(OLD))


def _entries(folder: Path, suffix: str) -> list[Path]:
    return list(folder.glob(f".*{suffix}"))


# ---- Changes on disk ----


def _replace(new: Path, target: Path) -> None:
    """Replace the target, which may be a file, link or folder, by a complete checkpoint."""
    for path in (new, *new.rglob("*")):
        _sync(path)
    old = _old(target)
    if os.path.lexists(target) and (new.is_dir() or (target.is_dir() and not target.is_symlink())):
        # No system call replaces a folder. After a kill between the renames `old` is complete and `target` missing,
        # which `recover_interrupted` detects.
        _discard(old)
        target.rename(old)
    new.replace(target)
    _sync(target.parent)
    _discard(old)


def _sync(path: Path) -> None:
    """Flush to the disk, so that a power loss cannot keep a name without its content."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    """Delete a checkpoint if it exists. It is renamed first, so that a kill leaves no part of it under its name."""
    if os.path.lexists(path):
        stale = _temporary(path)
        path.rename(stale)
        _delete(stale)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
