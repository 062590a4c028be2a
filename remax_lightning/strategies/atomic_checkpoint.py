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
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, get_filesystem
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.distributed import broadcast, gather_objects
from remax_lightning.errors import RankError, UserError
from remax_lightning.files import describe_disk_error, is_disk_error
from remax_lightning.models.checkpoint_reader import (
    RESUME_KEY,
    checked_run,
    inspect_checkpoint,
    load_torch_file,
    load_torch_stream,
    unreadable_error,
)
from remax_lightning.models.checksums import (
    Checksum,
    check_stream,
    check_whole,
    compute_checksums,
    list_files,
    write_manifest,
)

TEMPORARY, OLD = ".tmp", ".old"
"""Suffixes of files and folders that are incomplete or about to be deleted, and of complete ones being replaced."""

SUFFIX = ".ckpt"
T = TypeVar("T")
_STARTED = time.time()  # of this process, see `remove_stale`


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
        new = _temporary(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed during the run
            torch.save(checkpoint, new)
            _replace(new, target)
        except Exception as error:
            with suppress(OSError):  # a disk that has become read-only; the next run removes it
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
            UserError: if it is damaged or not whole, would run code, is not of a run, or is a folder, which only the
                strategy that saved it can read.
        """
        check_address(str(path))
        if not _is_local_file_protocol(path):
            try:
                with get_filesystem(path).open(str(path), "rb") as stream:
                    check_stream(stream, str(path), RESUME_KEY)
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
        check_whole(Path(path), RESUME_KEY)
        # Not memory-mapped: the state of the optimizer would stay a view of the file.
        return checked_run(load_torch_file(Path(path), key=RESUME_KEY, mmap=False), path, RESUME_KEY)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file, folder or link. A kill in between leaves no incomplete folder under its name."""
        target = Path(path)
        if not _is_local_file_protocol(path):
            super().remove_checkpoint(path)
        elif self._failed:
            self._to_remove.append(target)
        elif os.path.lexists(target):  # otherwise it could not be saved
            try:
                _remove(target)
            except OSError as error:
                rank_zero_warn(f"The old checkpoint {target} stays, because it cannot be removed: {error.strerror}.")


def save_folder_atomically(strategy: Strategy, target: Any, write: Callable[[Path], object]) -> None:
    """Save a checkpoint folder of all ranks: under a temporary name, and as `target` once it is complete.

    If one rank cannot write its part, no rank saves the checkpoint: all agree after each part, so that none waits for
    another. On a failing disk they warn and keep earlier checkpoints. The folder gets a manifest of checksums, which
    the ranks compute together.

    Args:
        strategy: the strategy of the trainer; every rank has to call this.
        target: path of the checkpoint; that of rank 0 counts.
        write: writes the part of this rank into an existing, empty folder. It may wait for other ranks, so it must not
            fail on one rank alone before the others are through.
    """
    # All ranks write to the same unique name, so rank 0 chooses it.
    target, new = broadcast(strategy, (Path(target), _temporary(Path(target))))
    is_first, rank, ranks = strategy.is_global_zero, strategy.global_rank, strategy.world_size  # type: ignore[attr-defined]
    io = strategy.checkpoint_io if isinstance(strategy.checkpoint_io, AtomicCheckpointIO) else None
    try:
        _agree(target, lambda: new.mkdir(parents=True) if is_first else None)
        _agree(target, lambda: write(new))  # every rank its part
        # Every rank computes checksums of some files; rank 0 writes them down and renames the folder.
        names: list[str] = _agree(target, lambda: list_files(new) if is_first else [])[0]
        shares = _agree(target, lambda: compute_checksums(new, names[rank::ranks]))
        checksums = {name: item for share in shares for name, item in share.items()}
        _agree(target, lambda: _complete(new, target, checksums) if is_first else None)
    except Exception as error:
        if is_first:
            with suppress(OSError):
                _delete(new)
        if not isinstance(error, _DiskError):
            raise
        if io is None:  # another writer of checkpoints, which keeps none where one fails
            raise (error.__cause__ or error) from None
        io.note_failure(target, str(error))
    else:
        if io is not None and is_first:
            io.note_success(target)


class _DiskError(RankError):
    """A part of a checkpoint could not be written on some rank, because of its disk."""


def _agree(target: Path, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return the results by rank; if one rank fails, all ranks raise."""
    failure: Exception | None = None
    result = None
    try:
        result = action()
    except Exception as error:
        failure = error
    described = None if failure is None else (is_disk_error(failure), describe_disk_error(failure, target))
    # Errors travel as text: not every exception can be pickled.
    parts = gather_objects((result, described))
    failures = [part for _, part in parts if part is not None]
    if not failures:
        return [cast("T", value) for value, _ in parts]
    # The rank that failed raises its own error, with its traceback.
    if failure is not None and not is_disk_error(failure):
        raise failure
    # A full disk only costs this checkpoint; anything else ends the run.
    if all(is_disk for is_disk, _ in failures):
        raise _DiskError(failures[0][1]) from failure
    raise RankError(next(text for is_disk, text in failures if not is_disk)) from failure


def _complete(new: Path, target: Path, checksums: dict[str, Checksum]) -> None:
    write_manifest(new, checksums)
    _replace(new, target)


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
        with suppress(OSError):  # a disk that refuses this refuses the save, too, which says so
            _discard(old)
    for leftover in _entries(folder, TEMPORARY):
        with suppress(OSError):
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
    is damaged, truncated, or of another kind, is left out with a warning. Only the latest one is read to its end, and
    where that is damaged the one before it.

    Args:
        folders: folders with checkpoints of any name.
        requeued: folder in which Lightning saves checkpoints of requeued SLURM jobs, under its own names.
    """
    # ---- All candidates, interrupted replacements among them restored ----
    patterns = [(folder, f"*{SUFFIX}") for folder in folders] + [(requeued, f"hpc_ckpt_*{SUFFIX}")]
    checkpoints: list[Path] = []
    for folder, pattern in patterns:
        recover_interrupted(folder)
        checkpoints += [path for path in folder.glob(pattern) if path.exists()]
    # ---- What each says of itself, without the numbers of its tensors ----
    steps: dict[Path, tuple[int, float]] = {}
    for path in checkpoints:
        try:
            steps[path] = inspect_checkpoint(path).step, path.stat().st_mtime
        except UserError as error:
            rank_zero_warn(f"{error}. It is left out in the search for the last checkpoint.")
    # ---- The latest whose numbers are whole ----
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):
        try:
            check_whole(path, RESUME_KEY)
        except UserError as error:
            rank_zero_warn(f"{error}. It is left out in the search for the last checkpoint: the one before it is used.")
        else:
            return path
    return None


# ---- Names beside a checkpoint ----


def _temporary(target: Path) -> Path:
    """Return an unused name beside the target that no pattern of checkpoints matches."""
    # Names of checkpoints hold metrics and may be as long as the file system allows, 255 bytes.
    name = target.name.encode()[:200].decode(errors="ignore")
    return target.with_name(f".{name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}{OLD}")


def _target(old: Path) -> Path:
    return old.with_name(old.name.removeprefix(".").removesuffix(OLD))


def _entries(folder: Path, suffix: str) -> list[Path]:
    return list(folder.glob(f".*{suffix}"))


# ---- Changes on disk ----


def _replace(new: Path, target: Path) -> None:
    """Replace the target, which may be a file, link or folder, by a complete checkpoint."""
    # Content first, then the names that point to it.
    for path in (new, *new.rglob("*")):
        _sync(path)
    old = _old(target)
    if os.path.lexists(target) and (new.is_dir() or (target.is_dir() and not target.is_symlink())):
        # No system call replaces a folder. After a kill between the renames `old` is complete and `target` missing,
        # which `recover_interrupted` detects.
        _discard(old)
        target.rename(old)
    try:
        new.replace(target)
    except OSError:
        # The second rename failed: undo the first.
        if old.exists() and not os.path.lexists(target):
            old.rename(target)
        raise
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


def _remove(path: Path) -> None:
    """Delete a checkpoint of any kind; of a link, the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        _discard(path)


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
