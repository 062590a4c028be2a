"""Files that others wrote or that a disk refuses: JSON within bounds, the record of a run, full disks.

Python's JSON parser goes as deep as the stack has room, so that a text may pass in one place and raise in another, and
it tells what is too deep or too long in errors of three kinds. Here whatever cannot be used is a `ValueError`.

Without torch, so that `remax report` and `remax compare` read files at once.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from remax_lightning.errors import UserError, exception_chain

TRUST = "--trust_checkpoint"
"""Option of `remax export` and `remax lm-eval` with which a user trusts the code in a checkpoint or of a model."""
DEFAULT_PYTHON = ".venv-vllm/bin/python"
"""Where `make vllm` installs it."""

# ---- JSON ----


MAX_DEPTH = 64
"""How deep lists and objects may be nested. Conversations with tools reach 12; Python's own limit is near 1000."""


TOO_DEEP = f"nested too deep, more than {MAX_DEPTH} lists and objects"


def home_path(path: str) -> str:
    """Return a path with the home folder in place of `~`, which a shell leaves in YAML files; others as they are."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # no such user
        return path


def check_output(path: Path | None, option: str) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Raises:
        UserError: if it is a folder, lies in none, or may not be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} must be a file, and {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{option}: there is no folder {str(path.parent)!r}; make it, or name another file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{option}: {path} may not be written; name another file")


def load_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: if it is no JSON, is nested deeper than `MAX_DEPTH`, or holds a whole number that is too long to be
            read; the message says which.
    """
    value = parse_json(text)
    if may_be_too_deep(text) and is_too_deep(value):
        raise ValueError(TOO_DEEP)
    return value


def read_json_object(file: Path) -> dict[str, Any]:
    """Return what a JSON file of a model holds, such as its `config.json`.

    Raises:
        UserError: naming the file, if it is no JSON, or no object.
    """
    try:
        value = load_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); complete the download") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected an object of JSON, got {type(value).__name__}; complete the download")
    return value


def parse_json(text: str | bytes, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Do what `load_json` does, for values that the caller checks for their depth.

    Args:
        text: what a file or an answer holds.
        pairs_hook: makes an object of its keys and values, as in `json.loads`.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs_hook)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        digits = sys.get_int_max_str_digits()
        raise ValueError(f"a whole number of more than {digits} digits; write it as text") from None


def write_json(value: Any, *, ensure_ascii: bool = False) -> str:
    """Return rows of a data set as JSON: dates of Parquet files as text, and what is not finite as null.

    JSON has no NaN, which stands for a missing number in Parquet files and tables in memory; `json.dumps` writes it all
    the same, and other languages than Python then refuse the whole text.
    """
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=ensure_ascii, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def may_be_too_deep(text: str | bytes) -> bool:
    """Whether a text has more brackets than the bound; most have fewer, and their values need no look."""
    if isinstance(text, str):
        return text.count("{") + text.count("[") > MAX_DEPTH
    return text.count(b"{") + text.count(b"[") > MAX_DEPTH


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than `MAX_DEPTH`, or hold themselves."""
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, dict | list | tuple):
            if depth == MAX_DEPTH:
                return True
            stack += [(inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item)]
    return False


# ---- Records that stay: what was measured on each prompt, and which loggers a run had (`run.json`) ----


RECORD = "run.json"


class PromptRecord(NamedTuple):
    """What was measured on one prompt. The sums of all prompts make the figures.

    Args:
        number: the prompt's place in its data set, or None where that is not known.
        prompt: the prompt as text; empty for a piece of a text.
        responses: responses by whose they are: `sampled`, `greedy`, `reference`, `chosen`.
        rewards: their rewards.
        sums: by the figure's name, a sum and what it is a sum over: rewards and responses, nats and tokens. The
            figure is the ratio of both after they were summed over prompts, for a perplexity its exponential.
    """

    number: int | None
    prompt: str
    responses: dict[str, list[str]]
    rewards: dict[str, list[float]]
    sums: dict[str, tuple[float, float]]


def write_record(folder: Path, loggers: Sequence[dict[str, Any]]) -> None:
    """Write the record of a run, and its folder if it does not exist.

    Args:
        folder: of the run.
        loggers: `class`, `version` and `files` of each, in the order of `trainer.logger`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps({"loggers": list(loggers)}, indent=2) + "\n", encoding="utf-8")


def recorded_loggers(folder: Path) -> list[dict[str, Any]]:
    """Return what was recorded of each logger; nothing of a run without a record, or with one that is damaged."""
    try:
        entries = load_json((folder / RECORD).read_text(encoding="utf-8"))["loggers"]
    except (OSError, ValueError, KeyError, TypeError):  # a run of an earlier version
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def recorded_versions(folder: Path) -> dict[tuple[int, str], str]:
    """Return the versions of a run's loggers, by their number in the list and their class."""
    return {
        (number, str(entry.get("class"))): str(entry["version"])
        for number, entry in enumerate(recorded_loggers(folder))
        if entry.get("version")
    }


def logger_files(folder: Path) -> list[Path]:
    """Return the folders in which loggers of a run have files of their own, such as those of an offline W&B run."""
    return [Path(entry["files"]) for entry in recorded_loggers(folder) if isinstance(entry.get("files"), str)]


# ---- Disks that are full, read-only or closed to this user: what is said, and what goes on without the file ----


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


def first_existing(path: Path) -> Path:
    """Return the path itself, or the first of the folders above it that is there."""
    return next(above for above in (path, *path.absolute().parents) if above.exists())


def free_space(path: Path) -> str:
    """Return what a message says of the free space where a path is, or would be; empty where the system does not say.

    A quota may leave less.
    """
    with suppress(OSError, ValueError):  # ValueError: a path with a null character
        usage = shutil.disk_usage(first_existing(path))
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
