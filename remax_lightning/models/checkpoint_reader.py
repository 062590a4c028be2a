"""Read the weights of a checkpoint in one process, whichever strategy wrote it, without running pickled code."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remax_lightning.errors import UserError

TRUST = "--trust_checkpoint"
"""Option of `remax export` with which a user trusts the code in a checkpoint."""
_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed")
_SHARDED = "state_dict."
"""Prefix that Lightning's FSDP2 strategy puts before the names of weights in a folder of shards."""


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
        UserError: if it is not a complete checkpoint, would run code, or has no such weights.
    """
    if path.is_file():
        state: Mapping[str, Any] = load_torch_file(path, trusted).get("state_dict") or {}
        weights = {name: value for name, value in state.items() if name.startswith(prefix)}
    elif (path / ".metadata").is_file() or (path / "meta.pt").is_file():
        weights = _read_shards(path, prefix, trusted)
    elif (path / "latest").is_file():
        from remax_lightning.models.zero_reader import read_zero

        weights = {name: value for name, value in read_zero(path, trusted).items() if name.startswith(prefix)}
    else:
        what = "is neither a .ckpt file nor a folder of DeepSpeed or FSDP2" if path.exists() else "does not exist"
        raise UserError(f"checkpoint: {str(path)!r} {what}; give a complete checkpoint of `remax fit`")
    if not weights:
        raise UserError(f"checkpoint: {str(path)!r} holds no weights {prefix}*; give a checkpoint of a policy")
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def load_torch_file(file: Path, trusted: bool, known: AbstractContextManager[Any] | None = None) -> dict[str, Any]:
    """Return what `torch.save` wrote; tensors are memory-mapped.

    Args:
        file: path of the file.
        trusted: whether the file may run code.
        known: context in which further classes count as harmless.

    Raises:
        UserError: if it cannot be read, or would run code.
    """
    try:
        with known or nullcontext():
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=not trusted)
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        if refused is None:
            raise unreadable_error(file, error) from error
        raise UserError(
            f"checkpoint: {str(file)!r} holds a {refused[1]}, and reading that may run any code; if you trust the"
            f" author of the file, add {TRUST}"
        ) from error
    except (EOFError, OSError, RuntimeError) as error:
        raise unreadable_error(file, error) from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint: {str(file)!r} holds a {type(content).__name__}; give a checkpoint of `remax fit`")
    return content


def unreadable_error(file: Path, error: BaseException | str) -> UserError:
    """Return an error for a file that is missing, incomplete or of another kind."""
    text = str(error).strip().splitlines()
    return UserError(
        f"checkpoint: {str(file)!r} cannot be read: it is not a checkpoint, or an incomplete one"
        f" ({text[0] if text else type(error).__name__}); give a complete checkpoint"
    )


def _read_shards(path: Path, prefix: str, trusted: bool) -> dict[str, Tensor]:
    """Read a checkpoint folder of FSDP2, which torch's distributed checkpoint wrote."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader: Any = FileSystemReader(path)
    if not trusted:
        reader.read_metadata = partial(_read_metadata, path / ".metadata", reader.load_id)
    # ---- Empty tensors of the saved shapes, which torch's loader fills from the shards ----
    metadata = reader.read_metadata()
    _check_shards(path, metadata)
    weights: dict[str, Any] = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in metadata.state_dict_metadata.items()
        if name.startswith(_SHARDED + prefix) and isinstance(stored, TensorStorageMetadata)
    }
    if weights:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # there is one process only
                load(weights, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise unreadable_error(path, error) from error
    return {name.removeprefix(_SHARDED): value for name, value in weights.items()}


def _check_shards(path: Path, metadata: Any) -> None:
    """Refuse a folder with a missing or truncated file."""
    for stored in metadata.storage_data.values():
        file = path / stored.relative_path
        if not file.is_file() or file.stat().st_size < stored.offset + stored.length:
            raise unreadable_error(file, "a shard is missing or truncated")


def _read_metadata(file: Path, load_id: str, **_: Any) -> Any:
    """Return the metadata of torch's distributed checkpoint, without unpickling arbitrary classes as torch does."""
    try:
        with file.open("rb") as stream:
            metadata = _Metadata(stream).load()
    except (EOFError, OSError, pickle.UnpicklingError) as error:
        raise unreadable_error(file, error) from error
    metadata.storage_meta.load_id = load_id
    return metadata


GETATTR = "builtins.getattr"
"""Function that Python before 3.11.4 pickles to look up the member of an enumeration."""


def enum_member(kind: Any, name: str) -> Enum:
    """Return a member of an enumeration. Replaces `getattr` in pickles, which could return any attribute.

    Raises:
        UserError: if `kind` is not an enumeration with this member.
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise UserError(
            f"checkpoint: it looks up {name!r} in a {kind!r}, and reading that may run any code; if you trust the"
            f" author of the file, add {TRUST}"
        )
    return kind[name]


class _Metadata(pickle.Unpickler):
    """Unpickles the classes of such metadata, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class if it is harmless."""
        if f"{module}.{name}" in (GETATTR, "__builtin__.getattr"):
            return enum_member
        harmless = (
            module == "torch.distributed.checkpoint.metadata"
            or (module, name) in _HARMLESS
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        )
        if not harmless:
            raise UserError(
                f"checkpoint: its .metadata holds a {module}.{name}, and reading that may run any code; if you trust"
                f" the author of the file, add {TRUST}"
            )
        return super().find_class(module, name)


_HARMLESS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict"),
}
