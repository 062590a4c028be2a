"""Runs inside a vLLM server: a transfer engine that loads the policy's weights from files.

`remax serve` puts this folder on the server's path and names `Extension` as the extension of its workers, so that each
of them imports this module before it loads its model. It needs vLLM, torch and safetensors alone, since the server's
environment has no `remax_lightning`; where there is no vLLM, it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

BACKEND = "remax_files"
"""Name of the engine; the trainer asks for it."""


class Extension:
    """Is mixed into vLLM's workers; that they import it registers the engine."""


@dataclass
class FilesInitInfo:
    """Nothing: both sides see the files."""


@dataclass
class FilesUpdateInfo:
    """Where the weights are.

    Args:
        folder: holds `*.safetensors` with the names of published checkpoints.
    """

    folder: str


def load_folder(model: Any, folder: Path, names: set[str]) -> None:
    """Load all weights of a vLLM model from a folder, as vLLM loads a checkpoint.

    Args:
        model: that is updated.
        folder: with the weights.
        names: of the model's parameters.

    Raises:
        ValueError: if there are none, or they leave out a weight of the model.
    """
    loaded = model.load_weights(read_folder(folder))
    # Some models do not say what they have loaded.
    missing = sorted(names - set(loaded)) if loaded is not None else []
    if missing:
        raise ValueError(f"{str(folder)!r} has no weights for {', '.join(missing[:3])}")


def pack_shared_heads(model: Any) -> None:
    """Pack the weights of output heads again that are those of the embedding.

    On a CPU vLLM packs a copy of a linear layer's weights when the layer has loaded them. A head that shares them loads
    none, and would go on with the copy of its first weights.
    """
    for module in model.modules():
        # Other packed layers keep no weights besides the copy.
        if hasattr(module, "cpu_linear") and module.weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)


def read_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a folder by name.

    Raises:
        ValueError: if it has none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"there are no weights in {str(folder)!r}; the server has to see the trainer's transfer_dir")
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                yield name, opened.get_tensor(name)


def register() -> None:
    """Register the engine with vLLM, once in each process."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class FilesTransferEngine(WeightTransferEngine):  # type: ignore[misc, type-arg, unused-ignore]
        """Loads all weights from a folder, layer by layer, as vLLM's other engines do."""

        init_info_cls, update_info_cls = FilesInitInfo, FilesUpdateInfo

        def init_transfer_engine(self, init_info: FilesInitInfo) -> None:
            """Do nothing; there is no connection."""

        def start_weight_update(self) -> None:
            """Prepare the layers for weights as a checkpoint has them."""
            # Before, since tied weights are one parameter until then.
            self.names = {name for name, _ in self.model.named_parameters()}
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: FilesUpdateInfo) -> None:
            """Load the files."""
            load_folder(self.model, Path(update_info.folder), self.names)

        def finish_weight_update(self) -> None:
            """Process the layers for the kernels, as after loading a checkpoint."""
            finalize_layerwise_reload(self.model, self.model_config)
            pack_shared_heads(self.model)

        def shutdown(self) -> None:
            """Do nothing; there is no connection."""

    if BACKEND not in WeightTransferEngineFactory._registry:  # the module may be imported under two paths
        WeightTransferEngineFactory.register_engine(BACKEND, FilesTransferEngine)


if find_spec("vllm") is not None:
    register()
