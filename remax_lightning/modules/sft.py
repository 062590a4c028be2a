"""The first stage: supervised fine-tuning of the policy on responses to imitate."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from remax_lightning.batch import PromptBatch, Responses, SupervisedBatch
from remax_lightning.functional import masked_mean
from remax_lightning.models import PretrainedModel
from remax_lightning.modules.collect import Stopping, collect
from remax_lightning.modules.policy import PolicyModule
from remax_lightning.modules.statistics import response_statistics
from remax_lightning.rewards.base import Reward
from remax_lightning.rollout import AutoEngine, RolloutEngine, SamplingConfig
from remax_lightning.strategies import together


class SFTModule(PolicyModule):
    """Fine-tunes a policy on the responses of a data set; the loss is over response tokens only.

    Args:
        policy: the language model that is trained.
        reward: if given, validation also scores the policy's greedy and sampled responses with it.
        tokenizer: folder or hub name; None takes the policy's.
        rollout: makes responses in validation; None chooses the engine that fits the policy's architecture.
        sampling: how they are sampled.
        optimizer: AdamW by default.
        lr_scheduler: stepped after each optimizer step.
    """

    def __init__(
        self,
        policy: PretrainedModel,
        reward: Reward | None = None,
        tokenizer: str | None = None,
        rollout: RolloutEngine | None = None,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, tokenizer, optimizer, lr_scheduler)
        self.reward, self.sampling = reward, sampling
        self.engine: RolloutEngine = rollout if rollout is not None else AutoEngine()
        self._reward_device: torch.device | None = None

    def on_fit_start(self) -> None:
        """Load what scoring needs."""
        if self.reward is not None and self._reward_device != self.device:
            self.reward.load(self.device)
            self._reward_device = self.device

    on_validation_start = on_fit_start
    on_test_start = on_fit_start

    def _losses(self, batch: SupervisedBatch) -> tuple[Tensor, Tensor]:
        """Return the mean negative log-prob of the response tokens, and how many they are."""
        mask = batch.response_mask
        prompt = PromptBatch(batch.prompt_ids, batch.prompt_mask, batch.prompts, batch.rows)
        responses = Responses(batch.response_ids, mask, mask.new_zeros(len(mask)), [])
        log_probs = response_statistics(self.policy, prompt, responses).log_probs
        return -masked_mean(log_probs, mask), mask.sum()

    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> dict[str, Tensor]:
        """Take the negative log-likelihood of the responses."""
        loss, _ = self._losses(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.rows))
        return {"loss": loss}

    def validation_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Measure the loss on held-out responses and, with a reward, the policy's own responses."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Evaluate as in validation, logged under `test/`."""
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: SupervisedBatch, batch_idx: int, stage: str) -> None:
        log = partial(self.log, on_step=False, on_epoch=True, sync_dist=True)
        loss, tokens = self._losses(batch)
        log(f"{stage}/loss", loss, batch_size=int(tokens))
        if self.reward is None:
            return
        with together(self.trainer):
            rollout = collect(
                self.policy,
                PromptBatch(batch.prompt_ids, batch.prompt_mask, batch.prompts, batch.rows),
                engine=self.engine,
                sampling=self.sampling,
                stopping=Stopping(self.eos_ids(), cast(int, self.tokenizer.pad_token_id)),
                generator=torch.Generator(self.device).manual_seed(batch_idx),
                tokenizer=self.tokenizer,
                reward=self.reward,
                greedy=True,
                truncation_penalty=0.0,
                times={},
            )
        log(f"{stage}/reward", rollout.reward.mean(), batch_size=len(rollout.reward), prog_bar=True)
        baseline = cast(Tensor, rollout.baseline_reward)
        log(f"{stage}/baseline_reward", baseline.mean(), batch_size=len(baseline), prog_bar=True)
