"""FSDP2: parameters, gradients and optimizer state in shards, gathered layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from remax_lightning.errors import UserError
from remax_lightning.strategies.checkpoints import whole_folder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ReMaxFSDP2Strategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with every process in one group of FSDP2, and no tensor parallelism.

    Lightning's own default is the opposite. Works on CPU processes too, over gloo.

    Args:
        save_distributed_checkpoint: each rank writes its own shards; false gathers them into one file.
        process_group_backend: `nccl` or `gloo`; None takes what fits the device.
        timeout: how long a rank waits for the others; a rollout is one wait.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Join the other processes, all of them in one group."""
        # Only now is it known how many there are.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint whole or not at all."""
        with whole_folder(self, filepath) as path:
            super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any number of processes.

        Raises:
            UserError: if another strategy has written it.
        """
        path = Path(checkpoint_path)
        if path.is_dir() and not (path / "meta.pt").exists():
            raise UserError(
                f"ckpt_path: {str(path)!r} is no checkpoint of FSDP2; set the trainer.strategy that it was saved under"
            )
        return super().load_checkpoint(checkpoint_path, weights_only)


def shard_policy(policy: Any, mesh: DeviceMesh) -> None:
    """Shard a loaded policy in place: each of its layers is a group of its own, the rest is one.

    Args:
        policy: a whole model, the same on every rank.
        mesh: Lightning's mesh of `data_parallel` and `tensor_parallel`.
    """
    from torch.distributed.fsdp import fully_shard

    group = mesh["data_parallel"]
    names = set(getattr(policy, "_no_split_modules", None) or ())
    for module in policy.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=group)
    fully_shard(policy, mesh=group)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gather all groups of a sharded model once, and keep forward passes from giving them up inside."""
    from torch.distributed.fsdp import FSDPModule

    # The root comes first: a layer that is met before it would take itself for a root.
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in groups:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in groups:
            # FSDP2 keeps a root whole after a forward pass, because the backward pass begins there.
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()
