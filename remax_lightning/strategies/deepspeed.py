"""DeepSpeed ZeRO for a policy that generates: corrections and additions to Lightning's strategy.

Its universal checkpoint has the optimizer state per parameter, which any number of ranks can load.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from remax_lightning.distributed import barrier, broadcast, leave_process_group
from remax_lightning.errors import UserError
from remax_lightning.models.checkpoint_reader import RESUME_KEY
from remax_lightning.models.shard_reader import load_deepspeed_file
from remax_lightning.strategies import zero3
from remax_lightning.strategies.atomic_checkpoint import save_folder_atomically
from remax_lightning.strategies.checks import check_checkpoint, is_fitting
from remax_lightning.strategies.gather_mode import KEY, Gather, check_gather, register_gather_mode

FOLDER, LATEST = "universal", "latest_universal"


def saved_ranks(checkpoint: Path) -> int:
    """Return the number of ranks that saved optimizer shards; 0 if this is not a ZeRO checkpoint."""
    return len(list(checkpoint.glob("checkpoint/*zero_pp_rank_*_optim_states.pt")))


@contextmanager
def reshard(strategy: DeepSpeedStrategy, checkpoint: Path) -> Iterator[None]:
    """Let the engine load a checkpoint of another number of ranks inside; every rank has to enter and leave.

    DeepSpeed's converter writes a second copy of the checkpoint into the folder; it is deleted afterwards.

    Raises:
        UserError: if the converter fails, as it does for optimizers other than Adam and its variants.
    """
    ranks = saved_ranks(checkpoint)
    rank_zero_info(f"Converting {checkpoint}, saved by {ranks} processes, for {strategy.world_size}.")
    # ---- Rank 0 converts; all ranks raise if it fails ----
    problem = _convert(checkpoint) if strategy.is_global_zero else ""
    if problem := broadcast(strategy, problem):
        raise UserError(
            f"trainer.devices x num_nodes must be {ranks}, got {strategy.world_size}: DeepSpeed cannot reshard the"
            f" optimizer state of {str(checkpoint)!r} to another number of processes: {problem}"
        )
    # ---- Load inside; DeepSpeed must not change the settings of parameter groups ----
    engine: Any = strategy.deepspeed_engine
    saved_groups = [dict(group) for group in engine.optimizer.optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
    _repair_optimizer(engine.optimizer.optimizer, saved_groups)
    barrier(strategy, "the universal checkpoint is read")
    if strategy.is_global_zero:
        _delete_universal(checkpoint)


def _convert(checkpoint: Path) -> str:
    """Write the universal checkpoint; return an error message, empty on success."""
    _delete_universal(checkpoint)
    # DeepSpeed's converter is a script; it runs in a process of its own.
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint / "checkpoint"), "--output_folder", str(checkpoint / FOLDER)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    _delete_universal(checkpoint)
    return (result.stderr.strip() or "no message").splitlines()[-1]


def _delete_universal(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / FOLDER, ignore_errors=True)
    (checkpoint / LATEST).unlink(missing_ok=True)


def _repair_optimizer(optimizer: torch.optim.Optimizer, saved_groups: list[dict[str, Any]]) -> None:
    """Undo two errors of DeepSpeed 0.19 under ZeRO-3 with torch's optimizers and several parameter groups.

    All parameters share one step counter after loading, which each of them would increment, and every group gets the
    settings of the first group, including its weight decay.
    """
    # A step counter for every parameter again.
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    # And the weight decay of every group.
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        group["weight_decay"] = saved.get("weight_decay", 0.0)


def sums_in(config: Mapping[str, Any]) -> str:
    """Return DeepSpeed's name of the dtype in which `ReMaxDeepSpeedStrategy` sums gradients; empty for the weights'.

    `data_types.grad_accum_dtype` of the configuration, or float32 under stages 2 and 3. Under stage 1, DeepSpeed would
    take another optimizer, which holds the whole gradient in float32; with an offloaded optimizer, it would keep the
    sum on the device.

    Args:
        config: of DeepSpeed.
    """
    zero = config.get("zero_optimization", {})
    offloads = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    default = "fp32" if zero.get("stage") in (2, 3) and not offloads else ""
    return str(config.get("data_types", {}).get("grad_accum_dtype") or default)


class ReMaxDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy with the loss divided once, and with support for the CPU.

    Lightning and DeepSpeed each divide the loss by `accumulate_grad_batches`, so the gradient is too small by that
    factor; Adam hides this, gradient clipping does not. Here only Lightning divides. On CPU processes the same engine
    runs over gloo, without compiled operators, so that a run can be tried without a GPU. With an offloaded optimizer,
    every optimizer is accepted, not only those of DeepSpeed. Stages 2 and 3 sum the gradients of several micro-batches
    in float32, unless the optimizer is offloaded or `data_types.grad_accum_dtype` of `config` says otherwise.

    With an adapter, `exclude_frozen_parameters` is always true.

    Args:
        gather: how rollouts gather a policy that stage 3 has sharded. `once` gathers it before the rollout and holds it
            on every device until the end, which is fast. `layerwise` gathers one layer at a time, for every token,
            which is many times slower and needs little memory. `auto` is `once` if every device has enough free memory.
        options: the arguments of `lightning.pytorch.strategies.DeepSpeedStrategy`.

    Raises:
        UserError: if `gather` is unknown, or `layerwise` below stage 3, which shards no parameters.
    """

    # Lightning's strategy has more than forty arguments, which the command line reads from its signature.
    def __init__(self, gather: Gather = "auto", **options: Any) -> None:
        self.gather = check_gather(gather)
        super().__init__(**options)

    @property
    def _on_cpu(self) -> bool:
        return self.accelerator is not None and type(self.accelerator).__name__ == "CPUAccelerator"

    def setup_environment(self) -> None:
        """Start the processes; Lightning's DeepSpeed strategy refuses CPUs."""
        if isinstance(self.config, dict):
            # DeepSpeed only logs it. Lightning would load the training data to find it, also for validation.
            self.config.setdefault("train_micro_batch_size_per_gpu", 1)
        if self.gather == "layerwise" and not self.zero_stage_3:
            raise UserError(f"{KEY} must be auto or once below stage 3, which does not shard parameters, got layerwise")
        # Lightning's DDP starts the processes in the same way, on any device.
        if self._on_cpu:
            DDPStrategy.setup_environment(self)
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        """Join the process group, on a CPU over gloo."""
        if not self._on_cpu:
            super().setup_distributed()
            return
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        reset_seed()
        self.set_world_ranks()
        # This operator would be compiled on first use, which takes minutes and needs a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._init_deepspeed_distributed()
        atexit.register(leave_process_group)

    @property
    def root_device(self) -> torch.device:
        """The device of this process; DeepSpeed needs an index, also on a CPU."""
        return torch.device("cpu", self.local_rank) if self._on_cpu else super().root_device

    def init_deepspeed(self) -> None:
        """Create the engine, and keep it from dividing the loss a second time."""
        # ---- Settings that DeepSpeed reads as it starts ----
        source = getattr(self.lightning_module, "policy_source", None)
        if getattr(source, "lora", None) is not None:  # a resumed run loads the base from its own path
            self.exclude_frozen_parameters = True
        if isinstance(self.config, dict):
            # DeepSpeed refuses torch's optimizers under offload by default. They work; its own is only faster.
            self.config.setdefault("zero_force_ds_cpu_optimizer", False)
            self._accumulate_in_float32(self.config)
        # ---- The engine, and what is changed on it ----
        super().init_deepspeed()
        # DeepSpeed would unpickle its files without any limit.
        if (reader := cast(Any, self.deepspeed_engine).checkpoint_engine) is not None:
            reader.load = _load_file
        # Rollouts gather the policy through these, see `gather.py`.
        if self.zero_stage_3 and self.lightning_module is not None:
            zero3.register_engine(self.lightning_module, self.deepspeed_engine)
            register_gather_mode(self.lightning_module, self.gather)
        if self.lightning_module is not None and self.lightning_module.trainer.training:
            engine: Any = self.deepspeed_engine
            if self.zero_stage_3:
                zero3.clear_padding(engine.optimizer)
            # Lightning has divided the loss by `accumulate_grad_batches` already.
            engine.backward = functools.partial(engine.backward, scale_wrt_gas=False)

    def _accumulate_in_float32(self, config: dict[str, Any]) -> None:
        """Sum the gradients of several micro-batches in float32, unless `config` names a dtype.

        DeepSpeed's default is that of the weights: a sum in bfloat16 loses what is below 1/256 of it. See `sums_in`.
        """
        module = self.lightning_module
        if module is None or sums_in(config) != "fp32":
            return
        # A budget of tokens makes several passes of one batch.
        budget = getattr(getattr(module.trainer, "datamodule", None), "tokens_per_micro_batch", None)
        if module.trainer.accumulate_grad_batches > 1 or budget is not None:
            config.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint atomically."""
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options: DeepSpeed writes the files itself")
        # DeepSpeed saves weights and optimizer itself, and this beside them.
        content = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        save_folder_atomically(self, filepath, functools.partial(self._write_parts, content))

    def _write_parts(self, content: dict[str, Any], folder: Path) -> None:
        """Let the engine write this rank's files. As Lightning's strategy does, but no error of one rank blocks others.

        Within the engine, the others would wait for a rank that cannot write; so `latest` is written here, too.
        """
        engine: Any = self.deepspeed_engine
        with _errors_at_the_end(engine):
            engine.save_checkpoint(
                str(folder),
                client_state=content,
                tag=_TAG,
                save_latest=False,
                exclude_frozen_parameters=self.exclude_frozen_parameters,
            )
        if self.is_global_zero:
            (folder / "latest").write_text(_TAG)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, also of another number of processes.

        Raises:
            UserError: if another strategy saved it, or DeepSpeed cannot reshard its optimizer state.
        """
        # The user asked for Lightning's own way of reading a file of full weights.
        if self.load_full_weights and self.zero_stage_3:
            return super().load_checkpoint(checkpoint_path, weights_only)
        # ---- DeepSpeed itself loads only a checkpoint of as many ranks, and only with an optimizer ----
        path = Path(broadcast(self, checkpoint_path))
        saved = saved_ranks(path)
        if not saved:
            raise UserError(
                f"ckpt_path: {str(path)!r} is not a checkpoint of DeepSpeed ZeRO; set the trainer.strategy that it"
                " was saved under"
            )
        fitting = is_fitting(self.lightning_module)
        optimizer = getattr(cast(Any, self.deepspeed_engine).optimizer, "optimizer", None)
        check_checkpoint(self, path, [optimizer] if fitting and optimizer is not None else [])
        # In an evaluation there is no optimizer, without which the engine loads no shards.
        if self.zero_stage_3 and not fitting:
            return zero3.load_weights(self.lightning_module, path)
        # As many ranks as saved it, or a model that is whole in one file.
        if saved == self.world_size or not fitting:
            return super().load_checkpoint(path, weights_only)
        with reshard(self, path):
            return super().load_checkpoint(path, weights_only)


def strategy_of_name(name: Any) -> ReMaxDeepSpeedStrategy | None:
    """Return this package's strategy for a name of Lightning's own, such as `deepspeed_stage_2`; None for others."""
    entry = StrategyRegistry[name] if isinstance(name, str) and name in StrategyRegistry else None
    if entry is None or not issubclass(entry["strategy"], DeepSpeedStrategy):
        return None
    return ReMaxDeepSpeedStrategy(**entry["init_params"])


_TAG = "checkpoint"
"""Folder of the files in a checkpoint, by Lightning's choice."""


def _load_file(path: str, map_location: Any = None) -> dict[str, Any]:  # noqa: ARG001 - the engine copies from the CPU
    return load_deepspeed_file(Path(path), key=RESUME_KEY, mmap=False)


@contextmanager
def _errors_at_the_end(engine: Any) -> Iterator[None]:
    """Raise what a rank could not write after all of its parts: within DeepSpeed, the others would wait for it."""
    failures: list[Exception] = []

    def guarded(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            try:
                function(*args, **options)
            except Exception as error:
                failures.append(error)

        return call

    # All that DeepSpeed writes: the parts of every rank, and on rank 0 its scripts that convert them.
    writer = engine.checkpoint_engine
    with (
        patch.object(writer, "save", guarded(writer.save)),
        patch.object(engine, "_copy_recovery_script", guarded(engine._copy_recovery_script)),
    ):
        yield
    if failures:
        raise failures[0]


# ---- Backward passes within a training step, before the one that Lightning makes at its end ----


class StepGradients:
    """The gradients of an optimizer step, to which passes may add before the one that Lightning runs backward."""

    def __init__(self) -> None:
        self._have_begun = False

    def pop_begun(self) -> bool:
        """Return whether those of this step have begun, so that they must not be zeroed; asked once per step."""
        have_begun, self._have_begun = self._have_begun, False
        return have_begun

    def accumulate(self, trainer: Trainer, loss: Tensor) -> None:
        """Add the gradient of a micro-batch to those of the optimizer step; call it within `training_step`.

        Lightning makes the backward pass of the loss that `training_step` returns, and the step. Every rank has to call
        this as often as the others: under ZeRO and FSDP2 each backward pass reduces over ranks. Under DDP the ranks
        exchange gradients in the last one only, because DDP waits for it from the end of the forward pass on.

        Args:
            trainer: of the run.
            loss: scalar, a term of the step's loss.
        """
        self._have_begun = True
        strategy = trainer.strategy
        if not isinstance(strategy, DeepSpeedStrategy):
            strategy.backward(loss, None)
            return
        # ---- DeepSpeed counts backward passes by the forward passes of its engine, of which this is a part ----
        from deepspeed.runtime.utils import register_output_backward_hooks

        engine = cast(Any, strategy.deepspeed_engine)
        register_output_backward_hooks(
            loss,
            preprocess_once_fn=engine._backward_prologue,
            preprocess_per_tensor_fn=engine._backward_prologue_per_tensor,
        )
        # The optimizer does not take part in a step before its last backward pass.
        engine.set_gradient_accumulation_boundary(is_boundary=False)
        strategy.backward(loss, None)
        # As at the start of a forward pass: the next backward pass adds to this one.
        if hasattr(engine.optimizer, "clear_backward_seen_flag"):  # not in stage 0
            engine.optimizer.clear_backward_seen_flag()
        engine._is_gradient_accumulation_boundary = None
