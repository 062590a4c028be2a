"""Disks that are full, read-only or closed to this user: what is said, and what goes on without the file."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from remax_lightning.errors import exception_chain

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")
"""What torch's own writer says of a failed write, without the number of the error."""


def is_disk_error(error: BaseException | None) -> bool:
    """Whether an exception says that a file could not be written; those of torch's and safetensors' writers count."""
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    if type(error).__name__ == "SafetensorError":  # by name, since this file loads nothing
        return "I/O error" in str(error)
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WRITER)


def describe_disk_error(error: BaseException, path: Path) -> str:
    """Return one line that names the file, what is wrong with its disk, and how much space that has left."""
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "writing failed"
    if isinstance(error, OSError) and not error.errno:
        reason = str(error)
    return f"cannot write {path}: {reason}{free_space(path)}"


def free_space(path: Path) -> str:
    """Return what a message says of the free space where a path is, or would be; empty where the system does not say.

    A quota may leave less.
    """
    with suppress(OSError, ValueError):  # ValueError: a path with a null character
        # of the first folder above that exists
        for folder in (path.absolute(), *path.absolute().parents):
            with suppress(FileNotFoundError, NotADirectoryError):
                usage = shutil.disk_usage(folder)
                return f"; {_size(usage.free)} of {_size(usage.total)} are free there"
    return ""


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def append_lines(path: Path, lines: Iterable[str]) -> None:
    r"""Append lines to a file in UTF-8, all of them or, where that fails, none; its folder is created.

    A lone surrogate (half an emoji in the data set), which cannot be encoded, is written as JSON's `\udXXX`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = memoryview("".join(lines).encode("utf-8", "backslashreplace"))
    with path.open("ab", buffering=0) as file:  # a buffer would be written again when the file is closed
        size = file.seek(0, os.SEEK_END)
        try:
            while rest:  # the system may write a part of it
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)  # no half line stays
            raise


@contextmanager
def tolerate_disk_errors(path: Path, warned: set[str], consequence: str) -> Iterator[None]:
    """Warn, once for each path in `warned`, where the file cannot be written inside, and go on."""
    from lightning.pytorch.utilities import rank_zero_warn

    try:
        yield
    except Exception as error:
        cause = _os_error(error)  # TensorBoard's logger wraps it in a ValueError
        if cause is None:
            raise
        if str(path) not in warned:
            warned.add(str(path))
            rank_zero_warn(f"{describe_disk_error(cause, path)}. {consequence}")


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the first OSError among an exception and its causes, which may form a ring."""
    return next((cause for cause in exception_chain(error) if isinstance(cause, OSError)), None)


def silence_tensorboard_thread() -> None:
    """Keep TensorBoard's writing thread from printing a traceback where it fails; the next call raises the error."""
    before = threading.excepthook
    if getattr(before, "is_quiet", False):
        return

    def quiet(failure: Any) -> None:
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            before(failure)

    quiet.is_quiet = True  # type: ignore[attr-defined]
    threading.excepthook = quiet
