"""The one place for DeepSpeed's private interface: ZeRO-3's hooks and its record of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from remax_lightning.distributed import broadcast
from remax_lightning.errors import UserError
from remax_lightning.sharding import decoder_layers, full_shape, gathered
from remax_lightning.strategies.layerwise import lockstep

_offloads: WeakKeyDictionary[nn.Module, ref[Any]] = WeakKeyDictionary()
"""The object of the engine that shards a module's parameters; weak, because it refers to the module."""


def register_engine(root: nn.Module, engine: Any) -> None:
    """Record which engine shards the modules under `root`, so that `unsharded` finds it for any of them.

    Args:
        root: what the engine was made of.
        engine: the DeepSpeed engine. Without an optimizer, as in validation alone, its optimizer is the offload itself.
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    for module in root.modules():
        _offloads[module] = ref(offload)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather the model's parameters once, and keep ZeRO-3 from gathering any by itself inside.

    Raises:
        UserError: if the engine is not that of `ReMaxDeepSpeedStrategy`.
    """
    with _without_hooks(model), gathered(model.parameters()):
        yield


@contextmanager
def layerwise(model: nn.Module) -> Iterator[None]:
    """Gather what is outside the layers once, and each layer for its own forward passes, in lockstep on all ranks.

    ZeRO-3's own hooks would do that too, but with a collective for every module, and a search of their record of the
    last training pass at each. Nothing is prefetched: a layer takes far longer to gather than to decode a token.

    Raises:
        UserError: if the engine is not that of `ReMaxDeepSpeedStrategy`.
    """
    layers = decoder_layers(model)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    with ExitStack() as stack:
        stack.enter_context(_without_hooks(model))
        stack.enter_context(gathered(parameter for parameter in model.parameters() if parameter not in inside))
        stack.enter_context(lockstep(layers, _gather_and_reshard))
        for layer in layers:
            # Behind the announcement, which goes before all other hooks.
            stack.callback(layer.register_forward_pre_hook(_gather).remove)
            stack.callback(layer.register_forward_hook(_reshard).remove)
        yield


def _gather(layer: nn.Module, *_: Any) -> None:
    parameters: list[Any] = list(layer.parameters())
    parameters[0].all_gather_coalesced(parameters).wait()


def _reshard(layer: nn.Module, *_: Any) -> None:
    parameters: list[Any] = list(layer.parameters())
    parameters[0].partition(parameters)


def _gather_and_reshard(layer: nn.Module) -> None:
    _reshard(layer)  # a failed forward pass has not done so
    _gather(layer)
    _reshard(layer)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Shard all parameters, and keep ZeRO-3 from gathering any by itself inside.

    With its hooks on, every forward pass is a collective even on gathered parameters, and a rank whose responses end
    early would leave the others waiting in it. So is every access to a parameter during a training step.
    """
    known = _offloads.get(model)
    offload = known() if known is not None else None
    if offload is None:
        raise UserError(
            "trainer.strategy partitions the policy (ZeRO-3) in a way that rollouts cannot gather; take"
            " remax_lightning.strategies.ReMaxDeepSpeedStrategy, which has the arguments of Lightning's"
        )
    # Gathering passes by a parameter that a hook has begun to fetch ahead, and would leave it empty.
    offload.partition_all_parameters()
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
    # The order of modules that was recorded for prefetching numbers them as the old hooks did.
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    offload._register_deepspeed_module(offload.module)


def load_weights(root: Any, checkpoint: Path) -> dict[str, Any]:
    """Load the weights of a checkpoint of any number of ranks into an engine that does not train; DeepSpeed cannot.

    Args:
        root: the LightningModule, partitioned; every rank has to call this.
        checkpoint: a folder of ZeRO-3.

    Returns:
        The rest of the checkpoint.

    Raises:
        UserError: if it is a checkpoint of another model.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    strategy = root.trainer.strategy
    weights: dict[str, Any] = {}
    if strategy.is_global_zero:
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="checkpoint")
    parameters = dict(root.named_parameters())
    fit = all(
        name in weights and weights[name].shape == full_shape(parameter) for name, parameter in parameters.items()
    )
    if not broadcast(strategy, fit):
        raise UserError(f"ckpt_path: {str(checkpoint)!r} holds another model than model.policy")
    for name, parameter in parameters.items():
        with gathered([parameter], writer_rank=0):
            if strategy.is_global_zero:
                parameter.data.copy_(weights[name])
    file = checkpoint / "checkpoint" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    rest: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
    buffers = dict(root.named_buffers())
    for name in rest["buffer_names"]:
        buffers[name].copy_(rest["module"][name])
    return rest


@contextmanager
def zero_init_disabled() -> Iterator[None]:
    """Build plain modules inside, although a `zero.Init` is open around."""
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()
