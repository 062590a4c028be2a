"""Read the weights of a DeepSpeed ZeRO checkpoint: one file under stages 1 and 2, one shard per rank under stage 3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.models.checkpoint_reader import (
    EXPORT_KEY,
    GETATTR,
    CheckpointInfo,
    enum_member,
    load_torch_file,
    optimizer_groups,
    run_folder_of,
    tensor_shapes,
    unreadable_error,
)


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
