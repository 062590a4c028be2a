"""What the stages that train a policy share: loading it, and knowing where its responses end."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy

from remax_lightning.errors import UserError
from remax_lightning.models import PretrainedModel
from remax_lightning.modules.stage import StageModule
from remax_lightning.strategies import loading_policy, shard_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PolicyModule(StageModule):
    """Trains a causal language model, the policy.

    Args:
        policy: where the policy comes from.
        tokenizer: its tokenizer, a folder or a hub name; None takes the policy's path.
        optimizer: makes the optimizer from parameter groups.
        lr_scheduler: makes the schedule, stepped after each optimizer step; None keeps the learning rate.
    """

    policy: PreTrainedModel

    def __init__(
        self,
        policy: PretrainedModel,
        tokenizer: str | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__(policy, tokenizer, optimizer, lr_scheduler)
        self.policy_source = policy

    @property
    def trained_model(self) -> PreTrainedModel:
        """The policy."""
        return self.policy

    def configure_model(self) -> None:
        """Load policy and tokenizer; Lightning calls this where each strategy wants its models built."""
        if "policy" in self._modules:
            return
        strategy = self.trainer.strategy
        with loading_policy(strategy, from_scratch=self.policy_source.from_scratch):
            policy = self.policy_source.load("model.policy")
        if isinstance(strategy, ModelParallelStrategy):
            shard_policy(policy, strategy.device_mesh)
        self.policy = policy
        # Loaded models are in eval mode and Lightning leaves them there; gradient checkpointing then does nothing.
        self.policy.train()
        self.tokenizer = self._find_tokenizer()
        vocabulary = self.policy.config.get_text_config().vocab_size
        if len(self.tokenizer) > vocabulary:
            raise UserError(
                f"model.tokenizer {self.tokenizer_path!r} has {len(self.tokenizer)} tokens, the policy"
                f" {self.policy_source.path!r} only {vocabulary}; give the tokenizer that belongs to the policy"
            )

    def eos_ids(self) -> list[int]:
        """Return every token id that ends a response: the tokenizer's, and those of the policy's own configuration."""
        own = self.policy.generation_config.eos_token_id if self.policy.generation_config is not None else None
        named = [] if own is None else [own] if isinstance(own, int) else list(own)
        return sorted({int(cast(int, self.tokenizer.eos_token_id)), *named})
