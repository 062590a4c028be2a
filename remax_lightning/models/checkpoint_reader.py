"""Read checkpoints of every strategy without running code that a stranger may have pickled into them.

This is the only reader of checkpoints: `remax export` takes weights from it in one process, and `fit`, `validate`,
`test` and `predict` let it look at every file (`inspect_checkpoint`) before a strategy or DeepSpeed loads one.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from remax_lightning.errors import UserError, exception_chain
from remax_lightning.files import TRUST
from remax_lightning.models.checksums import check_whole
from remax_lightning.run_folder import RUN_FOLDER

HYPER_PARAMETERS = "hyper_parameters"
"""Key of a checkpoint for the arguments of its module; Lightning's."""
EXPORT_KEY, RESUME_KEY = "checkpoint", "ckpt_path"
"""What messages call the path: the argument of `remax export`, and the key of `fit` and the other subcommands."""
REFUSED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)|Trying to call reduce for .*function (\S+)")


def read_weights(path: Path, prefix: str, *, trusted: bool = False) -> dict[str, Tensor]:
    """Return the full weights of a checkpoint on the CPU, in the dtype that they were trained in.

    A checkpoint of one file is memory-mapped: its tensors are read from the disk when they are used. Of a sharded
    checkpoint, memory holds the full weights and the shards of one rank at a time.

    Args:
        path: a `.ckpt` file, or a checkpoint folder of DeepSpeed or FSDP2.
        prefix: prefix of the names of the wanted weights; it is removed.
        trusted: whether files may run code, as pickle allows. Otherwise only tensors, numbers, text and the harmless
            classes that DeepSpeed and FSDP2 save are read.

    Raises:
        UserError: if it is damaged, not a complete checkpoint, would run code, or has no such weights.
    """
    check_whole(path, EXPORT_KEY)
    with _damage_named(path, EXPORT_KEY):
        weights = _read_weights(path, prefix, trusted)
    # Of a reward model, say, where a policy was asked for.
    if not weights:
        raise UserError(f"checkpoint: {str(path)!r} holds no weights {prefix}*; give a checkpoint of a policy")
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def _read_weights(path: Path, prefix: str, trusted: bool) -> dict[str, Tensor]:
    """Return the weights whose names have the prefix, with it."""
    # ---- One reader for each way of saving: a file, shards of FSDP2, a folder of DeepSpeed ----
    if path.is_file():
        state: Mapping[str, Any] = load_torch_file(path, trusted).get("state_dict") or {}
        weights = {name: value for name, value in state.items() if name.startswith(prefix)}
    elif (path / ".metadata").is_file() or (path / "meta.pt").is_file():
        from remax_lightning.models.shard_reader import read_fsdp2

        weights = read_fsdp2(path, prefix, trusted)
    elif (path / "latest").is_file():
        from remax_lightning.models.shard_reader import read_zero

        weights = {name: value for name, value in read_zero(path, trusted).items() if name.startswith(prefix)}
    else:
        raise _no_checkpoint(path, "checkpoint")
    return weights


def _no_checkpoint(path: Path, key: str) -> UserError:
    """Return the error of a path that is no checkpoint; of a run's folder it names those that are in it."""
    if not path.exists():
        return UserError(f"{key}: {str(path)!r} does not exist; give a complete checkpoint of `remax fit`")
    patterns = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt")
    inside = sorted(str(found) for pattern in patterns for found in path.glob(pattern))
    advice = f"give one in it: {', '.join(inside[:3])}" if inside else "give a complete checkpoint of `remax fit`"
    return UserError(f"{key}: {str(path)!r} is neither a .ckpt file nor a folder of DeepSpeed or FSDP2; {advice}")


def read_hyper_parameters(path: Path) -> dict[str, Any]:
    """Return the arguments of the module that a checkpoint was saved from, as numbers, text and dictionaries.

    Args:
        path: a `.ckpt` file, or a checkpoint folder of DeepSpeed or FSDP2.

    Raises:
        UserError: if it cannot be read, would run code, or has none, such as a checkpoint of version 0.1.
    """
    if (path / "latest").is_file():
        from remax_lightning.models.shard_reader import read_zero_rest

        content = read_zero_rest(path)
    else:
        # FSDP2 keeps what is no tensor of a shard in a file of its own.
        content = load_torch_file(path / "meta.pt" if path.is_dir() else path)
    arguments = content.get(HYPER_PARAMETERS)
    if not isinstance(arguments, dict):
        raise UserError(
            f"checkpoint: {str(path)!r} does not say which module it is of; give the arguments of the module, policy at"
            " least: load_from_checkpoint(path, policy=...)"
        )
    return dict(arguments)


def load_torch_file(
    file: Path,
    trusted: bool = False,
    known: AbstractContextManager[Any] | None = None,
    *,
    key: str = EXPORT_KEY,
    mmap: bool = True,
) -> dict[str, Any]:
    """Return what `torch.save` wrote.

    Args:
        file: path of the file.
        trusted: whether the file may run code.
        known: context in which further classes count as harmless.
        key: what messages call the checkpoint.
        mmap: whether tensors are memory-mapped, and so read from the disk when they are used.

    Raises:
        UserError: if it cannot be read, or would run code.
    """
    try:
        # torch maps only its zip format, not the one before 1.6.
        mmap = mmap and zipfile.is_zipfile(file)
        with known or nullcontext():
            content = torch.load(file, map_location="cpu", mmap=mmap, weights_only=not trusted)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle makes torch raise nearly anything
        with suppress(OSError), file.open("rb") as stream:
            if code := refused_code(error, stream):
                raise code_error(file, code, key) from None
        raise unreadable_error(file, error, key) from None
    return _checked_content(content, file, key)


def load_torch_stream(stream: IO[bytes], name: str, *, key: str) -> Any:
    """Return what `torch.save` wrote to a stream, as of a remote file; errors as in `load_torch_file`.

    Args:
        stream: can be read again from its start.
        name: what messages call the file.
        key: what messages call the checkpoint.
    """
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        stream.seek(0)
        if code := refused_code(error, stream):
            raise code_error(name, code, key) from None
        raise unreadable_error(name, error, key) from None


def _checked_content(content: Any, file: Path | str, key: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{key}: {str(file)!r} holds a {type(content).__name__}; give a checkpoint of `remax fit`")
    return dict(content)


# ---- Errors, without torch's advice to set `weights_only=False`, which runs the code ----


def unreadable_error(file: Path | str, error: BaseException | str, key: str = EXPORT_KEY) -> UserError:
    """Return an error for a file that is missing, incomplete or of another kind."""
    # torch puts its advice first, and what went wrong last.
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    if "weights_only" in text:
        text = "it is no file of torch.save, or was changed"
    lines = text.strip().splitlines()
    return UserError(
        f"{key}: {str(file)!r} cannot be read: it is not a checkpoint, or an incomplete one"
        f" ({lines[0] if lines else type(error).__name__}); give a complete checkpoint"
    )


def code_error(file: Path | str, name: str, key: str = EXPORT_KEY) -> UserError:
    """Return an error for a file with a pickled function or class, `name`, that reading it would call."""
    advice = "give another one; the state of your own callbacks may hold tensors, numbers and text, but no classes"
    if key == EXPORT_KEY:
        advice = f"if you trust the author of the file, add {TRUST}"
    return UserError(f"{key}: {str(file)!r}: the file holds code ({name}), which is not run; {advice}")


def refused_pickle(error: BaseException) -> str | None:
    """Return what is wrong with a pickled weight file that torch refuses, and what to do; None for other errors."""
    for cause in exception_chain(error):
        if isinstance(cause, pickle.UnpicklingError):
            refused = REFUSED.search(str(cause))
            name = next(filter(None, refused.groups())) if refused else None
            what = "is damaged, or no file of weights" if name is None else f"holds code ({name}), which is not run"
            return f"a pickled weight file in it {what}; take one with safetensors, or another copy"
    return None


def refused_code(error: Exception, stream: IO[bytes]) -> str | None:
    """Return the function or class because of which torch refused a file; None if it refused it for another reason."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    if (refused := REFUSED.search(str(error))) is not None:
        return next(name for name in refused.groups() if name)
    # Forms of pickle that torch does not know at all: look for the names in it.
    data = stream.read()
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(data)) as archive:
        data = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    names = _pickled_names(data)
    return next((name for name in names if not name.startswith(("torch.", "collections."))), None)


def _pickled_names(data: bytes) -> Iterator[str]:
    """Yield the dotted names of functions and classes in a pickle, as far as it can be followed."""
    texts: list[str] = []
    with suppress(Exception):  # it may be damaged, or no pickle
        for operation, argument, _ in pickletools.genops(data):
            if operation.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            # It takes module and name from the stack: the last two texts.
            elif operation.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            elif isinstance(argument, str):
                texts.append(argument)


# ---- Checkpoints as a whole ----


class CheckpointInfo(NamedTuple):
    """What a checkpoint says of itself.

    Args:
        step: optimizer steps done.
        shapes: full shapes of the weights, by their names in the LightningModule.
        optimizer_groups: of each parameter group of the optimizer, the names of its settings and the number of its
            parameters, None where a strategy has flattened them; empty where the checkpoint has weights alone.
        run_folder: the folder of the run that saved it; empty in checkpoints of earlier versions.
    """

    step: int
    shapes: dict[str, torch.Size]
    optimizer_groups: list[tuple[frozenset[str], int | None]]
    run_folder: str = ""


def inspect_checkpoint(path: Path, key: str = RESUME_KEY) -> CheckpointInfo:
    """Check that a checkpoint is complete and holds no code, and read everything but the values of its tensors.

    It is then safe to load it with an unpickler that would call functions, as DeepSpeed does.

    Args:
        path: a `.ckpt` file, or a checkpoint folder of DeepSpeed or FSDP2.
        key: what messages call the checkpoint.

    Raises:
        UserError: if a file is missing, truncated, of another kind, or would run code.
    """
    with _damage_named(path, key):
        return _inspect(path, key)


def _inspect(path: Path, key: str) -> CheckpointInfo:
    if path.is_file():
        content = checked_run(load_torch_file(path, key=key), path, key)
        shapes = tensor_shapes(content["state_dict"])
        return CheckpointInfo(int(content["global_step"]), shapes, optimizer_groups(content), run_folder_of(content))
    if (path / ".metadata").is_file() or (path / "meta.pt").is_file():
        from remax_lightning.models.shard_reader import inspect_fsdp2

        return inspect_fsdp2(path, key)
    if (path / "latest").is_file():
        from remax_lightning.models.shard_reader import inspect_zero

        return inspect_zero(path, key)
    raise _no_checkpoint(path, key)


@contextmanager
def _damage_named(path: Path, key: str) -> Iterator[None]:
    """Make a message of what a damaged file raises where its parts are used.

    A flipped bit may leave a readable pickle with an attribute of another name, a negative length or a shape of text;
    whatever touches it first raises.
    """
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise
        raise unreadable_error(path, f"{type(error).__name__}: {error}", key) from error


def checked_run(content: Any, path: Path | str, key: str) -> dict[str, Any]:
    """Return what a file holds if Lightning has saved it during a run.

    Raises:
        UserError: if it is a file of something else, such as weights alone.
    """
    run = _checked_content(content, path, key)
    missing = [name for name in ("state_dict", "global_step", "pytorch-lightning_version") if name not in run]
    if missing or not isinstance(run["state_dict"], dict):
        raise UserError(
            f"{key}: {str(path)!r} is no checkpoint of a run: it has no {', '.join(missing) or 'weights by name'}; give"
            " a checkpoint of `remax fit`, or give a folder of weights for transformers as model.policy.path"
        )
    return run


def run_folder_of(content: Mapping[str, Any]) -> str:
    """Return the folder of the run that saved a checkpoint, as it names it."""
    folder = content.get(RUN_FOLDER)
    return folder if isinstance(folder, str) else ""


def tensor_shapes(weights: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Return the shapes of the tensors among some values."""
    return {name: value.shape for name, value in weights.items() if isinstance(value, Tensor)}


def optimizer_groups(content: Any) -> list[tuple[frozenset[str], int | None]]:
    """Return `CheckpointInfo.optimizer_groups` from the first optimizer state in nested dictionaries and lists."""
    # Each strategy nests the state in its own way; the first `param_groups` on the way down counts.
    if isinstance(content, Mapping):
        groups = content.get("param_groups")
        if isinstance(groups, list) and groups and all(isinstance(group, Mapping) for group in groups):
            return [(frozenset(group) - {"params"}, _length(group.get("params"))) for group in groups]
        parts = [content.get(name) for name in ("optimizer_states", "optimizer_state_dict", "base_optimizer_state")]
    else:
        parts = list(content) if isinstance(content, list) else []
    return next((found for part in parts if (found := optimizer_groups(part))), [])


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None
