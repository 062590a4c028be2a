"""The files that hold one version of the policy's weights, in a folder that trainer and servers see."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from remax_lightning.errors import UserError
from remax_lightning.files import is_disk_error
from remax_lightning.models.hf_export import policy_weights, save_weights
from remax_lightning.rollout.vllm_client import KEY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OWNER = "owner"
"""File that names the machine, the process and the engine whose weights a folder holds."""


class WeightFiles:
    """The weights of one version in a folder that trainer and servers see; they go with this object.

    Args:
        root: the folder; one folder is made in it for a version.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        self._written: list[Path] = []  # the folder that belongs to this object
        # Shared memory outlives the process; and runs that follow each other in one process each have files of theirs.
        weakref.finalize(self, _remove_all, self._written, self._owner)

    def folder(self, version: str) -> Path:
        """Return the folder of a version."""
        return self.root / version

    def is_complete(self, version: str) -> bool:
        """Whether the weights of a version are written."""
        return self.folder(version).is_dir()

    def write(self, model: PreTrainedModel, version: str, dtype: torch.dtype | None, *, is_writer: bool) -> int:
        """Write the weights of a version in place of the last one, and return their bytes; 0 on other ranks.

        Args:
            model: the policy; all ranks have to call this where it is sharded.
            version: of its weights.
            dtype: of the files; None writes weights as they are.
            is_writer: whether this rank writes.

        Raises:
            UserError: if the folder cannot be written.
        """
        weights = policy_weights(model, keep=is_writer, merge_adapter=False)
        if not is_writer:
            return 0
        folder = self.folder(version)
        temporary = self.root / f".{version}-{self._owner.replace(' ', '-')}"
        try:
            if self._written != [folder]:
                self.remove()  # first, so that memory never holds two versions
            if not self.is_complete(version):
                self.root.mkdir(parents=True, exist_ok=True)
                self._remove_stale()
                temporary.mkdir()
                # First, so that the next run removes what a killed one has left.
                (temporary / _OWNER).write_text(self._owner)
                save_weights(model, weights, temporary, dtype)
                self._publish(temporary, folder)
            (folder / _OWNER).write_text(self._owner)  # another run that has written it lets it be from now on
        except Exception as error:
            if not (isinstance(error, OSError) or is_disk_error(error)):
                raise
            raise UserError(
                f"{KEY}.transfer_dir: the weights cannot be written to {str(self.root)!r}: {error}; set it to a folder"
                " with room for them that trainer and servers see"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # of a failed write: shared memory stays taken otherwise
        self._written[:] = [folder]
        return _bytes_of(folder)

    @staticmethod
    def _publish(temporary: Path, folder: Path) -> None:
        """Let the weights of a version be there, whole."""
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another run, or the first rank of another node, has written the same
                raise

    def remove(self) -> None:
        """Remove what this object has written."""
        _remove_all(self._written, self._owner)

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Let one process at a time be inside, of those that see the folder.

        Raises:
            UserError: if the folder allows no locks.
        """
        import fcntl  # POSIX, as vLLM is

        path = self.root / f".{name.replace('/', '_')}.lock"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        except OSError as error:
            raise self._no_locks(error) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise self._no_locks(error) from error
            yield

    def _no_locks(self, error: OSError) -> UserError:
        return UserError(
            f"{KEY}.transfer_dir: ranks cannot take turns by a lock in {str(self.root)!r}: {error}; set it to a folder"
            " of your own, on a disk that knows locks"
        )

    def _remove_stale(self) -> None:
        """Remove what processes of this machine have left that are no more."""
        for owner in self.root.glob(f"*/{_OWNER}"):
            with suppress(OSError, ValueError):
                host, process, _ = owner.read_text().split()
                if host == socket.gethostname() and not Path(f"/proc/{int(process)}").exists():
                    shutil.rmtree(owner.parent, ignore_errors=True)


def _remove_all(folders: list[Path], owner: str) -> None:
    """Remove folders that still belong to an owner."""
    while folders:
        folder = folders.pop()
        with suppress(OSError):
            if (folder / _OWNER).read_text() == owner:
                shutil.rmtree(folder, ignore_errors=True)


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def default_folder() -> Path:
    """Return a folder in the machine's shared memory, where there is one."""
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"remax-lightning-{os.getuid()}"
