"""Base class of all stages: optimizer, schedule, tokenizer, and the random state in checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from remax_lightning.data.tokenizers import load_tokenizer
from remax_lightning.errors import UserError, check_ranges
from remax_lightning.files import tolerate_disk_errors
from remax_lightning.loggers import log_hyperparameters
from remax_lightning.models import ModelConfig
from remax_lightning.models.checkpoint_reader import HYPER_PARAMETERS, CheckpointInfo, optimizer_groups, tensor_shapes
from remax_lightning.models.forward import choose_attention_kernels
from remax_lightning.run_folder import RUN_FOLDER, RunFolder, reserve_versions, run_folder
from remax_lightning.strategies import (
    PARAMETER_NAMES,
    AtomicCheckpointIO,
    check_model,
    check_optimizers,
    global_grad_norm,
    guard_loading,
    keep_finite_checkpoints,
    optimizer_parameter_names,
    remove_stale,
)
from remax_lightning.training.config_checks import check_deepspeed, warn_of_no_training
from remax_lightning.training.metrics import log_at_global_step, tolerate_failing_logs
from remax_lightning.training.optimization import (
    MaxSkippedSteps,
    SkippedSteps,
    check_learning_rate_precision,
    choose_update_kernel,
    learning_rates,
    parameter_groups,
    set_total_steps,
)
from remax_lightning.training.resume import (
    StallSeconds,
    StallTimeout,
    StopAtStepEnd,
    checkpoint_folders,
    defer_signals,
    gather_rank_states,
    num_cut_batches,
    random_state,
    resume_after_last_batch,
    set_random_state,
)
from remax_lightning.training.saved_state import keep_readable_checkpoints, write_plain_numbers
from remax_lightning.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ADAPTER_RATE = 10
"""How many times the default learning rate an adapter gets."""
_DATA_MODULES = {
    "PromptBatch": "PromptDataModule",
    "SupervisedBatch": "SFTDataModule",
    "PreferenceBatch": "PreferenceDataModule",
}


class BaseModule(LightningModule):
    """Trains one model.

    A checkpoint holds the arguments of the module that are text and numbers, for `load_from_checkpoint`. When a run is
    resumed, the configuration counts, not they.

    Args:
        source: where the model comes from.
        tokenizer: its tokenizer, a folder or a hub name; None takes the model's path.
        optimizer: makes the optimizer from parameter groups.
        lr_scheduler: makes the schedule, stepped after each optimizer step; None keeps the learning rate.
        max_skipped_steps: the run ends after this many optimizer steps in a row whose gradient is not finite.
        stall_timeout: seconds without progress that end the run; None watches nothing.
        cudnn_attention: whether attention may run in cuDNN.
    """

    tokenizer: PreTrainedTokenizerBase
    batch_type: ClassVar[type[Batch]]
    """What its data loaders yield."""

    def __init__(
        self,
        source: ModelConfig,
        tokenizer: str | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        max_skipped_steps: MaxSkippedSteps,
        stall_timeout: StallSeconds,
        cudnn_attention: bool,
    ) -> None:
        check_ranges(BaseModule.__init__, locals(), "model")
        super().__init__()
        self._source = source
        self.optimizer, self.lr_scheduler = self._for_adapter(optimizer), lr_scheduler
        self.tokenizer_path = tokenizer or source.path
        self.skipped_steps = SkippedSteps(max_skipped_steps)
        self.stall_timeout, self.cudnn_attention = stall_timeout, cudnn_attention
        self._stall_watch = None if stall_timeout is None else StallTimeout(stall_timeout)
        self._random_state: dict[str, Any] | None = None
        self._step_ends: StopAtStepEnd | None = None
        self._resumed: CheckpointInfo | None = None
        self._run_folder: RunFolder | None = None  # in runs of a trainer only, not in `remax doctor`
        self._num_cut = 0  # batches of the first step of a resumed run whose gradients its checkpoint has not

    def _for_adapter(self, optimizer: OptimizerCallable) -> OptimizerCallable:
        """Return the optimizer, with ten times the learning rate where it is the default and trains an adapter."""
        default = inspect.signature(type(self)).parameters["optimizer"].default
        if self._source.lora is None or optimizer is not default:
            return optimizer  # a configuration has the number in it already

        def with_rate_of_adapters(parameters: Any) -> Optimizer:
            made: Optimizer = default(parameters)
            for group in made.param_groups:
                group["lr"] *= ADAPTER_RATE
            return made

        return with_rate_of_adapters

    def configure_callbacks(self) -> list[Callback]:
        """Give every run its folder and a watchdog. Called on every rank, before loggers and callbacks start."""
        if getattr(rank_zero_only, "rank", 0) == 0:
            reserve_versions(self.trainer.loggers)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        self._run_folder = next((item for item in callbacks if isinstance(item, RunFolder)), None) or RunFolder()
        added: tuple[Callback | None, ...] = (self._run_folder, self._stall_watch)
        return [item for item in added if item is not None and item not in callbacks]

    def setup(self, stage: str) -> None:
        """Look through a checkpoint that will be loaded, and save finite ones atomically.

        Signals are deferred to the end of a step, and figures logged at its number. Attention gets its kernels.
        """
        guard_loading(self.trainer.strategy)
        choose_attention_kernels(self.trainer.strategy.root_device, self.cudnn_attention)
        if stage == "fit":
            warn_of_no_training(self.trainer)
            if self._run_folder is not None:
                self._run_folder.lock(self.trainer)
        # ---- How checkpoints are written: whole or not at all, finite, and so that they can be read ----
        plugin: Any = self.trainer.strategy.checkpoint_io
        if type(plugin) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        elif isinstance(plugin, _WrappingCheckpointIO) and type(plugin.checkpoint_io) in (TorchCheckpointIO, NoneType):
            plugin.checkpoint_io = AtomicCheckpointIO()  # such as that of AsyncCheckpointIO
        keep_finite_checkpoints(self.trainer)
        keep_readable_checkpoints(self.trainer.strategy)
        # ---- Signals and logs ----
        defer_signals(self.trainer)
        log_at_global_step(self.trainer)
        if stage == "fit" and self._run_folder is not None:
            tolerate_failing_logs(self.trainer)
        logs = self.trainer.enable_autolog_hparams and self.trainer.is_global_zero
        if stage != "predict" and self._run_folder is not None and logs:
            with tolerate_disk_errors(run_folder(self.trainer), set(), "The loggers have no hyper-parameters."):
                log_hyperparameters(self.trainer, self)

    @property
    def trained_model(self) -> PreTrainedModel:
        """The model that is trained."""
        raise NotImplementedError

    @property
    def repeats_cut_steps(self) -> bool:
        """Whether a resumed run computes the gradients anew that a checkpoint in the middle of a step does not hold."""
        return False

    def hyper_parameters(self) -> dict[str, Any]:
        """Return the arguments of the module that are text, numbers or made of them, for its checkpoints.

        A class of a user's own that returns none can be saved; `load_from_checkpoint` then needs them as arguments.
        """
        return {}

    @property
    def is_16_bit(self) -> bool:
        """Whether the trained model computes in 16 bits; its rounding shows in every log-prob."""
        model = self.trained_model
        return "16" in str(self.trainer.precision) or model.dtype in (torch.float16, torch.bfloat16)

    def _find_tokenizer(self, *, needs_eos: bool = True) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the data module if it has one, so that prompts and responses agree."""
        # ---- Without a trainer, after `load_from_checkpoint`, there is no data module ----
        shared = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        if shared is not None:
            return cast("PreTrainedTokenizerBase", shared)
        source = self._source
        return load_tokenizer(
            self.tokenizer_path,
            trust_remote_code=source.trust_remote_code,
            revision=source.revision,
            needs_eos=needs_eos,
            key="model.tokenizer",
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make optimizer and schedule."""
        # ---- The optimizer, of the same kind as the resumed one ----
        with _errors_under("model.optimizer"):
            optimizer = self.optimizer(parameter_groups(self.trained_model))
        write_plain_numbers(optimizer)
        if self._resumed is not None:
            check_optimizers(self.trainer.ckpt_path, self._resumed, [optimizer])
        self._resumed = None
        choose_update_kernel(optimizer, self.trainer.strategy.root_device)
        # ---- Is the learning rate too small for the dtype? DeepSpeed keeps float32 copies of the weights, so not there
        # ----
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            check_deepspeed(self.trainer.strategy, self.trainer.accumulate_grad_batches)
        else:
            check_learning_rate_precision(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        with _errors_under("model.lr_scheduler"):
            scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise UserError(
                "model.lr_scheduler: expected a schedule by the number of steps, got ReduceLROnPlateau, which follows a"
                " figure; give WarmupCosine, or another of torch.optim.lr_scheduler"
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Start to watch for the ends of optimizer steps; tell schedules the length of the run.

        Not earlier: this creates the data loaders, and a loader from before the checkpoint is loaded would start again.
        """
        self._step_ends = StopAtStepEnd(self.trainer)
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LRScheduler):
                set_total_steps(config.scheduler, self.trainer.estimated_stepping_batches)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skip the step if its gradient is not finite; log its learning rates, and the norm before clipping.

        Raises:
            UserError: after `max_skipped_steps` skipped steps in a row.
        """
        # Before the check: the norm is finite exactly where the whole gradient is.
        norm = global_grad_norm(self.trainer, optimizer)
        if norm is None:  # DeepSpeed comes here at every micro-batch
            return
        self.skipped_steps.check(self, optimizer, norm)
        figures = {"train/skipped_steps": float(self.skipped_steps.total), **learning_rates(optimizer)}
        self.log_dict({"train/grad_norm": norm, **figures}, batch_size=1)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule, unless the optimizer step was skipped."""
        if not self.skipped_steps.is_skipped:
            super().lr_scheduler_step(scheduler, metric)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the random state of every rank, in types that `torch.load(weights_only=True)` reads."""
        # Rank 0 removes for all ranks, since they write into the same folders.
        if self.trainer.is_global_zero:
            for folder in checkpoint_folders(self.trainer):
                remove_stale(folder)
        checkpoint["random_state"] = gather_rank_states(self._random_state or random_state(self.device))
        checkpoint["skipped_steps"] = self.skipped_steps.state_dict()
        checkpoint[HYPER_PARAMETERS] = self.hyper_parameters()
        checkpoint[RUN_FOLDER] = str(run_folder(self.trainer).absolute())
        # Names make the states of an optimizer readable under strategies that number parameters in another order.
        names = [optimizer_parameter_names(self, optimizer) for optimizer in self.trainer.optimizers]
        if all(name is not None for name in names):
            checkpoint[PARAMETER_NAMES] = names
        resume_after_last_batch(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model, and keep the random state that it holds.

        The state waits until the first batch, because Lightning draws random numbers before.
        """
        weights = checkpoint.get("state_dict")
        if weights is not None:  # strategies that shard load and check the weights themselves
            check_model(self.trainer.ckpt_path, tensor_shapes(weights), self)
            if self.trainer.state.fn == TrainerFn.FITTING:
                self._resumed = CheckpointInfo(0, {}, optimizer_groups(checkpoint))
        if self.trainer.state.fn == TrainerFn.FITTING:
            accumulate = self.trainer.accumulate_grad_batches
            self._num_cut = num_cut_batches(checkpoint, accumulate)
            if self._num_cut and not self.repeats_cut_steps:
                rank_zero_warn(
                    f"The checkpoint was saved in the middle of an optimizer step, and holds no gradients: the first"
                    f" {self._num_cut} of its {accumulate} batches count for nothing. Set trainer.val_check_interval to"
                    " a multiple of trainer.accumulate_grad_batches, or save by every_n_train_steps"
                )
                self._num_cut = 0
        if "skipped_steps" in checkpoint:  # not in a checkpoint of 0.1.0
            self.skipped_steps.load_state_dict(checkpoint["skipped_steps"])
        saved = checkpoint.get("random_state")
        states = [saved] if isinstance(saved, dict) else saved or []  # version 0.1.0 saved that of rank 0 only
        # With another number of ranks the random numbers change.
        self._random_state = states[self.global_rank] if len(states) == self.trainer.world_size else None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random state of the end of the last batch.

        Validation and loaders draw numbers between two batches, which a resumed run may not repeat.
        """
        self._check_batch(batch)
        # Used once: later batches go on from there.
        state, self._random_state = self._random_state, None
        if state is not None:
            set_random_state(state, self.device)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse a batch of another type."""
        self._check_batch(batch)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    def _check_batch(self, batch: Any) -> None:
        # A loader of the user's may yield anything, and a tuple would fail far from here.
        if not isinstance(batch, self.batch_type):
            name = self.batch_type.__name__
            raise UserError(
                f"data: {type(self).__name__} takes batches of type {name}, got {type(batch).__name__} from the data"
                f" loader; give the rows to a data module, such as {_DATA_MODULES[name]}(data=rows), or yield {name}"
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the random state for the next batch; after an optimizer step, stop if a rank has to."""
        self._random_state = random_state(self.device)
        cast(StopAtStepEnd, self._step_ends).after_batch()

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Stop if a rank has to: a validation may take longer than the grace period."""
        if self._step_ends is not None:  # within training
            self._step_ends.stop_on_all_ranks()

    def on_train_end(self) -> None:
        """Reset, so that another fit starts with the random numbers of its seed."""
        self._random_state, self._step_ends = None, None


@contextmanager
def _errors_under(key: str) -> Iterator[None]:
    """Tell by its key what an optimizer or a schedule refuses: what it takes, only its constructor knows."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{key}: {error}; change its arguments, or give another class") from error
