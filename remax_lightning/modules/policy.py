"""What all stages that train a policy share: loading, optimizer and schedule, and what a checkpoint holds of chance."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import LRScheduler

from remax_lightning.data.tokenizers import load_tokenizer
from remax_lightning.errors import UserError
from remax_lightning.models import PretrainedModel
from remax_lightning.modules.checkpointing import resume_after_last_batch
from remax_lightning.modules.checks import check_deepspeed, check_policy, check_quantization
from remax_lightning.modules.optimization import parameter_groups, refuse_lost_updates
from remax_lightning.modules.schedules import set_total_steps
from remax_lightning.strategies import loading_policy, outside_partitioning, shard_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class PolicyModule(LightningModule):
    """Trains a causal language model, the policy.

    The command line keeps the configuration beside the run, so a checkpoint holds no hyper-parameters: when a run is
    resumed, what the configuration says counts.

    Args:
        policy: where the policy comes from.
        tokenizer: its tokenizer, a folder or a hub name; None takes the policy's path.
        optimizer: makes the optimizer from parameter groups.
        lr_scheduler: makes the schedule, stepped after each optimizer step; None keeps the learning rate.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        policy: PretrainedModel,
        tokenizer: str | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__()
        check_policy(policy)
        self.policy_source = policy
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.tokenizer_path = tokenizer or policy.path
        self._random_state: dict[str, Any] | None = None
        if policy.lora is not None:
            self.strict_loading = False  # the base is missed on purpose; the adapter is checked in `load_state_dict`

    def configure_model(self) -> None:
        """Load policy and tokenizer; Lightning calls this where each strategy wants its models built."""
        if "policy" in self._modules:
            return
        self.policy = self._load_policy()
        # Loaded models are in eval mode and Lightning leaves them there; gradient checkpointing then does nothing.
        self.policy.train()
        self.tokenizer = self._find_tokenizer()
        vocabulary = self.policy.config.get_text_config().vocab_size
        if len(self.tokenizer) > vocabulary:
            raise UserError(
                f"model.tokenizer {self.tokenizer_path!r} has {len(self.tokenizer)} tokens, the policy"
                f" {self.policy_source.path!r} only {vocabulary}; give the tokenizer that belongs to the policy"
            )

    def _load_policy(self) -> PreTrainedModel:
        source, strategy = self.policy_source, self.trainer.strategy
        check_quantization(source, strategy)
        with loading_policy(strategy, from_scratch=source.from_scratch):
            policy = source.load_base("model.policy")
        # ZeRO-3 would cut an adapter into shares before it has its values; the engine does it afterwards.
        with outside_partitioning(strategy):
            policy = source.adapted(policy, "model.policy", strategy.broadcast(torch.initial_seed()))
        if isinstance(strategy, ModelParallelStrategy):
            shard_policy(policy, strategy.device_mesh)
        return policy

    def _find_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the data module's own tokenizer where it has one, so that prompts and responses agree."""
        shared = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if shared is not None:
            return cast("PreTrainedTokenizerBase", shared)
        source = self.policy_source
        return load_tokenizer(
            self.tokenizer_path,
            trust_remote_code=source.trust_remote_code,
            revision=source.revision,
            key="model.tokenizer",
        )

    def eos_ids(self) -> list[int]:
        """Return every token id that ends a response: the tokenizer's, and those of the policy's own configuration."""
        own = self.policy.generation_config.eos_token_id if self.policy.generation_config is not None else None
        named = [] if own is None else [own] if isinstance(own, int) else list(own)
        return sorted({int(cast(int, self.tokenizer.eos_token_id)), *named})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make optimizer and schedule."""
        optimizer = self.optimizer(parameter_groups(self.policy))
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            check_deepspeed(self.trainer.strategy, self.trainer.accumulate_grad_batches)
        else:
            refuse_lost_updates(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the weights, of an adapted policy the adapter's alone: its base is read again where it came from."""
        state: dict[str, Any] = super().state_dict(*args, **options)
        if self.policy_source.lora is None:
            return state
        trained = self._trained_names()
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned; whatever `strict`, all of an adapter has to be there.

        Raises:
            UserError: if the policy has another adapter, or only one of policy and checkpoint has one.
        """
        if self.policy_source.lora is None:
            if any(".lora_" in name for name in state_dict):
                raise UserError("ckpt_path: the checkpoint holds an adapter; set model.policy.lora as in its run")
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        other = sorted(state_dict.keys() ^ self._trained_names())
        try:
            found = super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:  # another rank
            other = [str(error).splitlines()[-1].strip()]
        if other:
            raise UserError(
                "ckpt_path: the checkpoint does not hold the adapter that model.policy.lora describes; set it as in the"
                f" checkpoint's run. They differ in {len(other)} places: {', '.join(other[:2])}"
            )
        return found

    def _trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_train_start(self) -> None:
        """Tell schedules of ours the length of the run.

        No earlier: asking for it loads the data, and a loader that is there before the checkpoint's loops starts anew.
        """
        for each in self.trainer.lr_scheduler_configs:
            if isinstance(each.scheduler, LRScheduler):
                set_total_steps(each.scheduler, self.trainer.estimated_stepping_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the random number generators, in types that `torch.load(weights_only=True)` reads."""
        checkpoint["random_state"] = self._random_state or self._read_random_state()
        resume_after_last_batch(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the saved random state until the first batch: what Lightning does in between draws numbers too."""
        self._random_state = checkpoint.get("random_state")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Put the random number generators where training left them.

        Validation and loaders draw numbers between two batches, and a resumed run need not go through the same.
        """
        if self._random_state is None:
            return
        state, self._random_state = self._random_state, None
        torch.set_rng_state(state["torch"].cpu())
        random.setstate(state["python"])
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the random state for the next batch."""
        self._random_state = self._read_random_state()

    def on_train_end(self) -> None:
        """Let another fit begin with the random numbers of its own seed."""
        self._random_state = None

    def _read_random_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state
