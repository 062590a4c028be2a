"""ZeRO-3: the only user of DeepSpeed's private interface of hooks and parameter partitioning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from remax_lightning.distributed import broadcast
from remax_lightning.errors import UserError
from remax_lightning.models.checkpoint_reader import RESUME_KEY
from remax_lightning.models.shard_reader import load_deepspeed_file, read_zero
from remax_lightning.sharding import decoder_layers, full_shape, gathered, shard_numel
from remax_lightning.strategies.gather_mode import lockstep

_offloads: WeakKeyDictionary[nn.Module, ref[Any]] = WeakKeyDictionary()
"""The `DeepSpeedZeRoOffload` object that shards a module; weak, because it refers to the module."""


def register_engine(root: nn.Module, engine: Any) -> None:
    """Record which engine shards the modules under `root`, so that `unsharded` works for any of them.

    Args:
        root: the module that the engine wraps.
        engine: the DeepSpeed engine. In validation there is no optimizer, and `engine.optimizer` is the offload object.
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    for module in root.modules():
        _offloads[module] = ref(offload)


def clear_padding(optimizer: Any) -> None:
    """Zero the padding in DeepSpeed's float32 copies of the weights.

    A weight decay that is added to the gradient (`torch.optim.Adam`, SGD) would carry a NaN from there into the
    optimizer's state, and the run would save no checkpoint.

    Args:
        optimizer: that of the engine.
    """
    # Copies that are kept on a disk are empty here.
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        start = 0
        for parameter in parameters:
            end = start + parameter.partition_numel()
            flat.data[start + shard_numel(parameter) : end].zero_()
            start = end


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather all parameters of the model once, and turn off the hooks of ZeRO-3 inside.

    Raises:
        UserError: if the engine is not that of `ReMaxDeepSpeedStrategy`.
    """
    with _without_hooks(model), gathered(model.parameters()):
        yield


@contextmanager
def layerwise(model: nn.Module) -> Iterator[None]:
    """Gather everything outside the layers once, and each layer for its forward pass, in lockstep on all ranks.

    The hooks of ZeRO-3 would do the same with a collective for every submodule, and would search the trace of the last
    training pass each time. Nothing is prefetched: gathering a layer takes far longer than decoding a token with it.

    Raises:
        UserError: if the engine is not that of `ReMaxDeepSpeedStrategy`.
    """
    # ---- Outside of the layers: gathered once. Layers: gathered by hooks of our own ----
    layers = decoder_layers(model)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    with ExitStack() as stack:
        stack.enter_context(_without_hooks(model))
        stack.enter_context(gathered(parameter for parameter in model.parameters() if parameter not in inside))
        stack.enter_context(lockstep(layers, _gather_and_reshard))
        for layer in layers:
            # These run after the announcement, which `lockstep` puts before all other hooks.
            stack.callback(layer.register_forward_pre_hook(_gather).remove)
            stack.callback(layer.register_forward_hook(_reshard).remove)
        yield


def full_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the full value of each parameter, gathered one at a time; every rank has to run to the end."""
    with _without_hooks(model):
        for name, parameter in model.named_parameters():
            with gathered([parameter]):
                yield name, parameter.detach()


def _gather(layer: nn.Module, *_: Any) -> None:
    parameters: list[Any] = list(layer.parameters())
    parameters[0].all_gather_coalesced(parameters).wait()  # one collective for the whole layer


def _reshard(layer: nn.Module, *_: Any) -> None:
    parameters: list[Any] = list(layer.parameters())
    parameters[0].partition(parameters)


def _gather_and_reshard(layer: nn.Module) -> None:
    _reshard(layer)  # a failed forward pass leaves it gathered
    _gather(layer)
    _reshard(layer)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Shard all parameters, and turn off the hooks of ZeRO-3 inside.

    With the hooks, every forward pass is a collective even on gathered parameters, and so is every access to a
    parameter in a training step. A rank whose responses end early would leave the others waiting.
    """
    reference = _offloads.get(model)
    offload = reference() if reference is not None else None
    if offload is None:
        raise UserError(
            "rollouts cannot gather a policy that trainer.strategy has sharded with ZeRO-3; use"
            " remax_lightning.strategies.ReMaxDeepSpeedStrategy, which has the same arguments"
        )
    # Gathering skips a parameter that a hook is prefetching, and would leave it empty.
    offload.partition_all_parameters()
    # ZeRO-3 replaces the dictionary of parameters by one that gathers on access while this mark is set.
    in_forward = [module._parameters for module in offload.module.modules() if module._parameters._in_forward]
    _remove_hooks(offload)
    for parameters in in_forward:
        parameters._in_forward = False
    try:
        yield
    finally:
        for parameters in in_forward:
            parameters._in_forward = True
        _restore_hooks(offload)


def _remove_hooks(offload: Any) -> None:
    for hook in [*offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def _restore_hooks(offload: Any) -> None:
    # The trace for prefetching refers to the module numbers of the old hooks.
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    offload._register_deepspeed_module(offload.module)


def load_weights(root: Any, checkpoint: Path) -> dict[str, Any]:
    """Load the weights of a checkpoint of any number of ranks without an optimizer, which DeepSpeed cannot do.

    Args:
        root: the sharded LightningModule; every rank has to call this.
        checkpoint: a checkpoint folder of ZeRO-3.

    Returns:
        The rest of the checkpoint.

    Raises:
        UserError: if the checkpoint is of another model.
    """
    # ---- Rank 0 reads the full weights, and all ranks check that they fit ----
    strategy = root.trainer.strategy
    weights: dict[str, Any] = {}
    if strategy.is_global_zero:
        weights = read_zero(checkpoint)
    # With an adapter its weights alone are saved, and the base has been loaded from its own path.
    saved = root.state_dict(keep_vars=True).keys()
    parameters = {name: parameter for name, parameter in root.named_parameters() if name in saved}
    same_shapes = all(
        name in weights and weights[name].shape == full_shape(parameter) for name, parameter in parameters.items()
    )
    if not broadcast(strategy, same_shapes):
        raise UserError(f"ckpt_path: {str(checkpoint)!r} holds another model than model.policy")
    for name, parameter in parameters.items():
        # One parameter at a time, so that no device holds the full model.
        with gathered([parameter], writer_rank=0):
            if strategy.is_global_zero:
                parameter.data.copy_(weights[name])
    # ---- Buffers, which are not sharded, and the state of the trainer ----
    file = checkpoint / "checkpoint" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    rest = load_deepspeed_file(file, key=RESUME_KEY)
    buffers = dict(root.named_buffers())
    for name in rest["buffer_names"]:
        buffers[name].copy_(rest["module"][name])
    return rest


@contextmanager
def zero_init_disabled() -> Iterator[None]:
    """Create modules without sharding inside, although an outer `zero.Init` is active."""
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()
