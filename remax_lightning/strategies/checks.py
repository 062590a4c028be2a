"""Checks of a checkpoint before it is loaded (whole, no code, of this model), and of what is finite in a run.

Strategies spread a gradient over ranks in their own ways, so its norm is computed here for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from remax_lightning.distributed import barrier, broadcast, gather_objects, max_over_ranks, sum_tensor_over_ranks
from remax_lightning.errors import UserError
from remax_lightning.files import describe_disk_error
from remax_lightning.models.checkpoint_reader import RESUME_KEY, CheckpointInfo, inspect_checkpoint
from remax_lightning.models.checksums import find_damage, unchecked_files
from remax_lightning.sharding import full_shape, is_sharded, nonfinite_name

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


# ---- A checkpoint before it is loaded ----


_IMPLEMENTATION = {
    *("foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay"),
    *("initial_lr", "param_names"),
}
"""Settings of an optimizer that say how it computes or what a schedule noted; they differ between versions of torch."""


def check_checkpoint(strategy: Strategy, path: Path, optimizers: list[Any]) -> None:
    """Refuse a checkpoint that is damaged or not whole, runs code, or is of another model or optimizer.

    Rank 0 looks it through, all ranks together compare checksums, and every rank raises.

    Args:
        strategy: the strategy of the trainer, which is about to load the checkpoint.
        path: the checkpoint.
        optimizers: those whose state will be loaded; none outside of training.

    Raises:
        UserError: if it cannot be loaded; the message names the file.
    """
    # ---- Rank 0 looks at everything but the numbers of the tensors ----
    module = strategy.lightning_module
    assert module is not None
    problem, names = "", []
    if strategy.is_global_zero:
        try:
            names = unchecked_files(path, RESUME_KEY)
            info = inspect_checkpoint(path)
            check_model(path, info.shapes, module)
            check_optimizers(path, info, optimizers)
        except UserError as error:
            problem = str(error)
    # ---- All raise, or none does ----
    problem, names = broadcast(strategy, (problem, names))
    if problem:
        raise UserError(problem)
    # ---- Reading every byte takes time, so the ranks share the files ----
    rank, ranks = strategy.global_rank, strategy.world_size  # type: ignore[attr-defined]
    damages = gather_objects(find_damage(path, names[rank::ranks]))
    if damage := next((item for item in damages if item is not None), None):  # the same on every rank
        raise damage.error(RESUME_KEY)


def guard_loading(strategy: Strategy) -> None:
    """Let a strategy load a checkpoint only after a look through it: it is whole and runs no code.

    This is for strategies that load by code of their own, such as Lightning's for DeepSpeed and FSDP. Those of this
    package, and those that let the checkpoint plugin read a file, look themselves.

    Args:
        strategy: the strategy of the trainer. Its `load_checkpoint` then raises a `UserError`, on all ranks.
    """
    kind = type(strategy).load_checkpoint
    is_guarded = "load_checkpoint" in vars(strategy)  # by an earlier run of the same trainer
    if is_guarded or kind is Strategy.load_checkpoint or kind.__module__.startswith("remax_lightning."):
        return
    load = strategy.load_checkpoint

    def load_checked(checkpoint_path: Any, *rest: Any, **options: Any) -> Any:
        problem = ""
        if strategy.is_global_zero:
            try:
                inspect_checkpoint(Path(checkpoint_path))
            except UserError as error:
                problem = str(error)
        if problem := broadcast(strategy, problem):
            raise UserError(problem)
        return load(checkpoint_path, *rest, **options)

    strategy.load_checkpoint = load_checked  # type: ignore[method-assign]


def check_model(path: Any, saved: Mapping[str, torch.Size], module: LightningModule) -> None:
    """Refuse weights of another model, with some of their names.

    An adapter is left to `load_state_dict` of the module, which knows what it is trained on.

    Args:
        path: what messages call the checkpoint.
        saved: shapes of the saved weights.
        module: what they are to be loaded into.

    Raises:
        UserError: if a name or a shape differs.
    """
    # `keep_vars` keeps the marks of a sharding engine on the parameters, which tell their full shapes.
    expected = {name: full_shape(value) for name, value in module.state_dict(keep_vars=True).items()}
    if any(".lora_" in name for name in (*saved, *expected)):
        return
    for names, what in (
        (sorted(expected.keys() - saved.keys()), "it lacks"),
        (sorted(saved.keys() - expected.keys()), "it has, unlike the model,"),
        (sorted(name for name in expected if saved.get(name) != expected[name]), "it has in another shape"),
    ):
        if names:
            raise UserError(
                f"{RESUME_KEY}: {str(path)!r} is of another model than that of this configuration: {what} {len(names)}"
                f" weights ({', '.join(names[:2])}); give a checkpoint of this model, or the configuration of its run"
            )


def check_optimizers(path: Any, info: CheckpointInfo, optimizers: list[Any]) -> None:
    """Refuse the state of another optimizer, which would fail in the first step or be used as something else.

    Args:
        path: what messages call the checkpoint.
        info: what it holds.
        optimizers: those whose state will be loaded; only the first is compared, and none outside of training.

    Raises:
        UserError: if there is no state, or the settings or groups of the optimizer differ.
    """
    # ---- Is there a state to resume from? ----
    if not optimizers:
        return
    name, groups, saved = type(optimizers[0]).__name__, optimizers[0].param_groups, info.optimizer_groups
    if not saved:
        raise UserError(
            f"{RESUME_KEY}: {str(path)!r} holds weights alone (save_weights_only: true), so training cannot resume from"
            " it; give a full checkpoint, or start from its exported policy as model.policy.path"
        )
    # ---- Is it of the same kind of optimizer? Adam and SGD differ in the names of their settings ----
    settings = {key for group in groups for key in group} - _IMPLEMENTATION - {"params"}
    other = settings ^ ({key for names, _ in saved for key in names} - _IMPLEMENTATION)
    if other:
        raise UserError(
            f"{RESUME_KEY}: {str(path)!r} holds the state of another optimizer than model.optimizer, {name}: they"
            f" differ in {', '.join(sorted(other)[:4])}; set model.optimizer as in the run of the checkpoint"
        )
    # ---- Is it of the same parameters? None where a strategy has flattened them ----
    lengths = [length for _, length in saved]
    if None not in lengths and lengths != [len(group["params"]) for group in groups]:
        raise UserError(
            f"{RESUME_KEY}: {str(path)!r} holds optimizer state of {lengths} parameters by group, and {name} has"
            f" {[len(group['params']) for group in groups]}; set model.policy and model.optimizer as in its run"
        )


def is_fitting(module: LightningModule | None) -> bool:
    """Whether the trainer of a module trains it."""
    return module is not None and module.trainer.state.fn == TrainerFn.FITTING


# ---- Gradients, trained weights and optimizer state, with the same answer on every rank ----


def global_grad_norm(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """Return the Euclidean norm of the whole gradient, over all parameters and ranks, before clipping.

    Call it between the backward pass and the optimizer step (`on_before_optimizer_step`), on every rank: where
    parameters are sharded, it reduces over ranks. Under DDP each rank has the whole gradient already. Loss scaling has
    been undone in it. It is not finite exactly where an entry of the gradient, on any rank, is not; under DeepSpeed it
    is then infinite, NaN included.

    Args:
        trainer: of the run.
        optimizer: whose parameters are counted; under DeepSpeed its wrapper.

    Returns:
        A scalar, the same on every rank; None where DeepSpeed only accumulates and takes no step.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return _deepspeed_norm(trainer.strategy.deepspeed_engine)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # FSDP2 marks parameters; the flat ones of FSDP are plain tensors, of which each rank has its own.
    flat = isinstance(trainer.strategy, FSDPStrategy)
    sharded = [parameter for parameter in parameters if flat or is_sharded(parameter)]
    whole = [parameter for parameter in parameters if not (flat or is_sharded(parameter))]
    device = trainer.strategy.root_device
    # Whole gradients are the same on every rank and count once; shards add up over the ranks.
    squares = _sum_of_squares(whole, device)
    if sharded:
        squares = squares + sum_tensor_over_ranks(trainer, _sum_of_squares(sharded, device))
    return squares.sqrt()


def _sum_of_squares(parameters: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the squares of the gradients that this rank has, in the widest dtype of the device."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # A norm in 16 bits has three digits, and overflows in float16; one of float64 is not narrowed.
    norms = [
        torch.linalg.vector_norm(local, dtype=torch.promote_types(local.dtype, torch.float32)).to(device)
        for local in map(_local, gradients)
    ]
    return torch.stack(norms).to(wide).square().sum() if norms else torch.zeros((), dtype=wide, device=device)


def _local(gradient: Tensor) -> Tensor:
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local


def _deepspeed_norm(engine: Any) -> Tensor | None:
    """Return the norm as DeepSpeed itself computes it in its step, a moment before it."""
    if not engine.is_gradient_accumulation_boundary():
        return None
    optimizer, device = engine.optimizer, engine.device
    # The stages keep gradients in buffers of their own, and each computes its norm in its own way.
    if hasattr(optimizer, "_get_norm_groups"):  # stage 3
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norm = combine_grad_norm_groups(optimizer._get_norm_groups())
    elif hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
        norm = optimizer.scaled_global_norm()
    else:  # stage 0 leaves the gradients, averaged over ranks, where they are
        norm = _sum_of_squares(engine.module.parameters(), device).sqrt()
    # DeepSpeed's gradients are still multiplied by the loss scale of float16.
    return torch.as_tensor(norm, device=device) / float(getattr(optimizer, "loss_scale", 1.0))


def nonfinite_in_model(trainer: Trainer, model: nn.Module) -> str | None:
    """Return the name of a trained weight, on any rank, that is not finite; None if all are. The same on every rank.

    Frozen weights and infinite buffers do not count: some models publish masks and biases of minus infinity. Buffers
    count where they are NaN, as running statistics become.
    """
    return _agreed(trainer, nonfinite_name(_trained(model)) or _nan_buffer(model))


def nonfinite_state(trainer: Trainer) -> str | None:
    """Return the name of a trained weight or of an optimizer's state that is not finite; see `nonfinite_in_model`."""

    def states() -> Iterator[tuple[str, Tensor]]:
        # Adam's moments may overflow where the weights do not yet.
        yield from _trained(trainer.lightning_module)
        for optimizer in trainer.optimizers:
            for state in dict(getattr(optimizer, "state", {})).values():
                named = state.items() if isinstance(state, dict) else ()
                yield from ((f"the optimizer's {key}", value) for key, value in named if isinstance(value, Tensor))

    return _agreed(trainer, nonfinite_name(states()) or _nan_buffer(trainer.lightning_module))


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _nan_buffer(model: nn.Module) -> str | None:
    """Return the name of a buffer that a checkpoint holds and that has a NaN."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            is_saved = name not in module._non_persistent_buffers_set
            if is_saved and buffer.is_floating_point() and bool(buffer.isnan().any()):
                return f"{prefix}.{name}" if prefix else name
    return None


def _agreed(trainer: Trainer, name: str | None) -> str | None:
    """Return the name that the highest rank with one has; None if no rank has one."""
    # 0 says that a rank found nothing.
    rank = int(max_over_ranks(trainer, [0 if name is None else trainer.global_rank + 1])[0]) - 1
    if rank < 0 or trainer.world_size == 1:
        return name
    return broadcast(trainer.strategy, name, src=rank)


# ---- Checkpoints ----


def keep_finite_checkpoints(trainer: Trainer) -> None:
    """Have a run save no checkpoint, and remove none, while its weights or optimizer state are not finite.

    `trainer.save_checkpoint` then warns and keeps what is on the disk, whoever calls it. `ModelCheckpoint` is kept
    from starting a save at all, because it would still replace its links and remove older checkpoints. Nor does it
    replace the link `last.ckpt` by one to a checkpoint that the disk had no room for.

    Args:
        trainer: a trainer that is about to run; a second call changes nothing.
    """
    # ---- Every save goes through this ----
    if not isinstance(trainer.save_checkpoint, _FiniteSave):
        save = _FiniteSave(trainer, trainer.save_checkpoint)
        trainer.save_checkpoint = save  # type: ignore[method-assign]
    # ---- ModelCheckpoint asks first, and neither saves nor removes ----
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            for name in ("_save_topk_checkpoint", "_save_last_checkpoint"):
                method = getattr(callback, name)
                if not isinstance(method, partial):  # not yet wrapped by an earlier call
                    setattr(callback, name, partial(_save_if_finite, method))
            if not isinstance(callback._link_checkpoint, partial):
                link = partial(_link_if_saved, callback._link_checkpoint)
                callback._link_checkpoint = link  # type: ignore[method-assign]


class _FiniteSave:
    """Stands in for `trainer.save_checkpoint`."""

    def __init__(self, trainer: Trainer, save: Callable[..., None]) -> None:
        self._trainer, self._save = trainer, save
        self.known_finite = False

    def __call__(self, filepath: Any, *args: Any, **options: Any) -> None:
        if self.known_finite or self.check():
            self._save(filepath, *args, **options)

    def check(self) -> bool:
        """Return whether there is something to save, and warn otherwise; every rank calls this."""
        trainer = self._trainer
        name = nonfinite_state(trainer) if trainer.lightning_module is not None else None
        if name is not None:
            rank_zero_warn(
                f"Optimizer step {trainer.global_step}: no checkpoint is saved, because {name} is not finite; earlier"
                " checkpoints stay. Resume from one of them with a lower learning rate"
                " (model.optimizer.init_args.lr) or with trainer.gradient_clip_val."
            )
        return name is None


def _link_if_saved(link: Callable[..., None], trainer: Trainer, filepath: str, linkpath: str) -> None:
    """Call a method of `ModelCheckpoint` that makes a link to a checkpoint, if that was saved."""
    if not broadcast(trainer.strategy, os.path.lexists(filepath)):
        return
    try:
        link(trainer, filepath, linkpath)
    except OSError as error:  # on the first rank, which makes the link; the others wait for it
        rank_zero_warn(f"{describe_disk_error(error, Path(linkpath))}. The checkpoint itself was saved.")
        barrier(trainer.strategy, "the link to the last checkpoint")


def _save_if_finite(save: Callable[..., None], trainer: Trainer, *args: Any) -> None:
    """Call a method of `ModelCheckpoint` that saves and removes checkpoints, unless there is nothing to save."""
    guard = trainer.save_checkpoint
    if not isinstance(guard, _FiniteSave) or guard.known_finite:
        save(trainer, *args)
    elif guard.check():
        guard.known_finite = True  # so that the weights are read once
        try:
            save(trainer, *args)
        finally:
            guard.known_finite = False
