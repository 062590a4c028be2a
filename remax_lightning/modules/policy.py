"""Base class of the stages that train a policy: loading it, its EOS tokens, its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy

from remax_lightning.distributed import broadcast
from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig
from remax_lightning.models.loading import Float32Buffers
from remax_lightning.models.sampling import log_ignored_settings
from remax_lightning.modules.base import BaseModule
from remax_lightning.rewards.base import Reward
from remax_lightning.rollout import RolloutEngine, SamplingConfig
from remax_lightning.strategies import shard_policy, sharded_init, unsharded_init
from remax_lightning.training.config_checks import check_policy, check_quantization, warn_of_turn_end
from remax_lightning.training.worker import RolloutWorker

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PolicyModule(BaseModule):
    """Trains a causal language model, the policy.

    Args:
        policy: where the policy comes from.
        worker: generates responses with it and scores them.
        tokenizer: its tokenizer, a folder or a hub name; None takes the policy's path.
        optimizer: makes the optimizer from parameter groups.
        lr_scheduler: makes the schedule, stepped after each optimizer step; None keeps the learning rate.
        max_skipped_steps: so many optimizer steps in a row without a finite gradient end the run.
    """

    policy: PreTrainedModel
    scores_training_rows: ClassVar[bool] = True
    """Whether the reward scores responses to the training rows, not only to those of validation."""
    constants: Float32Buffers
    """Constant buffers of the policy, restored after a strategy has cast it."""

    def __init__(
        self,
        policy: ModelConfig,
        worker: RolloutWorker,
        tokenizer: str | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        max_skipped_steps: int,
    ) -> None:
        super().__init__(policy, tokenizer, optimizer, lr_scheduler, max_skipped_steps)
        check_policy(policy)
        self.policy_source, self.worker = policy, worker
        if policy.lora is not None:
            self.strict_loading = False  # checkpoints omit the base; `load_state_dict` checks the adapter

    def setup(self, stage: str) -> None:
        """Let the reward look at prompts and rows, which are there before any model is loaded."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.reward is not None and hasattr(data, "prompt_forms"):
            self.reward.check_prompts(data.prompt_forms())
        if self.reward is not None and hasattr(data, "first_rows"):
            self.reward.check_rows(*data.first_rows(train=self.scores_training_rows))

    @property
    def trained_model(self) -> PreTrainedModel:
        """The policy."""
        return self.policy

    @property
    def engine(self) -> RolloutEngine:
        """The engine that generates responses."""
        return self.worker.engine

    @property
    def sampling(self) -> SamplingConfig:
        """How responses are sampled."""
        return self.worker.sampling

    @property
    def reward(self) -> Reward | None:
        """The reward that scores responses; None without one."""
        return self.worker.reward

    def prepare_rollouts(self) -> None:
        """Prepare the worker: stop strings, EOS and unused tokens, and the reward on the device."""
        is_new = self.worker.device != self.device
        if is_new:
            log_ignored_settings(self.policy, self.sampling)
            warn_of_turn_end(self.tokenizer, self.eos_ids(), getattr(self.trainer, "datamodule", None))
        # Every validation comes here; a vocabulary of 150,000 tokens is compared once.
        unused_ids = self.unused_ids() if is_new else self.worker.unused_ids
        self.worker.prepare(self.tokenizer, self.eos_ids(), self.device, unused_ids)

    def configure_model(self) -> None:
        """Load policy and tokenizer; Lightning calls this in the context of the strategy."""
        if "policy" in self._modules:
            return
        self.policy = self._load_policy()
        with unsharded_init(self.trainer.strategy):
            self.constants = Float32Buffers(self.policy)
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
        with sharded_init(strategy, from_scratch=source.from_scratch):
            policy = source.load_base("model.policy")
        # ZeRO-3 would shard an adapter before it is initialized; the engine shards it later.
        with unsharded_init(strategy):
            policy = source.wrap_with_adapter(policy, "model.policy", broadcast(strategy, torch.initial_seed()))
        if isinstance(strategy, ModelParallelStrategy):
            shard_policy(policy, strategy.device_mesh)
        return policy

    def eos_ids(self) -> list[int]:
        """Return every token id that ends a response: those of the tokenizer and of the generation settings."""
        configured = self.policy.generation_config.eos_token_id if self.policy.generation_config is not None else None
        named = [] if configured is None else [configured] if isinstance(configured, int) else list(configured)
        if not all(isinstance(eos_id, int) for eos_id in named):
            raise UserError(
                "model.policy.path: eos_token_id in generation_config.json must be a token's number or a list of them,"
                f" got {configured!r}"
            )
        return sorted({int(cast(int, self.tokenizer.eos_token_id)), *named})

    def unused_ids(self) -> tuple[int, ...]:
        """Return the policy's ids that are no token of the tokenizer, and no EOS: embeddings are often padded."""
        used = {*self.tokenizer.get_vocab().values(), *self.eos_ids()}
        vocabulary: int = self.policy.config.get_text_config().vocab_size
        return tuple(index for index in range(vocabulary) if index not in used)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the weights; with an adapter only those of the adapter, because the base is loaded from its path."""
        state: dict[str, Any] = super().state_dict(*args, **options)
        if self.policy_source.lora is None:
            return state
        trained = self._trainable_names()
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the result of `state_dict`. An adapter must be complete, whatever `strict` is.

        Raises:
            UserError: if the policy has another adapter, or only one of policy and checkpoint has one.
        """
        if self.policy_source.lora is None:
            if any(".lora_" in name for name in state_dict):
                raise UserError("ckpt_path: the checkpoint holds an adapter; set model.policy.lora as in its run")
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        other = sorted(state_dict.keys() ^ self._trainable_names())
        try:
            result = super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:  # another rank
            other = [str(error).splitlines()[-1].strip()]
        if other:
            raise UserError(
                "ckpt_path: the checkpoint does not hold the adapter that model.policy.lora describes; set it as in the"
                f" checkpoint's run. They differ in {len(other)} places: {', '.join(other[:2])}"
            )
        return result

    def _trainable_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}
