"""ReMax: REINFORCE with the greedy response's reward as the baseline (Li et al. 2023, arXiv 2310.10505)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from remax_lightning.batch import PromptBatch, Rollout, StepOutput
from remax_lightning.errors import UserError
from remax_lightning.functional import PolicyStatistics
from remax_lightning.models import PretrainedModel
from remax_lightning.modules import checks
from remax_lightning.modules.checkpointing import experience_from_state, experience_state, own_state, states_of_ranks
from remax_lightning.modules.collect import Stopping, collect, timed
from remax_lightning.modules.objective import Experience, Objective
from remax_lightning.modules.options import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.modules.policy import PolicyModule
from remax_lightning.modules.randomness import EVALUATION, TRAINING, rollout_generator
from remax_lightning.modules.reference import Reference, make_reference
from remax_lightning.modules.reporting import Sums, predictions, step_values
from remax_lightning.modules.statistics import policy_statistics, with_reference
from remax_lightning.rewards.base import Reward
from remax_lightning.rollout import AutoEngine, Ended, RolloutEngine, SamplingConfig
from remax_lightning.rollout.generation_config import tell_ignored
from remax_lightning.rollout.stopping import stop_string_check
from remax_lightning.strategies import together

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReMaxModule(PolicyModule):
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
        policy: PretrainedModel,
        reward: Reward,
        reference: PretrainedModel | None = None,
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
        super().__init__(policy, tokenizer, optimizer, lr_scheduler)
        checks.check_kl(kl_coef, kl, policy, reference)
        checks.check_reference(reference)
        self.reward, self.reference_source = reward, reference
        self._reference: Reference | None = None
        self.engine: RolloutEngine = rollout if rollout is not None else AutoEngine()
        self.sampling, self.kl_coef = sampling, kl_coef
        self.objective = Objective(kl, advantage, loss, sampling.num_samples)
        self.stop_check: Ended | None = None
        self._experience: Experience | None = None
        self._sums = Sums()
        self._seed: int | None = None
        self._rollouts = 0
        self._reward_device: torch.device | None = None

    # Loading

    @property
    def reference(self) -> PreTrainedModel | None:
        """The reference's model; the policy's own where they share their weights."""
        return None if self._reference is None else self._reference.model

    def configure_model(self) -> None:
        """Load policy, tokenizer and reference."""
        super().configure_model()
        if self._reference is None:
            strategy = self.trainer.strategy
            self._reference = make_reference(self.reference_source, self.policy, self.policy_source, strategy)

    def on_fit_start(self) -> None:
        """Bring the frozen models to the device and check what only the whole run can tell."""
        self._prepare()
        num_splits = getattr(getattr(self.trainer, "datamodule", None), "num_splits", None)
        if num_splits is not None:
            self._updates_per_rollout(num_splits)

    def on_validation_start(self) -> None:
        """Bring the frozen models to the device."""
        self._prepare()

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def _prepare(self) -> None:
        if self._reference is not None:
            self._reference.prepare(self.device, needs_head=self.objective.kl_config.full)
            checks.check_full_kl(self.objective.kl_config, self.policy, self._reference)
        if self._reward_device != self.device:
            tell_ignored(self.policy, self.sampling)
            self.stop_check = stop_string_check(self.tokenizer, self.sampling.stop_strings)
            self.reward.load(self.device)
            self._reward_device = self.device
        if self._seed is None:
            # Rank 0's, for it is what a checkpoint holds.
            self._seed = self.trainer.strategy.broadcast(torch.initial_seed() % 2**63)
        longest = getattr(getattr(self.trainer, "datamodule", None), "max_prompt_length", None)
        checks.check_lengths(self.policy, longest, self.sampling.max_response_length)

    def _updates_per_rollout(self, num_splits: int) -> int:
        accumulate, num_batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        return checks.updates_per_rollout(num_splits, accumulate, self.objective.loss_config.kind, num_batches)

    # Training

    def training_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Train on one part of a rollout batch; the first part makes the rollout."""
        times = {"rollout": 0.0, "reward": 0.0}
        if batch.split == 0:
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
        normaliser = part.normalisers[split // accumulate] / (accumulate * self.trainer.world_size)
        loss, clip_fraction = self.objective.loss(now.log_probs, rollout, advantages, normaliser, now.kl)
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

    def _roll_out(
        self, batch: PromptBatch, stage: int, count: int, times: dict[str, float], log_probs: bool = False
    ) -> Rollout:
        """Sample and decode greedily, and score; `count` rollouts of the stage were made before."""
        with together(self.trainer):
            return collect(
                self.policy,
                batch,
                engine=self.engine,
                sampling=self.sampling,
                stopping=Stopping(self.eos_ids(), cast(int, self.tokenizer.pad_token_id), self.stop_check),
                generator=rollout_generator(cast(int, self._seed), self.global_rank, stage, count, self.device),
                tokenizer=self.tokenizer,
                reward=self.reward,
                greedy=stage == EVALUATION or self.objective.needs_greedy,
                truncation_penalty=self.objective.truncation_penalty,
                times=times,
                log_probs=log_probs,
            )

    def _with_reference(self, rollout: Rollout, times: dict[str, float]) -> Rollout:
        """Look the sampled tokens up in the reference, where there is one."""
        if self._reference is None:
            return rollout
        kl = self.objective.kl_config
        with timed(times, "reward", self.device), torch.no_grad(), self._reference.running():
            return with_reference(rollout, self._reference.model, self.sampling, kl.full, kl.reference_batch_size)

    def _statistics(
        self, rollout: Rollout, trained: Tensor | None = None, batch_size: int | None = None
    ) -> PolicyStatistics:
        return policy_statistics(self.policy, rollout, self.sampling, self.reference, trained, batch_size)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.trainer.strategy.reduce(values, reduce_op="sum"))

    def _log_training(self, output: StepOutput, clip_fraction: Tensor) -> None:
        values = {**step_values(output), "loss": (output["loss"], None)}
        if self.objective.loss_config.kind == "clipped":
            mask = self.objective.loss_mask(output["rollout"])
            values["clip_fraction"] = (clip_fraction.expand_as(mask), mask)
        self._sums.add(values)
        if output["closes_step"]:
            for name, mean in self._sums.means(self._sum_over_ranks).items():
                self.log(f"train/{name}", mean, prog_bar=name in ("reward", "kl"), batch_size=1)

    # Evaluation

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Evaluate sampled and greedy responses; the same random numbers every time."""
        return self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Evaluate as in validation, logged under `test/`."""
        return self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: PromptBatch, batch_idx: int, stage: str) -> StepOutput:
        times = {"rollout": 0.0, "reward": 0.0}
        rollout = self._with_reference(self._roll_out(batch, EVALUATION, batch_idx, times), times)
        now = self._statistics(rollout)
        kl = self.objective.kl(now.log_probs, rollout, now.kl)
        output = StepOutput(
            rollout=rollout._replace(reference_hidden=None),
            advantages=self.objective.advantages(rollout, kl, self.kl_coef, lambda values: values),
            kl=kl,
            entropy=now.entropy,
            entropy_mask=rollout.sampled.response_mask,
            times=times,
            closes_step=True,
        )
        log = partial(self.log, on_step=False, on_epoch=True, sync_dist=True)
        for name, (values, mask) in step_values(output).items():
            weight = float(values.numel() if mask is None else mask.sum())  # Lightning rounds a mean of integers
            mean = (values.double().sum() / max(1.0, weight)).float()
            log(f"{stage}/{name}", mean, batch_size=cast(int, weight), prog_bar=name in ("reward", "baseline_reward"))
        return output

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return prompt, sampled and greedy response and their rewards, one dictionary per sampled response."""
        return predictions(self._roll_out(batch, EVALUATION, batch_idx, {}))

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
