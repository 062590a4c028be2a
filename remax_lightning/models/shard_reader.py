"""Read checkpoints that are folders: those of DeepSpeed ZeRO, and those of FSDP2 by torch's distributed checkpoint.

ZeRO saves one file under stages 1 and 2 and one shard per rank under stage 3. Only `checkpoint_reader.py` calls this.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.models.checkpoint_reader import (
    EXPORT_KEY,
    REFUSED,
    CheckpointInfo,
    code_error,
    load_torch_file,
    load_torch_stream,
    optimizer_groups,
    run_folder_of,
    tensor_shapes,
    unreadable_error,
)

SHARDED = "state_dict."
"""Prefix that Lightning's FSDP2 strategy puts before the names of weights in a folder of shards."""


# ---- DeepSpeed ZeRO ----


def read_zero(path: Path, trusted: bool = False) -> dict[str, Tensor]:
    """Return the weights of a checkpoint of ZeRO stages 1 to 3, in the dtype of the trained model.

    Stages 1 and 2 save the model and the float32 weights of the optimizer. Stage 3 saves only the latter, one shard per
    rank. The weights of the model are a rounded copy of them, so they are rounded here, too.

    Args:
        path: the folder with the file `latest`.
        trusted: whether files may run code.

    Raises:
        UserError: if a file is missing or cannot be read.
    """
    # ---- Stages 1 and 2: rank 0 saved the full model ----
    folder = _latest_folder(path)
    full = folder / "mp_rank_00_model_states.pt"
    if full.is_file():
        return dict(load_deepspeed_file(full, trusted)["module"])
    # ---- Stage 3: shapes from rank 0, then the shards of each rank ----
    first = _shard_file(folder, 0, "model_states")
    state = load_deepspeed_file(first, trusted)
    if "param_shapes" not in state or "dp_world_size" not in state:
        raise UserError(
            f"checkpoint: {str(first)!r} does not say how DeepSpeed sharded the weights; give another checkpoint"
        )
    ranks = int(state["dp_world_size"])
    frozen = dict(state.get("frozen_param_shapes") or {})
    trained = {name: shape for part in state["param_shapes"] for name, shape in part.items()}
    # The weights of the model are a rounded copy of the optimizer's, so round here as well.
    dtype = _model_dtype(state["ds_config"])
    weights = {name: torch.empty(shape, dtype=dtype) for name, shape in (trained | frozen).items()}
    for rank in range(ranks):
        _copy_shards(weights, trained, _flat_groups(_shard_file(folder, rank, "optim_states"), trusted), rank, ranks)
        if frozen:
            parts = load_deepspeed_file(_shard_file(folder, rank, "model_states"), trusted)["frozen_param_fragments"]
            _copy_shards(weights, frozen, (parts[name] for name in frozen), rank, ranks)
    # ---- Buffers are not sharded, and tied parameters are saved once ----
    buffers = {name: state["module"][name] for name in state.get("buffer_names") or ()}
    tied = {name: weights[other] for name, other in (state.get("shared_params") or {}).items() if other in weights}
    return weights | buffers | tied


def read_zero_rest(path: Path) -> dict[str, Any]:
    """Return what rank 0 saved beside the weights, in files of any stage."""
    folder = _latest_folder(path)
    full = folder / "mp_rank_00_model_states.pt"
    return load_deepspeed_file(full if full.is_file() else _shard_file(folder, 0, "model_states"))


def inspect_zero(path: Path, key: str) -> CheckpointInfo:
    """Do what `inspect_checkpoint` does for a folder of DeepSpeed."""
    folder = _latest_folder(path, key)
    full = folder / "mp_rank_00_model_states.pt"
    sharded = not full.is_file()
    state = load_deepspeed_file(_shard_file(folder, 0, "model_states", key) if sharded else full, key=key)
    if not {"dp_world_size", "param_shapes", "module"} <= state.keys():
        raise unreadable_error(folder, "it does not say how DeepSpeed sharded the weights", key)
    # ---- Every file: one with the optimizer of each rank, and under stage 3 one with the rest of it ----
    files = {*folder.glob("*.pt"), *(path / "checkpoint").glob("*.pt")}
    for rank in range(int(state["dp_world_size"])):
        files.add(_shard_file(folder, rank, "optim_states", key))
        if sharded:
            files.add(_shard_file(folder, rank, "model_states", key))
    groups: list[tuple[frozenset[str], int | None]] = []
    for file in sorted(files):
        content = load_deepspeed_file(file, key=key)
        groups = groups or [(settings, None) for settings, _ in optimizer_groups(content)]
    # ---- Shapes: of the full model, or from the lists that stage 3 writes; tied parameters are saved once ----
    shapes = tensor_shapes(state["module"])
    if sharded:
        shapes = {name: shapes[name] for name in state.get("buffer_names") or () if name in shapes}
        for part in (*state["param_shapes"], state.get("frozen_param_shapes") or {}):
            shapes |= part
        shapes |= {name: shapes[other] for name, other in (state.get("shared_params") or {}).items() if other in shapes}
    return CheckpointInfo(int(state.get("global_step", 0)), shapes, groups, run_folder_of(state))


def load_deepspeed_file(
    file: Path, trusted: bool = False, *, key: str = EXPORT_KEY, mmap: bool = True
) -> dict[str, Any]:
    """Return what DeepSpeed saved to one of its files, with the few harmless classes that it puts there."""
    return load_torch_file(file, trusted, _allow_deepspeed_classes(), key=key, mmap=mmap)


def _latest_folder(path: Path, key: str = EXPORT_KEY) -> Path:
    """Return the folder in the checkpoint that its file `latest` names."""
    try:
        name = (path / "latest").read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable_error(path / "latest", error, key) from None
    # The name comes from the file: it must not lead out of the checkpoint.
    if not name or Path(name).name != name or name == "..":
        raise unreadable_error(path / "latest", f"it names no folder of the checkpoint: {name[:50]!r}", key)
    return path / name


def _shard_file(folder: Path, rank: int, kind: str, key: str = EXPORT_KEY) -> Path:
    """Return the file of a rank; its name depends on the precision and the version of DeepSpeed."""
    files = sorted(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_{kind}.pt"))
    if not files:
        raise unreadable_error(folder, f"there is no file of rank {rank}'s {kind}", key)
    return files[0]


def _flat_groups(file: Path, trusted: bool) -> Iterator[Tensor]:
    """Yield the float32 weights of a rank: flat tensors, each a concatenation of shards of many parameters."""
    content = load_deepspeed_file(file, trusted)
    try:
        groups = content["optimizer_state_dict"]["fp32_flat_groups"]
    except KeyError as error:
        raise unreadable_error(file, f"there is no {error.args[0]}") from error
    yield from groups


def _copy_shards(
    weights: dict[str, Tensor], shapes: Mapping[str, torch.Size], tensors: Iterable[Tensor], rank: int, ranks: int
) -> None:
    """Copy the shards of one rank into the full parameters.

    Args:
        weights: the full parameters, filled in place.
        shapes: full shapes of the parameters in `tensors`, in their order.
        tensors: flat tensors with the shards one after the other; a shard has the same length on every rank, the last
            one is padded.
        rank: rank of the shards.
        ranks: number of ranks.
    """
    source, rest, position = iter(tensors), torch.empty(0), 0
    for name, shape in shapes.items():
        size = shape.numel()
        length = -(-size // ranks)  # the shard of each rank, rounded up
        # This flat tensor is used up, so the parameter is in the next one.
        if position == len(rest):
            rest, position = next(source, torch.empty(0)), 0
        # The flat tensor ends with padding, which the last rank's shard excludes.
        part = rest[position : position + length]
        if len(part) < length:
            raise UserError(f"checkpoint: rank {rank}'s file lacks a part of {name}; give a complete checkpoint")
        position += length
        start = min(rank * length, size)  # small parameters may end before the last ranks
        wanted = weights[name].view(-1)[start : start + length]
        wanted.copy_(part[: len(wanted)])


def _model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of the model according to the DeepSpeed configuration."""
    for name, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
        if (config.get(name) or {}).get("enabled"):
            return dtype
    return torch.float32


def _allow_deepspeed_classes() -> AbstractContextManager[Any]:
    """Return a context in which `torch.load` accepts the classes that DeepSpeed saves beside weights."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes: list[Any] = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    return torch.serialization.safe_globals([*classes, (enum_member, GETATTR)])


# ---- FSDP2 ----


def inspect_fsdp2(path: Path, key: str) -> CheckpointInfo:
    """Inspect a checkpoint folder of FSDP2."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

    rest = load_torch_file(path / "meta.pt", key=key)
    metadata = _read_metadata(path / ".metadata", "", key)
    _check_shards(path, metadata, key)
    # Beside tensors, torch pickles single numbers into the shards, and unpickles them without any limit.
    for index, stored in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (path / stored.relative_path).open("rb") as file:
                file.seek(stored.offset)
                data = io.BytesIO(file.read(stored.length))
            load_torch_stream(data, str(path / stored.relative_path), key=key)
    shapes = {
        name.removeprefix(SHARDED): stored.size
        for name, stored in metadata.state_dict_metadata.items()
        if name.startswith(SHARDED) and isinstance(stored, TensorStorageMetadata)
    }
    # Names such as optimizer_0.param_groups.0.lr; there, and in the planner's data, a group has no list of parameters.
    settings = [name.split(".") for name in metadata.state_dict_metadata if ".param_groups." in name]
    names = frozenset(parts[-1] for parts in settings if parts[0] == "optimizer_0") - {"params"}
    return CheckpointInfo(
        int(rest.get("global_step", 0)), shapes, [(names, None)] if names else [], run_folder_of(rest)
    )


def read_fsdp2(path: Path, prefix: str, trusted: bool) -> dict[str, Tensor]:
    """Read a checkpoint folder of FSDP2, which torch's distributed checkpoint wrote."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader: Any = FileSystemReader(path)
    if not trusted:
        reader.read_metadata = partial(_read_metadata, path / ".metadata", reader.load_id)
    # ---- Empty tensors of the saved shapes, which torch's loader fills from the shards ----
    metadata = reader.read_metadata()  # names, shapes, and where each shard is
    _check_shards(path, metadata)
    weights: dict[str, Any] = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in metadata.state_dict_metadata.items()
        if name.startswith(SHARDED + prefix) and isinstance(stored, TensorStorageMetadata)
    }
    if weights:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # there is one process only
                load(weights, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise unreadable_error(path, error) from error
    return {name.removeprefix(SHARDED): value for name, value in weights.items()}


def _check_shards(path: Path, metadata: Any, key: str = EXPORT_KEY) -> None:
    """Refuse a folder with a missing or truncated file, or with files in another encoding."""
    for stored in metadata.storage_data.values():
        file = path / stored.relative_path
        if not file.is_file() or file.stat().st_size < stored.offset + stored.length:
            raise unreadable_error(file, "a shard is missing or truncated", key)
        if stored.transform_descriptors:  # what is read here would not be what torch reads
            raise unreadable_error(file, "a shard is compressed", key)


def _read_metadata(file: Path, load_id: str, key: str = EXPORT_KEY, **_: Any) -> Any:
    """Return the metadata of torch's distributed checkpoint, without unpickling arbitrary classes as torch does."""
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with file.open("rb") as stream:
            metadata = _Metadata(stream, file, key).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        if isinstance(error, pickle.UnpicklingError) and (refused := REFUSED.search(str(error))):
            raise code_error(file, refused[1], key) from None
        raise unreadable_error(file, error, key) from None
    if not isinstance(metadata, Metadata) or metadata.storage_data is None or metadata.storage_meta is None:
        raise unreadable_error(file, f"it holds a {type(metadata).__name__}", key)
    # torch's own reader sets this as well, and asks for it later.
    metadata.storage_meta.load_id = load_id
    return metadata


GETATTR = "builtins.getattr"
"""Function that Python before 3.11.4 pickles to look up the member of an enumeration."""


def enum_member(kind: Any, name: str) -> Enum:
    """Return a member of an enumeration. Replaces `getattr` in pickles, which could return any attribute.

    Raises:
        UnpicklingError: if `kind` is not an enumeration with this member; in the words of torch for what it refuses.
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"GLOBAL getattr({getattr(kind, '__name__', kind)},{name}) was not an allowed")
    return kind[name]


class _Metadata(pickle.Unpickler):
    """Unpickles the classes of such metadata, and no others."""

    def __init__(self, stream: IO[bytes], file: Path | str = ".metadata", key: str = EXPORT_KEY) -> None:
        super().__init__(stream)
        self._file, self._key = file, key

    def find_class(self, module: str, name: str) -> Any:
        """Return the class if it is harmless."""
        if f"{module}.{name}" in (GETATTR, "__builtin__.getattr"):
            return enum_member
        # Metadata of shards, dtypes and paths; anything else could be called while unpickling.
        harmless = (
            (module == _METADATA_MODULE and _is_defined_there(name))
            or (module, name) in _HARMLESS
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        )
        if not harmless:
            raise code_error(self._file, f"{module}.{name}", self._key)
        return super().find_class(module, name)


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"


def _is_defined_there(name: str) -> bool:
    """Whether a class of this name is defined in the module; `os.system`, too, can be reached from it."""
    from torch.distributed.checkpoint import metadata

    kind = vars(metadata).get(name)
    return isinstance(kind, type) and kind.__module__ == _METADATA_MODULE


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
