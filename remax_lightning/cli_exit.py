"""The end of the command: one line and an exit code for whatever ended it; tracebacks go to a file.

| what ended the run | exit code | file with the traceback |
|---|---|---|
| a mistake in the configuration or the data | 2 | no |
| a disk that is full, read-only or closed to the user | 2 | no |
| a library that refuses what it was given, before the first training step | 2 | yes |
| code of the user's own: a reward, a callback, a data module | 2 | yes |
| Ctrl-C | 130 | no |
| a reader of the output that left, as `head` does; without a line | 141 | no |
| anything else, which is a bug | 1 | yes |
"""

from __future__ import annotations

import errno
import os
import re
import select
import sys
import sysconfig
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from remax_lightning.cli_errors import shorten_message, user_error_message
from remax_lightning.errors import exception_chain, loaded_class
from remax_lightning.files import DISK_ERRORS, free_space

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as shells have it."""

READER_LEFT = 141
"""Exit code of a command whose output nobody reads any more, as shells have it: 128 and the number of SIGPIPE."""

_PATH = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE}
# Libraries in Rust and C++ tell the number in their text: "I/O error: No space left on device (os error 28)".
_FOREIGN_ERRNO = re.compile(r"os error (\d+)|\bcode: (\d+), kind:|\[Errno (\d+)\]")

_PACKAGE = Path(__file__).parent
_LIBRARY_FOLDERS = tuple(
    dict.fromkeys(Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib", "platstdlib"))
)

Side = Literal["ours", "library", "user"]
"""Whose a file is: this package's, an installed library's, or the user's own."""

_TRANSLATIONS = (
    (
        re.compile(r"`val_check_interval` \((\d+)\) must be less than or equal to the number of the training batches"
                   r" \((\d+)\)"),
        "trainer.val_check_interval is {0}, but an epoch has only {1} training batches; lower it, or set"
        " trainer.check_val_every_n_epoch to null, which counts batches over epochs",
    ),
    (
        re.compile(r"requested to check \S+ of the `(\w+)_dataloader` but"),
        "trainer.limit_{0}_batches leaves less than one batch of the data; raise it, or set it to 0 for none",
    ),
    (
        re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (exited unexpectedly|is killed by signal: [^.]+)"),
        "data: a worker of the data loader {0}: code of a dataset called sys.exit() or os._exit(), or memory ran out;"
        " set num_workers to 0 to see where, or to fewer",
    ),
)  # fmt: skip
"""What libraries say of a key of the configuration, and how it reads with the key's name."""


@contextmanager
def exits_raise() -> Iterator[None]:
    """Let `os._exit` in code of a user's own raise `SystemExit` inside, which is told as such.

    It would end the command without a word, and with code 0 as a success. Other processes, such as workers of a data
    loader, and other threads, such as a user's watchdog, are left to it.
    """
    leave, process = os._exit, os.getpid()

    def raise_or_leave(status: int) -> NoReturn:
        is_main = os.getpid() == process and threading.current_thread() is threading.main_thread()
        if is_main and side(sys._getframe(1).f_code.co_filename) == "user":
            raise SystemExit(status)
        leave(status)

    os._exit = raise_or_leave
    try:
        yield
    finally:
        os._exit = leave


@dataclass
class Stage:
    """How far the command has come: what an error that it meets is about.

    Attributes:
        name: what is going on, in the words of the configuration: `trainer`, `model`, or a subcommand.
        trainer: the trainer as soon as there is one.
    """

    name: str = "remax"
    trainer: Trainer | None = None

    @property
    def trains(self) -> bool:
        """Whether a training step has begun: from then on the input was accepted by all libraries."""
        return self.trainer is not None and self.trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0

    def folder(self) -> Path:
        """Return the folder of the run, or the current one as long as there is none."""
        folder = self.planned_folder()
        return folder if "\0" not in str(folder) and folder.is_dir() else Path.cwd()

    def planned_folder(self) -> Path:
        """Return the folder of the run, which a full disk may have kept from being made; else the current one."""
        if self.trainer is None:
            return Path.cwd()
        from remax_lightning.run_folder import known_run_folder  # with a trainer, Lightning is loaded

        # A logger may write before the folder is chosen; then that is where the runs are.
        places = (logger.save_dir for logger in self.trainer.loggers)
        save_dir = next(filter(None, places), self.trainer.default_root_dir)
        return known_run_folder(self.trainer) or Path(save_dir)


stage = Stage()
"""How far the command of this process has come."""


class End(NamedTuple):
    """The line that the command ends with, without `remax: error:`, and its exit code."""

    message: str
    code: int


def describe_end(error: BaseException, stage: Stage) -> End:
    """Return how the command ends after an exception. Writes the traceback to a file where it is of use.

    Args:
        error: what was raised.
        stage: how far the command had come.
    """
    # ---- A mistake or a disk: the message says all, so there is no traceback ----
    message = user_error_message(error)
    message = _describe_disk(error, stage.planned_folder()) if message is None else message + _full_cache(error)
    if message is not None:
        return End(message, 2)
    # ---- Anything else: the traceback goes to a file, and the line names it ----
    message, code = _describe_memory(error), 2
    if message is None:
        message, code = _describe_by_side(error, stage)
    path = write_traceback(error, stage.folder())
    return End(message if path is None else f"{message} (traceback: {path})", code)


def describe_interruption(stage: Stage) -> str | None:
    """Return what Ctrl-C leaves of a training run, and how it goes on; None for anything else."""
    if stage.trainer is None or not stage.trains:
        return None
    step = stage.trainer.global_step
    callbacks: list[Any] = list(stage.trainer.checkpoint_callbacks)
    if any(getattr(callback, "last_model_path", "") or callback.best_model_path for callback in callbacks):
        return f"interrupted after optimizer step {step}; --ckpt_path last resumes from the latest checkpoint"
    return (
        f"interrupted after optimizer step {step}, before a first checkpoint: nothing is saved."
        " SIGTERM (kill PID) saves a checkpoint before it ends a run"
    )


def reader_left() -> bool:
    """Return whether standard output or standard error is a pipe that nobody reads any more.

    From then on, both go nowhere: what is still buffered would raise the error again when the process ends.
    """
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)  # errors alone
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    return True


def write_traceback(error: BaseException, folder: Path) -> Path | None:
    """Write the traceback of this process to a file and return its path; None if nothing can be written.

    Each rank has a file of its own: `traceback.txt`, `traceback-rank1.txt` and so on.
    """
    rank = current_rank()
    text = "".join(traceback.format_exception(error))
    # The folder of the run may be the one that cannot be written, and the current one on the same disk.
    for place in dict.fromkeys((folder, Path.cwd(), Path(tempfile.gettempdir()))):
        path = place / ("traceback.txt" if rank == 0 else f"traceback-rank{rank}.txt")
        try:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except (OSError, ValueError):  # ValueError: a path with a null character
            with suppress(OSError, ValueError):
                path.unlink()  # a full disk leaves it empty
            continue
        return path
    return None


def current_rank() -> int:
    """Return the rank of this process as Lightning knows it; 0 before it does."""
    return getattr(loaded_class("lightning.fabric.utilities.rank_zero", "rank_zero_only"), "rank", None) or 0


def _describe_disk(error: BaseException, folder: Path) -> str | None:
    """Return a message about a file that the system refuses, with the free space of its disk; None if it is none.

    An error without a file's name, as of TensorBoard's thread, is about the folder of the run.
    """
    for cause in exception_chain(error):
        number = _error_number(cause)
        if number not in DISK_ERRORS | _PATH:
            continue
        # "runs/a.ckpt: No space left on device; 0 bytes of 500 GB are free there; make room, or give another path"
        name = getattr(cause, "filename", None)
        shown = os.fsdecode(name) if isinstance(name, str | bytes) else "a file of the run"
        text = f"{shown if len(shown) <= 200 else f'{shown[:200]}...'}: {os.strerror(number)}"
        if number in _PATH:
            return f"{text}; give another path"
        space = free_space(Path(os.fsdecode(name)) if isinstance(name, str | bytes) else folder)
        advice = "make room" if number in (errno.ENOSPC, errno.EDQUOT) else "check the rights of the folder"
        return f"{text}{space}; {advice}, or give another path"
    return None


def _full_cache(error: BaseException) -> str:
    """Return what to add about a download that did not fit on the disk; empty where a mistake has another cause.

    Whoever loads a model, a tokenizer or data names the key, and passes on what the library says.
    """
    cache = loaded_class("huggingface_hub.constants", "HF_HUB_CACHE")
    full = any(_error_number(cause) in (errno.ENOSPC, errno.EDQUOT) for cause in exception_chain(error))
    if not full or not isinstance(cache, str) or "are free there" in str(error):
        return ""
    space = free_space(Path(cache)).removeprefix("; ") or "nothing is free there"
    return f"; downloads go to {cache}: {space}; make room, or set HF_HOME to a folder on another disk"


def _error_number(error: BaseException) -> int | None:
    """Return the number of a system error, also of one that a library in another language passes on as text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = _FOREIGN_ERRNO.search(str(error)) if isinstance(error, Exception) else None
    return int(next(group for group in match.groups() if group)) if match else None


def _describe_memory(error: BaseException) -> str | None:
    for cause in exception_chain(error):
        if isinstance(cause, (MemoryError, loaded_class("torch", "OutOfMemoryError"))):
            return (
                f"out of memory: {_short(cause)}; lower data.micro_batch_size, data.batch_size or the lengths;"
                " `remax plan` computes what a configuration needs"
            )
    return None


def _describe_by_side(error: BaseException, stage: Stage) -> tuple[str, int]:
    """Return the message and exit code of an exception that names no mistake, by whose code raised it."""
    # ---- The user's own code, wherever in the chain: the innermost frame that is no library's ----
    for cause in exception_chain(error):
        frame = next((frame for frame in _frames(cause) if side(frame.filename) != "library"), None)
        if frame is not None and side(frame.filename) == "user":
            name = frame.name if frame.name != "<module>" else Path(frame.filename).stem
            return f"{name} ({frame.filename}:{frame.lineno}) raised {_short(cause)}", 2
    for cause in exception_chain(error):
        # a library's message about a key of the configuration
        for pattern, text in _TRANSLATIONS:
            if match := pattern.search(str(cause)):
                return text.format(*match.groups()), 2
    # ---- A library that refuses what the configuration gave it: at the start, or in a class that only Lightning calls
    frames = _frames(error)
    innermost = frames[0] if frames else None
    if innermost is not None and side(innermost.filename) == "library":
        nearest = next((frame for frame in frames if side(frame.filename) == "ours"), None)
        only_libraries = nearest is None or Path(nearest.filename).parent == _PACKAGE
        is_optimizer = "/torch/optim/" in Path(innermost.filename).as_posix()
        if not stage.trains or only_libraries or is_optimizer:
            return f"{stage.name}: {_short(error)}", 2
    place = "" if innermost is None else f" at {_short_path(innermost.filename)}:{innermost.lineno}"
    return f"this looks like a bug of remax-lightning, please report it: {_short(error)}{place}", 1


class _Frame(NamedTuple):
    filename: str
    lineno: int
    name: str


def _frames(error: BaseException) -> list[_Frame]:
    """Return the frames of an exception, innermost first."""
    return [
        _Frame(frame.f_code.co_filename, number, _qualified_name(frame.f_code))
        for frame, number in reversed(list(traceback.walk_tb(error.__traceback__)))
    ]


def _qualified_name(code: CodeType) -> str:
    return code.co_qualname if hasattr(code, "co_qualname") else code.co_name  # co_qualname is of Python 3.11


def side(filename: str) -> Side:
    """Return whose a file of Python code is. Code without a file (a string, a template) is a library's."""
    path = Path(filename)
    # This package first: in a virtual environment it lies in site-packages.
    if path.is_relative_to(_PACKAGE):
        return "ours"
    if filename.startswith("<") or (not path.is_absolute() and not path.exists()):  # "<string>", "<template>"
        return "library"
    path = path.resolve()
    installed = any(path.is_relative_to(folder) for folder in _LIBRARY_FOLDERS)
    return "library" if installed or {"site-packages", "dist-packages"} & set(path.parts) else "user"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text that says anything, at most 300 characters."""
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    text = next((line for line in lines if line), "")
    return text if len(text) <= 300 else f"{text[:300]}..."


def _short(error: BaseException) -> str:
    text = first_line(error)
    if text.startswith(("Does not validate", "Parser key")):  # jsonargparse's tree of types that did not fit
        # its first line that names a key
        text = shorten_message(str(error)).partition("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _short_path(filename: str) -> str:
    path = Path(filename)
    # "remax_lightning/data/base.py"
    return str(path.relative_to(_PACKAGE.parent)) if path.is_relative_to(_PACKAGE) else filename
