"""Frozen models (reference, reward model), and where their weights are stored between forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from remax_lightning.distributed import num_ranks, reduce_over_ranks
from remax_lightning.errors import UserError
from remax_lightning.sharding import decoder_layers, fsdp2_groups, unsharded_groups, unwrap_peft

Placement = Literal["replicate", "shard", "cpu"]


def check_placement(placement: str, key: str) -> None:
    """Refuse an unknown placement.

    Raises:
        UserError: naming `key`.
    """
    if placement not in get_args(Placement):
        raise UserError(f"{key} must be one of {', '.join(get_args(Placement))}, got {placement!r}")


class FrozenModel:
    """A model without gradients. Call `place` once its device is known, and run it inside of `running()` only.

    Args:
        model: on the CPU, the same on every rank; changed in place.
        placement: `replicate` keeps it unsharded on the device. `shard` shards its layers over all ranks and gathers
            each one while it runs; embeddings, last norm and head stay unsharded. `cpu` stores it in host memory and
            copies it to the device for forward passes. With one process `shard` is `replicate`.
        key: configuration key of the placement, for messages.

    Raises:
        UserError: if the model is quantized and the placement is not `replicate`.
    """

    device: torch.device | None = None
    """Of the forward passes; None before `place`."""

    def __init__(self, model: Any, placement: Placement, key: str) -> None:
        if placement != "replicate" and getattr(model, "is_quantized", False):
            raise UserError(f"{key} must be replicate for a quantized model, got {placement}")
        self.model, self.placement, self.key = model.eval().requires_grad_(False), placement, key
        self._parked: list[tuple[dict[str, Any], str]] = []
        self._body: Any = None  # what `_shard_layers` returned

    def place(self, device: torch.device, resident: nn.Module | None = None) -> None:
        """Move the model to its placement; a second call with the same device changes nothing.

        Args:
            device: device of the forward passes.
            resident: a submodule that is also read outside of forward passes, so it stays on the device.

        Raises:
            UserError: if `shard` finds no layers.
        """
        if self.device == device:
            return
        self.device = device
        if self.placement == "cpu":
            self._move_to_host(device, resident)
            return
        # Shard before moving, so that no device ever holds the whole model.
        if self.placement == "shard" and num_ranks() > 1:
            self._body = _shard_layers(self.model, device, self.key)
        self.model.to(device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Make the model ready for forward passes inside.

        Under `shard` all ranks have to enter and leave; they may run different numbers of passes.
        """
        if self.device is None:
            raise RuntimeError("place(device) must be called before the model is run")
        # Tensors that a strategy or FSDP2 keeps from a pass must not be inference tensors of Lightning.
        with torch.inference_mode(False), torch.no_grad():
            if self._body is not None:
                with equalize_passes(self._body, self.device):
                    yield
            elif self._parked:
                with self._on_device(self.device):
                    yield
            else:
                yield

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Unshard the model on every rank, so that forward passes inside need no communication.

        All ranks have to enter and leave. Decoding needs this: under `shard` layers are gathered once, and a pass that
        `running` repeats for other ranks would write into the key-value cache.
        """
        if self._body is None:
            with self.running():
                yield
            return
        with torch.inference_mode(False), torch.no_grad():
            # Otherwise the first layer that runs takes itself for the root.
            self._body._get_fsdp_state()._lazy_init()
            with unsharded_groups(fsdp2_groups(self._body)):
                yield

    def _move_to_host(self, device: torch.device, resident: nn.Module | None) -> None:
        """Move the model to host memory, pinned if the device is CUDA."""
        self._parked = []
        # By identity, so that tied weights are copied once and stay tied.
        stays = {id(tensor) for _, _, tensor in _tensor_slots(resident)} if resident is not None else set()
        host_tensors: dict[int, Tensor] = {}
        for slots, name, tensor in _tensor_slots(self.model):
            if id(tensor) not in host_tensors:
                pin_memory = device.type == "cuda" and id(tensor) not in stays
                host_tensors[id(tensor)] = _copy_to_device(
                    tensor, device if id(tensor) in stays else torch.device("cpu"), pin_memory
                )
            slots[name] = host_tensors[id(tensor)]
            if id(tensor) not in stays:
                self._parked.append((slots, name))

    @contextmanager
    def _on_device(self, device: torch.device) -> Iterator[None]:
        """Copy the parked tensors to the device inside. They do not change there, so nothing is copied back."""
        parked = [(slots, name, slots[name]) for slots, name in self._parked]
        on_device: dict[int, Tensor] = {}
        for slots, name, host in parked:
            if id(host) not in on_device:  # tied weights stay tied
                on_device[id(host)] = _copy_to_device(host, device)
            slots[name] = on_device[id(host)]
        try:
            yield
        finally:
            # The allocator can reuse the device memory once nothing refers to it.
            for slots, name, host in parked:
                # Some rotary embeddings replace their frequencies during a pass; these are copied back.
                slots[name] = (
                    host if slots[name] is on_device[id(host)] else _copy_to_device(slots[name], torch.device("cpu"))
                )


@contextmanager
def equalize_passes(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Let ranks run different numbers of passes of a module whose forward pass is a collective.

    Each pass is announced. A rank that has finished its passes (at least one) repeats the last one while others still
    run theirs.

    Args:
        module: the module that every pass runs.
        device: device of the announcements.
    """
    # Arguments of the last pass, which is repeated for ranks that have more of them.
    last: tuple[Any, Any] = (), {}

    # ---- Every pass of this rank adds 1 to a sum over ranks ----

    def announce(_: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal last
        last = args, kwargs
        reduce_over_ranks(torch.ones((), dtype=torch.long, device=device), "sum")

    handle = module.register_forward_pre_hook(announce, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    # ---- The rest of the ranks: take part with 0 until no rank announces a pass. Skipped after an error, which ends
    # the run ----
    while int(reduce_over_ranks(torch.zeros((), dtype=torch.long, device=device), "sum")) > 0:
        with torch.no_grad():
            module(*last[0], **last[1])


def _tensor_slots(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield the dictionary, name and tensor of every parameter and buffer; tied weights appear several times."""
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is not None:
                    yield slots, name, tensor


def _copy_to_device(tensor: Tensor, device: torch.device, pin_memory: bool = False) -> Tensor:
    # Copies from pinned memory do not block the host; what reads them on the device is queued behind them.
    moved = tensor.detach().to(device, non_blocking=device.type != "cpu")
    moved = moved.pin_memory() if pin_memory else moved
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def _shard_layers(model: Any, device: torch.device, key: str) -> nn.Module:
    """Shard the layers over all ranks with FSDP2, whatever the strategy of the policy, and return their parent.

    Every pass runs the parent, also a pass that stops at the hidden states. Modules beside the layers stay unsharded,
    so that the head can be read directly.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    core = unwrap_peft(model)
    layers = decoder_layers(core)
    if not layers:
        raise UserError(
            f"{key} shard needs a model that names its layers (_no_split_modules), got {type(core).__name__};"
            " set it to cpu or replicate"
        )
    mesh = init_device_mesh(device.type, (num_ranks(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    beside = {parameter for parameter in core.parameters() if id(parameter) not in in_layers}
    # One FSDP2 parent for all layers, so that the next layer is prefetched while one runs.
    parent = _common_parent(core, layers)
    fully_shard(parent, mesh=mesh, reshard_after_forward=True, ignored_params=beside)
    return parent


def _common_parent(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """Return the innermost module that contains all layers. Some models call it directly, not their base model."""
    # `modules` goes from the outside in, so the last one that has all layers is the innermost.
    ancestors = [module for module in model.modules() if set(layers) <= set(module.modules())]
    return [module for module in ancestors if not isinstance(module, nn.ModuleList)][-1]
