"""Checkpoints that are there whole or not at all, whenever the run is killed.

A checkpoint is written under `.unfinished/` in its folder and moved to its place once it is complete. A file is
replaced in one go. A folder cannot be: an older one of the same name lies in `.replaced/` until the new one is there.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.strategies import Strategy

from remax_lightning.distributed import barrier, broadcast
from remax_lightning.errors import UserError

UNFINISHED, REPLACED = ".unfinished", ".replaced"
SUFFIX = ".ckpt"
_STARTED = time.time()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint file, moved to its place when it is complete.

    Lightning's own writes it to the folder for temporary files first; where that is another disk, the way from there is
    a copy, which a kill cuts in two.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the file whole or not at all; on a remote file system Lightning's way."""
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        new = _prepared(target)
        torch.save(checkpoint, new)
        _put_in_place(new, target)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read the file.

        Raises:
            UserError: if it is a folder, which only the strategy that wrote it can read.
        """
        if _is_local_file_protocol(path) and Path(path).is_dir():
            raise UserError(
                f"ckpt_path: {str(path)!r} is a folder, as DeepSpeed and FSDP2 write it, and trainer.strategy reads a"
                " file; set the trainer.strategy that the checkpoint was saved under"
            )
        return super().load_checkpoint(path, *args, **options)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file or folder; what a kill leaves of a folder is not where a checkpoint would be."""
        target = Path(path)
        if not _is_local_file_protocol(path) or target.is_symlink() or not target.is_dir():
            super().remove_checkpoint(path)
            return
        _discard(target, target)


@contextmanager
def whole_folder(strategy: Strategy, target: Any) -> Iterator[Path]:
    """Give a path to write a checkpoint folder to, which goes to its place once all ranks have written their part.

    Args:
        strategy: the trainer's; every rank has to enter and leave.
        target: where the checkpoint is to be; rank 0's counts.
    """
    target = Path(broadcast(strategy, target))
    new = _prepared(target) if strategy.is_global_zero else _beside(target, UNFINISHED)
    barrier(strategy, "an empty place for the checkpoint")
    yield new
    barrier(strategy, "every part of the checkpoint is written")
    if strategy.is_global_zero:
        _put_in_place(new, target)


def settle(folder: Path) -> None:
    """Put back a checkpoint that was to be replaced when the run was killed; any rank may do it."""
    for old in _entries(folder / REPLACED):
        if not (folder / old.name).exists():
            with suppress(OSError):  # another rank was quicker
                old.rename(folder / old.name)


def sweep(folder: Path) -> None:
    """Delete what earlier runs left unfinished in a folder of checkpoints.

    What is younger than this process may belong to a run that is going on.
    """
    settle(folder)
    for old in _entries(folder / REPLACED):
        _discard(old, folder / old.name)
    for leftover in _entries(folder / UNFINISHED):
        if leftover.lstat().st_mtime < _STARTED:
            _delete(leftover)
    with suppress(OSError):  # not there, or not empty
        (folder / UNFINISHED).rmdir()


def newest(folders: Iterable[Path], requeued: Path) -> Path | None:
    """Return the youngest whole checkpoint, None if there is none.

    Args:
        folders: where checkpoints lie, under any name.
        requeued: where Lightning puts those of a SLURM job that is to run again, under a name of its own.
    """
    places = [(folder, f"*{SUFFIX}") for folder in folders] + [(requeued, f"hpc_ckpt_*{SUFFIX}")]
    found = []
    for folder, pattern in places:
        settle(folder)
        found += [path for path in folder.glob(pattern) if path.exists()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _beside(target: Path, name: str) -> Path:
    return target.parent / name / target.name


def _prepared(target: Path) -> Path:
    """Return an unused path for the unfinished checkpoint."""
    new = _beside(target, UNFINISHED)
    _delete(new)
    new.parent.mkdir(parents=True, exist_ok=True)
    return new


def _put_in_place(new: Path, target: Path) -> None:
    for path in (new, *new.rglob("*")):
        _write_through(path)
    old = _beside(target, REPLACED)
    if os.path.lexists(target) and (new.is_dir() or (target.is_dir() and not target.is_symlink())):
        _discard(old, target)
        old.parent.mkdir(exist_ok=True)
        target.rename(old)
    new.replace(target)
    _write_through(target.parent)
    _discard(old, target)
    for name in (UNFINISHED, REPLACED):
        with suppress(OSError):  # not empty, or not there
            (target.parent / name).rmdir()


def _write_through(path: Path) -> None:
    """Wait until the disk has it: a name that is there after a loss of power must not lead to nothing."""
    if os.name == "nt":  # cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _discard(path: Path, target: Path) -> None:
    """Delete what is or was the checkpoint `target`: its name goes first, for a kill to leave no half of it there."""
    if os.path.lexists(path):
        gone = _prepared(target.with_name(f"{target.name}.gone"))
        path.rename(gone)
        _delete(gone)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
