"""ReMax: REINFORCE with the greedy response's reward as the baseline (Li et al. 2023, arXiv 2310.10505)."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from remax_lightning.config import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.errors import UserError
from remax_lightning.evaluation.evaluator import EvaluatedModule
from remax_lightning.models import ModelConfig
from remax_lightning.rewards.base import Reward
from remax_lightning.rollout import RolloutEngine, SamplingConfig
from remax_lightning.training import config_checks as checks
from remax_lightning.training.objective import Experience, Objective
from remax_lightning.training.resume import experience_from_state, experience_state, own_state, states_of_ranks
from remax_lightning.training.seeding import TRAINING
from remax_lightning.training.step_metrics import Sums, step_values
from remax_lightning.training.worker import timed
from remax_lightning.types import PromptBatch, StepOutput


class ReMaxModule(EvaluatedModule):
    """Aligns a policy with a reward.

    Args:
        policy: the language model that is trained.
        reward: scores responses.
        reference: frozen model that the policy is kept close to, usually the policy's own start; needed where
            `kl_coef` or `kl.loss_coef` is above 0. With `policy.lora` leave it out: the policy's start is then the
            reference, on the policy's own weights, without a second copy of them.
        tokenizer: folder or hub name; None takes the policy's.
        rollout: makes responses; None chooses the engine that fits the policy's architecture.
        sampling: how responses are sampled.
        kl_coef: reward that a nat of KL costs. 0.05 is what the paper's scripts use.
        kl: how the KL is estimated and charged.
        advantage: how rewards become advantages.
        loss: how advantages become a loss.
        optimizer: AdamW by default.
        lr_scheduler: stepped after each optimizer step; `WarmupCosine` and `WarmupLinear` know the length of the run.

    Raises:
        UserError: if the choices contradict each other.
    """

    def __init__(
        self,
        policy: ModelConfig,
        reward: Reward,
        reference: ModelConfig | None = None,
        tokenizer: str | None = None,
        rollout: RolloutEngine | None = None,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        kl_coef: float = 0.05,
        kl: KLConfig = KLConfig(),  # noqa: B008
        advantage: AdvantageConfig = AdvantageConfig(),  # noqa: B008
        loss: LossConfig = LossConfig(),  # noqa: B008
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        checks.check_kl(kl_coef, kl, policy, reference)
        objective = Objective(kl, advantage, loss, sampling.num_samples)
        super().__init__(
            policy, reward, reference, tokenizer, rollout, sampling, kl_coef, objective, optimizer, lr_scheduler
        )
        self._experience: Experience | None = None
        self._sums = Sums()
        self._rollouts = 0

    def on_fit_start(self) -> None:
        """Bring the frozen models to the device and check what only the whole run can tell."""
        self._prepare()
        num_splits = getattr(getattr(self.trainer, "datamodule", None), "num_splits", None)
        if num_splits is not None:
            self._updates_per_rollout(num_splits)

    def _updates_per_rollout(self, num_splits: int) -> int:
        accumulate, num_batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        return checks.updates_per_rollout(num_splits, accumulate, self.objective.loss_config.kind, num_batches)

    # Training

    def training_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Train on one part of a rollout batch; the first part makes the rollout."""
        times = {"rollout": 0.0, "reward": 0.0}
        if batch.split == 0:
            self._drop_gradients()
            self._experience = self._explore(batch, times)
        if self._experience is None:
            raise UserError(f"data: part {batch.split} of a rollout batch came first; a loader starts with part 0")
        split, num_splits = batch.split, batch.num_splits
        part = self._experience.part(split, num_splits)
        if split + 1 == num_splits:
            self._experience = None  # the last part: nothing to carry over, in memory or in a checkpoint
        trained = part.trained()
        now = self._statistics(part.rollout, trained)  # the only pass with gradients
        if part.advantages is None:
            part = self._credited(part, now.log_probs, now.kl)
        rollout, advantages = part.rollout, cast(Tensor, part.advantages)
        accumulate = self.trainer.accumulate_grad_batches
        # Lightning and the strategy divide every gradient by micro-batches and ranks: undo it.
        normalizer = part.normalizers[split // accumulate] / (accumulate * self.trainer.world_size)
        loss, clip_fraction = self.objective.loss(now.log_probs, rollout, advantages, normalizer, now.kl)
        output = StepOutput(
            loss=loss,
            rollout=rollout._replace(reference_hidden=None),  # a callback may keep outputs for long
            advantages=advantages,
            kl=part.kl,
            entropy=now.entropy.detach(),
            entropy_mask=rollout.sampled.response_mask & trained[:, None],
            times=times,
            closes_step=(split + 1) % accumulate == 0,
        )
        self._log_training(output, clip_fraction)
        return output

    def _drop_gradients(self) -> None:
        """Drop the gradients of the step before: Lightning would keep their memory through the rollout."""
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):  # drops its own
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    def _explore(self, batch: PromptBatch, times: dict[str, float]) -> Experience:
        """Make a rollout with all that training on it needs."""
        updates = self._updates_per_rollout(batch.num_splits)
        whitens_parts = self.objective.advantage_config.whiten and batch.num_splits > 1
        charged = self.objective.uses_kl(self.kl_coef) and self._reference is not None
        looks_back = updates > 1 or (charged and whitens_parts)  # needs the policy's log-probs before it is trained
        log_probs = looks_back and self.objective.loss_config.old_log_probs == "rollout"
        rollout = self._roll_out(batch, TRAINING, self._rollouts, times, log_probs)
        self._rollouts += 1
        if self.objective.uses_kl(self.kl_coef):
            rollout = self._with_reference(rollout, times)
        has_kl = rollout.reference_log_probs is not None
        experience = Experience(rollout, self._sum_over_ranks(self.objective.update_counts(rollout, updates)))
        if not has_kl:
            experience = self._credited(experience)
        if not looks_back:
            return experience  # the training pass gives what is missing
        if rollout.log_probs is not None:
            return self._credited(experience, rollout.log_probs) if has_kl else experience
        with torch.no_grad(), timed(times, "reward", self.device):
            trained, size = experience.trained(batch.num_splits), len(rollout.reward) // batch.num_splits
            now = self._statistics(rollout, trained, size)
        hidden = rollout.reference_hidden if self.objective.kl_config.full_loss else None
        experience = experience._replace(rollout=rollout._replace(log_probs=now.log_probs, reference_hidden=hidden))
        return self._credited(experience, now.log_probs, now.kl) if has_kl else experience

    def _credited(self, experience: Experience, *policy: Tensor | None) -> Experience:
        return self.objective.credited(experience, self.kl_coef, self._sum_over_ranks, *policy)

    def _log_training(self, output: StepOutput, clip_fraction: Tensor) -> None:
        values = {**step_values(output), "loss": (output["loss"], None)}
        if self.objective.loss_config.kind == "clipped":
            mask = self.objective.loss_mask(output["rollout"])
            values["clip_fraction"] = (clip_fraction.expand_as(mask), mask)
        self._sums.add(values)
        if output["closes_step"]:
            for name, mean in self._sums.means(self._sum_over_ranks).items():
                self.log(f"train/{name}", mean, prog_bar=name in ("reward", "kl"), batch_size=1)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the count of rollouts, and a rollout whose updates are not all done."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["remax"] = {
            "seed": self._seed,
            "rollouts": self._rollouts,
            "experience": states_of_ranks(None if self._experience is None else experience_state(self._experience)),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up where the saved run was."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("remax")
        if state is None:
            return
        self._seed, self._rollouts = state["seed"], state["rollouts"]
        own = own_state(state["experience"], self.trainer)
        self._experience = None if own is None else experience_from_state(own)
