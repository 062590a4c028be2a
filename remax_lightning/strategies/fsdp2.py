"""FSDP2: parameters, gradients and optimizer state are sharded, layers are gathered one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from remax_lightning.distributed import broadcast
from remax_lightning.errors import RankError, UserError
from remax_lightning.files import is_disk_error
from remax_lightning.sharding import decoder_layers, full_tensor, unsharded_groups
from remax_lightning.strategies.atomic_checkpoint import save_folder_atomically
from remax_lightning.strategies.checks import check_checkpoint, is_fitting
from remax_lightning.strategies.gather_mode import Gather, check_gather, lockstep, register_gather_mode

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.distributed.device_mesh import DeviceMesh


class ReMaxFSDP2Strategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all processes in one FSDP2 group, and no tensor parallelism.

    Lightning's default is the opposite. It also runs on CPU processes, over gloo.

    Args:
        save_distributed_checkpoint: each rank writes its own shards; false gathers them into one file.
        process_group_backend: `nccl` or `gloo`; None chooses by the device.
        timeout: how long a rank waits for the others. It has to be longer than a rollout.
        gather: how rollouts gather the policy. `once` gathers it before the rollout and holds it on every device until
            the end, which is fast. `layerwise` gathers one layer at a time, for every token, which is many times slower
            and needs little memory. `auto` is `once` if every device has enough free memory.

    Raises:
        UserError: if `gather` is unknown.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        gather: Gather = "auto",
    ) -> None:
        self.gather = check_gather(gather)
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Join all processes in one group."""
        # The number of processes is known only now.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Prepare the model, and register how rollouts gather it."""
        super().setup(trainer)
        if self.lightning_module is not None:
            register_gather_mode(self.lightning_module, self.gather)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint atomically."""
        if not self._save_distributed_checkpoint:  # one file, which `AtomicCheckpointIO` writes
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        # Bound here: within the function below, `super()` would not know its object.
        save = super().save_checkpoint

        def write(folder: Path) -> None:
            with _errors_of_ranks():
                save(checkpoint, folder, storage_options)

        save_folder_atomically(self, filepath, write)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: ARG002
        """Read a checkpoint of any number of processes, and run no code that it may hold, whatever `weights_only` asks.

        Raises:
            UserError: if another strategy saved it.
        """
        path = Path(broadcast(self, checkpoint_path))
        if path.is_dir() and not (path / "meta.pt").exists():
            raise UserError(
                f"ckpt_path: {str(path)!r} is not a checkpoint of FSDP2; set the trainer.strategy that it was saved"
                " under"
            )
        check_checkpoint(self, path, self.optimizers if is_fitting(self.lightning_module) else [])
        if path.is_dir():
            with _errors_of_ranks():
                return super().load_checkpoint(path, weights_only=True)
        # ---- A file of DDP, of one process or of `save_distributed_checkpoint: false` ----
        # Lightning would take its optimizer states in the order of the model, but they are in that of the groups.
        optimizers, self.optimizers = self.optimizers, []
        try:
            checkpoint = super().load_checkpoint(path, weights_only=True)
        finally:
            self.optimizers = optimizers
        saved_names = checkpoint.get(PARAMETER_NAMES) or [None] * len(optimizers)
        states = checkpoint.get("optimizer_states") or []
        for optimizer, state, names in zip(optimizers, states, saved_names, strict=False):
            self._load_optimizer_state(optimizer, state, names, path)
        return checkpoint

    def _load_optimizer_state(self, optimizer: Any, state: dict[str, Any], names: list[str] | None, path: Path) -> None:
        """Load an unsharded optimizer state by the names of the parameters."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        model = cast(nn.Module, self.model)
        ids = [number for group in state["param_groups"] for number in group["params"]]
        if ids != list(range(len(ids))):  # 0.2 wrote files of FSDP2 in the order of the model
            names = [name for name, _ in model.named_parameters()]
        names = names or optimizer_parameter_names(model, optimizer) or []
        if len(names) <= max(ids, default=-1):
            raise UserError(
                f"ckpt_path: {str(path)!r} holds optimizer states of {len(ids)} parameters, but {len(names)} are"
                " trained; resume with the model and the adapter of the checkpoint"
            )
        # torch's distributed checkpoint finds parameters by name, the file numbers them in the order of the groups.
        by_name: dict[str, Any] = {
            "state": {names[number]: value for number, value in state["state"].items()},
            "param_groups": [
                group | {"params": [names[number] for number in group["params"]]} for group in state["param_groups"]
            ],
        }
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(model, optimizer, optim_state_dict=by_name, options=options)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the state for a checkpoint; in one file it is in the order of the groups, as DDP reads it."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        # Lightning wraps optimizers.
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        model = cast(nn.Module, self.model)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = cast(Any, get_optimizer_state_dict(model, optimizer, options=options))
        if not self.is_global_zero:
            return state
        # Back from names to numbers, in the order of the groups.
        numbers = {name: number for number, name in enumerate(optimizer_parameter_names(model, optimizer) or [])}
        return {
            "state": {numbers[name]: value for name, value in state["state"].items()},
            "param_groups": [
                group | {"params": sorted(numbers[name] for name in group["params"])} for group in state["param_groups"]
            ],
        }


@contextmanager
def _errors_of_ranks() -> Iterator[None]:
    """Raise the error of a rank itself: torch's distributed checkpoint wraps it in a class outside of `Exception`."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values() if isinstance(failure, Exception)]
        # A full disk is only a warning, so any other error comes first.
        raise min(failures, key=is_disk_error, default=RankError(str(error))) from None


PARAMETER_NAMES = "optimizer_parameter_names"
"""Key of a checkpoint: the names of the parameters of each optimizer, in the order in which it numbers them."""


def optimizer_parameter_names(model: nn.Module, optimizer: Any) -> list[str] | None:
    """Return the names of an optimizer's parameters in its order; None where it holds others, as DeepSpeed's does."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [names[parameter] for parameter in parameters] if all(item in names for item in parameters) else None


def shard_policy(policy: Any, mesh: DeviceMesh) -> None:
    """Shard a loaded policy in place: each layer is a group, the rest of the model is another one.

    Args:
        policy: an unsharded model, the same on every rank.
        mesh: Lightning's mesh of `data_parallel` and `tensor_parallel`.
    """
    from torch.distributed.fsdp import fully_shard

    # Layers first: the root group then takes what is left, embeddings and head.
    group = mesh["data_parallel"]
    for layer in decoder_layers(policy):
        fully_shard(layer, mesh=group)
    fully_shard(policy, mesh=group)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather all groups of a sharded model once, and keep forward passes inside from resharding them."""
    layers = decoder_layers(model)
    with _unsharded_root(model), _without_hooks([model, *layers]), unsharded_groups(layers):
        yield


@contextmanager
def layerwise(model: nn.Module) -> Iterator[None]:
    """Gather what is outside the layers once, and let forward passes gather each layer, in lockstep on all ranks."""
    with _unsharded_root(model), lockstep(decoder_layers(model), _gather_and_reshard):
        yield


def full_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the full value of each parameter, gathered one at a time; every rank has to run to the end."""
    for name, parameter in model.named_parameters():
        yield name, full_tensor(parameter.detach())


def _gather_and_reshard(layer: Any) -> None:
    layer.reshard()  # a failed forward pass leaves it gathered
    layer.unshard()
    layer.reshard()


@contextmanager
def _without_hooks(groups: list[Any]) -> Iterator[None]:
    """Run unsharded groups without the hooks of FSDP2, which do nothing here and prevent CUDA graphs."""
    removed: list[tuple[Any, int, Any]] = []
    for group in groups:
        state = group._get_fsdp_state()
        for hooks, handle in (
            (group._forward_pre_hooks, state._pre_forward_hook_handle),
            (group._forward_hooks, state._post_forward_hook_handle),
        ):
            removed.append((hooks, handle.id, hooks.pop(handle.id)))
    try:
        yield
    finally:
        for hooks, key, hook in removed:
            hooks[key] = hook
            hooks.move_to_end(key, last=False)  # FSDP2's hooks come first again


@contextmanager
def _unsharded_root(model: Any) -> Iterator[None]:
    """Hold the root group unsharded: embeddings, head, and everything outside the layers."""
    # Otherwise the first module that runs becomes the root, and an engine may run a module inside a LoRA wrapper.
    model._get_fsdp_state()._lazy_init()
    model.unshard()
    model.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        # Keep `reshard_after_forward` off: FSDP2 leaves the root unsharded after a forward pass, because the backward
        # pass starts there.
        model.reshard()
