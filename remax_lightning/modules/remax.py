"""ReMax: REINFORCE with the greedy response's reward as the baseline (Li et al. 2023, arXiv 2310.10505)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from remax_lightning.batch import PromptBatch, Rollout, StepOutput
from remax_lightning.errors import UserError
from remax_lightning.functional import PolicyStatistics
from remax_lightning.models import PretrainedModel, freeze
from remax_lightning.modules import checks
from remax_lightning.modules.checkpointing import experience_from_state, experience_state
from remax_lightning.modules.collect import Stopping, collect, timed
from remax_lightning.modules.objective import Experience, Objective
from remax_lightning.modules.options import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.modules.policy import PolicyModule
from remax_lightning.modules.reporting import Sums, predictions, step_values
from remax_lightning.modules.statistics import policy_statistics, with_reference
from remax_lightning.rewards.base import Reward
from remax_lightning.rollout import AutoEngine, RolloutEngine, SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING, EVALUATION = 0, 1


class ReMaxModule(PolicyModule):
    """Aligns a policy with a reward.

    Args:
        policy: the language model that is trained.
        reward: scores responses.
        reference: frozen model that the policy is kept close to, usually the policy's own start; needed where
            `kl_coef` or `kl.loss_coef` is above 0.
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
        self.reward, self.reference_source = reward, reference
        self.engine: RolloutEngine = rollout if rollout is not None else AutoEngine()
        self.sampling, self.kl_coef = sampling, kl_coef
        self.objective = Objective(kl, advantage, loss, sampling.num_samples)
        self._experience: Experience | None = None
        self._sums = Sums()
        self._seed: int | None = None
        self._rollouts = 0
        self._reward_device: torch.device | None = None

    # Loading

    @property
    def reference(self) -> PreTrainedModel | None:
        """The frozen reference. Not a submodule: no optimizer, checkpoint or gradient reduction meets it."""
        return self.__dict__.get("_reference")

    def configure_model(self) -> None:
        """Load policy, tokenizer and reference."""
        super().configure_model()
        if self.reference_source is None or self.reference is not None:
            return
        reference = freeze(self.reference_source.load("model.reference"))
        checks.check_vocabularies(self.policy, reference, self.policy_source.path, self.reference_source.path)
        self.__dict__["_reference"] = reference

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
        if self.reference is not None:
            cast("torch.nn.Module", self.reference).to(self.device)
            checks.check_full_kl(self.objective.kl_config, self.policy, self.reference)
        if self._reward_device != self.device:
            self.reward.load(self.device)
            self._reward_device = self.device
        if self._seed is None:
            self._seed = torch.initial_seed() % 2**63
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
        experience, split, num_splits = self._experience, batch.split, batch.num_splits
        if split + 1 == num_splits:
            self._experience = None  # the last part: nothing to carry over, in memory or in a checkpoint
        part = experience.rollout.part(split, num_splits)
        now = self._statistics(part)  # the only pass with gradients
        if experience.advantages is None:
            kl = self.objective.kl(now.log_probs, part, now.kl)
            advantages = self.objective.advantages(part, kl, self.kl_coef, self._sum_over_ranks)
        else:
            rows = slice(split * len(part.reward), (split + 1) * len(part.reward))
            advantages = experience.advantages[rows]
            kl = None if experience.kl is None else experience.kl[rows]
        accumulate = self.trainer.accumulate_grad_batches
        normaliser = self._share(experience.normalisers[split // accumulate])
        loss, clip_fraction = self.objective.loss(now.log_probs, part, advantages, normaliser, now.kl)
        output = StepOutput(
            loss=loss,
            rollout=part._replace(reference_hidden=None),  # a callback may keep outputs for long
            advantages=advantages,
            kl=kl,
            entropy=now.entropy.detach(),
            times=times,
            closes_step=(split + 1) % accumulate == 0,
        )
        self._log_training(output, clip_fraction)
        return output

    def _share(self, normaliser: Tensor) -> Tensor:
        """Undo the division by micro-batches and ranks that Lightning and the strategy apply to every gradient."""
        return normaliser / (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def _explore(self, batch: PromptBatch, times: dict[str, float]) -> Experience:
        """Make a rollout with all that training on it needs."""
        updates = self._updates_per_rollout(batch.num_splits)
        generator = self._generator(TRAINING, self._rollouts)
        self._rollouts += 1
        rollout = self._roll_out(batch, generator, self.objective.needs_greedy, times)
        normalisers = self._sum_over_ranks(self.objective.update_counts(rollout, updates))
        whitens_parts = self.objective.advantage_config.whiten and batch.num_splits > 1
        if updates == 1 and not whitens_parts:
            return Experience(rollout, normalisers)
        with torch.no_grad(), timed(times, "reward", self.device):
            now = self._statistics(rollout, passes=batch.num_splits)
        kl = self.objective.kl(now.log_probs, rollout, now.kl)
        hidden = rollout.reference_hidden if self.objective.kl_config.full_loss else None
        rollout = rollout._replace(log_probs=now.log_probs, reference_hidden=hidden)
        advantages = self.objective.advantages(rollout, kl, self.kl_coef, self._sum_over_ranks)
        return Experience(rollout, normalisers, advantages, kl)

    def _roll_out(
        self, batch: PromptBatch, generator: torch.Generator, greedy: bool, times: dict[str, float]
    ) -> Rollout:
        """Sample and decode greedily, score, and look the sampled tokens up in the reference."""
        rollout = collect(
            self.policy,
            batch,
            engine=self.engine,
            sampling=self.sampling,
            stopping=Stopping(self.eos_ids(), cast(int, self.tokenizer.pad_token_id)),
            generator=generator,
            tokenizer=self.tokenizer,
            reward=self.reward,
            greedy=greedy,
            truncation_penalty=self.objective.truncation_penalty,
            times=times,
        )
        if self.reference is None:
            return rollout
        with torch.no_grad(), timed(times, "reward", self.device):
            return with_reference(rollout, self.reference, self._temperature, self.objective.kl_config.full)

    @property
    def _temperature(self) -> float:
        return self.sampling.temperature if self.sampling.scale_log_probs else 1.0

    def _statistics(self, rollout: Rollout, passes: int = 1) -> PolicyStatistics:
        return policy_statistics(self.policy, rollout, self._temperature, self.reference, passes)

    def _generator(self, stage: int, count: int) -> torch.Generator:
        """Return a generator for one rollout, its seed made from run, rank, stage and number.

        Nothing of it has to be saved but the count, on no rank, and evaluation draws nothing from training.
        """
        entropy = [cast(int, self._seed), self.global_rank, stage, count]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.Generator(self.device).manual_seed(seed)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.trainer.strategy.reduce(values, reduce_op="sum"))

    def _log_training(self, output: StepOutput, clip_fraction: Tensor) -> None:
        sums, part = self._sums, output["rollout"]
        for name, (values, mask) in step_values(output).items():
            sums.add(name, values, mask)
        sums.add("loss", output["loss"])
        if self.objective.loss_config.kind == "clipped":
            mask = self.objective.loss_mask(part)
            sums.add("clip_fraction", clip_fraction.expand_as(mask), mask)
        if not output["closes_step"]:
            return
        names, totals = sums.take()
        total, weight = self._sum_over_ranks(totals).unbind(-1)
        means = dict(zip(names, (total / weight.clamp_min(1)).tolist(), strict=True))
        for name, mean in means.items():
            self.log(f"train/{name}", mean, prog_bar=name in ("reward", "kl"), batch_size=len(part.reward))

    # Evaluation

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Evaluate sampled and greedy responses; the same random numbers every time."""
        return self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Evaluate as in validation, logged under `test/`."""
        return self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: PromptBatch, batch_idx: int, stage: str) -> StepOutput:
        times = {"rollout": 0.0, "reward": 0.0}
        rollout = self._roll_out(batch, self._generator(EVALUATION, batch_idx), True, times)
        now = self._statistics(rollout)
        kl = self.objective.kl(now.log_probs, rollout, now.kl)
        output = StepOutput(
            rollout=rollout._replace(reference_hidden=None),
            advantages=self.objective.advantages(rollout, kl, self.kl_coef, lambda values: values),
            kl=kl,
            entropy=now.entropy,
            times=times,
            closes_step=True,
        )
        log = partial(self.log, on_step=False, on_epoch=True, sync_dist=True)
        for name, (values, mask) in step_values(output).items():
            weight = values.numel() if mask is None else int(mask.sum())
            mean = values.double().sum() / max(1, weight)
            log(f"{stage}/{name}", mean.float(), batch_size=weight, prog_bar=name in ("reward", "baseline_reward"))
        return output

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return prompt, sampled and greedy response and their rewards, one dictionary per sampled response."""
        rollout = self._roll_out(batch, self._generator(EVALUATION, batch_idx), True, {})
        return predictions(rollout)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the count of rollouts, and a rollout whose updates are not all done."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["remax"] = {
            "seed": self._seed,
            "rollouts": self._rollouts,
            "experience": None if self._experience is None else experience_state(self._experience),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up where the saved run was."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("remax")
        if state is None:
            return
        self._seed, self._rollouts = state["seed"], state["rollouts"]
        if state["experience"] is not None:
            self._experience = experience_from_state(state["experience"])
