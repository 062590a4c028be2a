"""Runs inside a vLLM server: a transfer engine that loads the policy's weights from files, memory or the trainer.

`remax serve` puts this folder on the server's path and names `Extension` as the extension of its workers, so that each
of them imports this module before it loads its model. It needs vLLM, torch and safetensors alone, since the server's
environment has no `remax_lightning`; where there is no vLLM, it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from remax_vllm_group import WeightGroup  # on the path in a server alone

BACKEND = "remax"
"""Name of the engine; the trainer asks for it."""


class Extension:
    """Is mixed into vLLM's workers; that they import it registers the engine."""

    def remax_libraries(self) -> dict[str, Any]:
        """Return what the trainer must have alike to send weights here."""
        from remax_vllm_group import libraries

        worker: Any = self
        facts: dict[str, Any] = libraries(worker.device)
        return facts


@dataclass
class InitInfo:
    """Where the trainer waits for the workers; nothing where both sides see the files.

    Args:
        host: of the trainer.
        port: of its store.
        name: of the group.
        size: of the group.
        seconds: that joining and one tensor may take.
    """

    host: str = ""
    port: int = 0
    name: str = ""
    size: int = 0
    seconds: float = 600.0


@dataclass
class UpdateInfo:
    """Where the weights are, or what is sent.

    Args:
        folder: holds `*.safetensors` with the names of published checkpoints; empty where the trainer sends them.
        tensors: name, dtype and shape of what is sent, in its order.
        shared: memory of the trainer that has some of the weights; empty without it.
        places: name, dtype, shape and first byte of these.
        is_last: whether these are the last weights.
    """

    folder: str = ""
    tensors: list[list[Any]] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)
    places: list[list[Any]] = field(default_factory=list)
    is_last: bool = True


def load_some(model: Any, weights: Iterator[tuple[str, Tensor]], missing: set[str]) -> set[str]:
    """Load weights of a vLLM model, as vLLM loads a checkpoint, and return the names that are still missing.

    Args:
        model: that is updated.
        weights: by the names of published checkpoints.
        missing: names of the model's parameters that are not loaded yet.
    """
    loaded = model.load_weights(weights)
    for _ in weights:  # what the model has no use for; the trainer sends it all the same
        pass
    # Some models do not say what they have loaded.
    return missing - set(loaded) if loaded is not None else set()


def weights_of(info: UpdateInfo, group: WeightGroup | None, device: Any) -> Iterator[tuple[str, Tensor]]:
    """Return the weights that an update has, by name.

    Args:
        info: of the update.
        group: with the trainer, if there is one.
        device: of the worker.
    """
    from remax_vllm_group import read_folder, read_shared

    weights: Iterator[tuple[str, Tensor]]
    if info.folder:
        weights = read_folder(Path(info.folder))
    elif info.shared:
        weights = read_shared(info.shared, info.places, device)
    else:
        assert group is not None, "the trainer sends weights without a group"
        weights = group.receive(info.tensors)
    return weights


def pack_shared_heads(model: Any) -> None:
    """Pack the weights of output heads again that are those of the embedding.

    On a CPU vLLM packs a copy of a linear layer's weights when the layer has loaded them. A head that shares them loads
    none, and would go on with the copy of its first weights.
    """
    for module in model.modules():
        # Other packed layers keep no weights besides the copy.
        if hasattr(module, "cpu_linear") and module.weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)


def register() -> None:
    """Register the engine with vLLM, once in each process."""
    from remax_vllm_group import WeightGroup, address_towards, make_store
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class TransferEngine(WeightTransferEngine):  # type: ignore[misc, type-arg, unused-ignore]
        """Loads all weights, layer by layer, as vLLM's other engines do."""

        init_info_cls, update_info_cls = InitInfo, UpdateInfo
        group: WeightGroup | None = None

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            """Join the trainer, which waits for all workers; for files there is no connection."""
            self.shutdown()
            if not init_info.host:
                return
            store = make_store(init_info.host, init_info.port, init_info.seconds, is_master=False)
            parallel = self.parallel_config
            rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
            address = address_towards(init_info.host)
            self.group = WeightGroup(
                store, init_info.name, rank, init_info.size, self.device, address, init_info.seconds
            )

        def start_weight_update(self) -> None:
            """Prepare the layers for weights as a checkpoint has them."""
            # Before, since tied weights are one parameter until then.
            self.missing = {name for name, _ in self.model.named_parameters()}
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            """Load the files, what is in the trainer's memory, or what it sends now."""
            weights = weights_of(update_info, self.group, self.device)
            self.missing = load_some(self.model, weights, self.missing)
            if self.missing and update_info.is_last:
                raise ValueError(f"the trainer has no weights for {', '.join(sorted(self.missing)[:3])}")

        def finish_weight_update(self) -> None:
            """Process the layers for the kernels, as after loading a checkpoint."""
            finalize_layerwise_reload(self.model, self.model_config)
            pack_shared_heads(self.model)

        def shutdown(self) -> None:
            """Leave the trainer."""
            if self.group is not None:
                self.group.abort()
                self.group = None

    if BACKEND not in WeightTransferEngineFactory._registry:  # the module may be imported under two paths
        WeightTransferEngineFactory.register_engine(BACKEND, TransferEngine)


if find_spec("vllm") is not None:
    register()
