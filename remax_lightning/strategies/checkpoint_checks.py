"""Checks of a checkpoint before a strategy loads it: it is whole, it runs no code, and model and optimizer fit it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn

from remax_lightning.distributed import broadcast, gather_objects
from remax_lightning.errors import UserError
from remax_lightning.models.checkpoint_reader import RESUME_KEY, CheckpointInfo, inspect_checkpoint
from remax_lightning.models.checksums import find_damage, unchecked_files
from remax_lightning.sharding import full_shape

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

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
