"""Models that only ever run forward, the reference and reward models, and where they are kept between their passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from remax_lightning.distributed import all_reduce, num_ranks
from remax_lightning.errors import UserError

Placement = Literal["replicate", "shard", "cpu"]


def check_placement(placement: str, key: str) -> None:
    """Refuse a placement that there is not.

    Raises:
        UserError: naming `key`.
    """
    if placement not in get_args(Placement):
        raise UserError(f"{key} must be one of {', '.join(get_args(Placement))}, got {placement!r}")


class FrozenModel:
    """A model without gradients, run inside of `running()` only.

    Args:
        model: on the CPU or on `device`, the same on every rank; it is changed in place.
        placement: `replicate` keeps it whole on the device. `shard` keeps its layers in equal shares over all ranks and
            gathers each for the moment in which it runs; embeddings, last norm and head stay whole. `cpu` keeps it in
            the host's memory and brings it whole to the device for its passes. One process has nobody to share with,
            so `shard` is `replicate` there.
        device: where it runs.
        key: of the placement in the configuration, for messages.
        resident: a part of it that is read outside of its passes too, and stays on the device.

    Raises:
        UserError: if the model has no layers to share, or is quantized and is to be moved about.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        device: torch.device,
        key: str,
        resident: nn.Module | None = None,
    ) -> None:
        self.model, self.device = model.eval().requires_grad_(False), device
        if placement != "replicate" and getattr(model, "is_quantized", False):
            raise UserError(f"{key} must be replicate for a quantized model, got {placement}")
        self._parked: list[tuple[dict[str, Any], str]] = []
        self._body: nn.Module | None = None
        if placement == "cpu":
            self._park(resident)
            return
        if placement == "shard" and num_ranks() > 1:
            self._body = _shard_layers(model, device, key)
        model.to(device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have the model ready for passes inside.

        Under `shard` all ranks have to enter and leave; how many passes each of them makes is its own affair.
        """
        # What a strategy or FSDP2 keeps from a pass must not be a tensor of Lightning's `inference_mode`.
        with torch.inference_mode(False), torch.no_grad():
            if self._body is not None:
                with equal_passes(self._body, self.device):
                    yield
            else:
                with self._brought():
                    yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have the model whole on every rank for passes inside, of which no rank waits for another.

        All ranks have to enter and leave. For many passes that keep what they made, as decoding does: under `shard`
        layers are gathered once, and repeating a pass for others would write into its own cache.
        """
        with torch.inference_mode(False), torch.no_grad():
            if self._body is None:
                with self._brought():
                    yield
            else:
                with _gathered(self._body):
                    yield

    def _park(self, resident: nn.Module | None) -> None:
        """Take the model to the host's memory, pinned where that makes copies faster."""
        stays = {id(tensor) for _, _, tensor in _slots(resident)} if resident is not None else set()
        there: dict[int, Tensor] = {}
        for slots, name, tensor in _slots(self.model):
            if id(tensor) not in there:
                pins = self.device.type == "cuda" and id(tensor) not in stays
                there[id(tensor)] = _moved(tensor, self.device if id(tensor) in stays else torch.device("cpu"), pins)
            slots[name] = there[id(tensor)]
            if id(tensor) not in stays:
                self._parked.append((slots, name))

    @contextmanager
    def _brought(self) -> Iterator[None]:
        """Bring what is parked to the device inside. Nothing changes it there, so nothing has to be copied back."""
        away, here = [(slots, name, slots[name]) for slots, name in self._parked], dict[int, Tensor]()
        for slots, name, host in away:
            if id(host) not in here:  # tied weights stay tied
                here[id(host)] = _moved(host, self.device)
            slots[name] = here[id(host)]
        try:
            yield
        finally:
            # The device's allocator has the memory again as soon as nothing points to it.
            for slots, name, host in away:
                # Some rotary embeddings put new frequencies in the place of the old.
                slots[name] = host if slots[name] is here[id(host)] else _moved(slots[name], torch.device("cpu"))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model of transformers that must not be taken apart, as it names them itself."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


@contextmanager
def _gathered(body: Any) -> Iterator[None]:
    """Hold all groups of what `_shard_layers` returned whole inside."""
    from torch.distributed.fsdp import FSDPModule

    groups: list[Any] = [module for module in body.modules() if isinstance(module, FSDPModule)]
    body._get_fsdp_state()._lazy_init()  # otherwise the first layer that runs takes itself for the root
    for group in groups:
        group.unshard()
        group.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(True, recurse=False)
            group.reshard()


@contextmanager
def equal_passes(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Let ranks make unequal numbers of passes of a module whose every pass is a meeting of all ranks.

    Each pass is announced, and a rank that has made all of its own, at least one, repeats its last one while others
    still make theirs.

    Args:
        module: through which every pass goes.
        device: of the announcements.
    """
    last: tuple[Any, Any] = (), {}

    def announce(_: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal last
        last = args, kwargs
        all_reduce(torch.ones((), dtype=torch.long, device=device), "sum")

    handle = module.register_forward_pre_hook(announce, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    # Only without an error: after one there is no pass to go on with, and the run is over.
    while int(all_reduce(torch.zeros((), dtype=torch.long, device=device), "sum")) > 0:
        with torch.no_grad():
            module(*last[0], **last[1])


def _slots(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield every place where a module keeps a parameter or buffer, with what is there; tied weights have several."""
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is not None:
                    yield slots, name, tensor


def _moved(tensor: Tensor, device: torch.device, pins: bool = False) -> Tensor:
    moved = tensor.detach().to(device, non_blocking=device.type != "cpu")
    moved = moved.pin_memory() if pins else moved
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def _shard_layers(model: Any, device: torch.device, key: str) -> nn.Module:
    """Spread the layers over all ranks by FSDP2, whatever the strategy of the policy, and return their parent.

    The parent is what every pass goes through, also one that reads hidden states and leaves the head out; what is
    beside the layers stays whole, so that a head can be read where it stands.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = decoder_layers(core)
    if not layers:
        raise UserError(
            f"{key} shard needs a model that names its layers (_no_split_modules), got {type(core).__name__};"
            " set it to cpu or replicate"
        )
    mesh = init_device_mesh(device.type, (num_ranks(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    shared = {id(parameter) for layer in layers for parameter in layer.parameters()}
    beside = {parameter for parameter in core.parameters() if id(parameter) not in shared}
    # One parent for all layers, so that the next is fetched while one runs.
    parent = _parent(core, layers)
    fully_shard(parent, mesh=mesh, reshard_after_forward=True, ignored_params=beside)
    return parent


def _parent(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """Return the innermost module that runs all of the layers. Some models go to it directly, past their base model."""
    around = [each for each in model.modules() if set(layers) <= set(each.modules())]
    return [each for each in around if not isinstance(each, nn.ModuleList)][-1]
