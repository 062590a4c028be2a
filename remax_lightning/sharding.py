"""What a strategy has done to a model's parameters: sharded or full, and how to see through wrappers.

This is the only file that reads DeepSpeed's marks on parameters (`ds_id`, `ds_shape`, `ds_numel`, `ds_tensor`) and
FSDP2's class of modules; a test looks for others. Code elsewhere asks here, and needs no knowledge of either engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# ---- Who has sharded it ----


def is_zero3_sharded(target: nn.Module | Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has sharded the parameter, or any parameter of the model."""
    parameters = target.parameters() if isinstance(target, nn.Module) else (target,)
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def is_fsdp2_root(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model itself, not only modules inside it."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def fsdp2_groups(model: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 gathers one by one, from the outermost to the innermost."""
    return [module for module in model.modules() if is_fsdp2_root(module)]


def is_sharded(target: nn.Module | Tensor) -> bool:
    """Whether ZeRO-3 or FSDP2 has sharded any parameter; true also while a rollout has them gathered."""
    if is_zero3_sharded(target):
        return True
    if isinstance(target, nn.Module):
        return bool(fsdp2_groups(target))
    return hasattr(target, "device_mesh")  # a DTensor


# ---- How large it is without sharding ----


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the unsharded parameter; the shard that ZeRO-3 leaves of it has another."""
    # ZeRO-3 leaves an empty placeholder of shape [0]; a DTensor reports its full shape itself.
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def full_numel(parameter: Tensor) -> int:
    """Return the number of elements of the unsharded parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def local_shard(parameter: Any) -> Tensor:
    """Return what this rank holds of a parameter or of a tensor with its layout: a shard, or all of it."""
    if hasattr(parameter, "to_local"):  # FSDP2
        return parameter.to_local()  # type: ignore[no-any-return]
    if hasattr(parameter, "ds_tensor") and parameter.numel() == 0:  # ZeRO-3; empty unless gathered
        return parameter.ds_tensor[: shard_numel(parameter)]  # type: ignore[no-any-return]
    return parameter  # type: ignore[no-any-return]


def shard_numel(parameter: Any) -> int:
    """Return how many elements of a parameter this rank's shard under ZeRO-3 holds.

    All shards are as long as the first. Where the ranks do not divide the parameter, the last ones end with padding,
    which DeepSpeed leaves unwritten: whatever the memory held, NaN among it.
    """
    length = int(parameter.ds_tensor.ds_numel)
    start = length * int(parameter.ds_zero_partition_rank)
    return min(max(int(parameter.ds_numel) - start, 0), length)


def full_tensor(tensor: Any) -> Tensor:
    """Return all of a tensor that FSDP2 has sharded, which is a collective; another one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def shard_like(value: Tensor, other: Any) -> Tensor:
    """Return what this rank holds of `value`, the same full tensor on every rank, in the layout of another tensor."""
    if not hasattr(other, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every rank has the value, so none sends it.
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None).to_local()


@contextmanager
def gathered(parameters: Iterable[Tensor], writer_rank: int | None = None) -> Iterator[None]:
    """Gather parameters of ZeRO-3 inside, and shard them again afterwards; full parameters stay as they are.

    Args:
        parameters: every rank has to name the same ones.
        writer_rank: the rank whose changes inside are kept; None keeps no changes.
    """
    sharded = [parameter for parameter in parameters if is_zero3_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    # A rank that writes shares its changes with the others as the block ends.
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=writer_rank):
        yield


def full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a model by name, one at a time and whole, whatever has sharded them.

    All ranks have to run through it in step where the model is sharded. A tensor is not to be kept: ZeRO-3 shards it
    again with the next one.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):  # FSDP2
            yield name, parameter.full_tensor()
            continue
        with gathered([parameter]):
            yield name, parameter


@contextmanager
def unsharded_groups(groups: Sequence[Any]) -> Iterator[None]:
    """Gather groups of FSDP2 once, and keep forward passes inside from resharding them.

    Args:
        groups: modules that FSDP2 has sharded; every rank has to name the same ones. They reshard after each forward
            pass again once the context ends.
    """
    for group in groups:
        group.unshard()
        group.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(True, recurse=False)
            group.reshard()


# ---- What is inside ----


def nonfinite_name(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or an infinity; None if there is none.

    Of sharded tensors, this rank's shard counts. Whole numbers, in which 4-bit weights are stored, are finite.
    """
    names: list[str] = []
    largest: dict[torch.device, list[Tensor]] = {}
    for name, tensor in tensors:
        shard = local_shard(tensor).detach()
        if not shard.is_floating_point() or shard.numel() == 0:
            continue
        names.append(name)
        # The largest magnitude is NaN or infinite exactly where an entry is, and computing it takes no memory.
        norm = torch.linalg.vector_norm(shard, torch.inf)
        largest.setdefault(norm.device, []).append(torch.stack([norm.float(), norm.new_tensor(len(names) - 1).float()]))
    # ---- One copy to the host per device ----
    bad: list[int] = []
    for pairs in largest.values():
        table = torch.stack(pairs).cpu()  # [tensors, 2]: magnitude, position in `names`
        bad += [int(index) for index in table[~table[:, 0].isfinite(), 1].tolist()]
    return names[min(bad)] if bad else None


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that must stay in one piece, as the model of transformers names them itself.

    Empty where the model does not say what its layers are (`_no_split_modules`).
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    # FSDP2 makes a subclass of the layer's class, whose name differs.
    layers = [module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}]
    # Some models name a block and a layer inside of it; a block is gathered as one.
    nested = {module for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if layer not in nested]


def is_peft_wrapper(model: nn.Module) -> bool:
    """Whether the model is a wrapper of PEFT around a model of transformers."""
    return hasattr(model, "get_base_model")


def unwrap_peft(model: Any) -> Any:
    """Return the model inside a wrapper of PEFT, its adapters included, or the model itself if it has no wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def language_model(model: Any) -> Any:
    """Return the model inside a PEFT wrapper that adapts layers; a wrapper for prompt learning is kept."""
    if not hasattr(model, "get_base_model") or model.active_peft_config.is_prompt_learning:
        return model
    return model.get_base_model()
