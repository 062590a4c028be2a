"""ReMax: REINFORCE with the greedy response's reward as the baseline (Li et al. 2023, arXiv 2310.10505)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

from remax_lightning.config import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.distributed import max_over_ranks, raise_on_all_ranks, sum_tensor_over_ranks
from remax_lightning.errors import at_least, check_ranges
from remax_lightning.evaluation.evaluator import Evaluator
from remax_lightning.functional import TokenStatistics
from remax_lightning.models.loading import ModelSource, as_model_config
from remax_lightning.models.log_probs import policy_statistics
from remax_lightning.modules.policy import PolicyModule
from remax_lightning.rewards.base import Reward
from remax_lightning.rewards.weighted import RewardSource, as_reward
from remax_lightning.rollout import AutoEngine, RolloutEngine, SamplingConfig
from remax_lightning.strategies import StepGradients
from remax_lightning.training import config_checks as checks
from remax_lightning.training.experience import Experience, TrainingPass, join_passes
from remax_lightning.training.metrics import StepMetrics, TrainingMeter, predictions
from remax_lightning.training.objective import Objective
from remax_lightning.training.on_policy import prove_on_policy
from remax_lightning.training.optimization import MaxSkippedSteps
from remax_lightning.training.reference import MovingReference, Reference, make_reference
from remax_lightning.training.resume import StallSeconds, gather_rank_states, select_rank_state
from remax_lightning.training.rollouts import RolloutBuffer, Rollouts, UpdatePlan, plan_of_run
from remax_lightning.training.worker import RolloutWorker
from remax_lightning.types import PromptBatch, Rollout, StepOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReMaxModule(PolicyModule):
    """Aligns a policy with a reward.

    Args:
        policy: the language model that is trained; a folder or hub name alone is its `path`.
        reward: scores responses. The dotted path of a function alone is a `FunctionReward`; from Python also the
            function itself, or a list of rewards, whose sum counts.
        reference: frozen model of the KL. None takes the start of the policy, where `kl_coef` or `kl.loss_coef` is
            above 0: a second copy of its weights, or none with `policy.lora`.
        tokenizer: folder or hub name; None takes the policy's.
        rollout: engine that generates responses; None chooses one for the architecture of the policy.
        sampling: how responses are sampled.
        kl_coef: reward per nat of KL that is subtracted. 0.05 as in the scripts of the paper.
        kl: how the KL is estimated and used.
        advantage: how rewards become advantages.
        loss: how advantages become a loss.
        check_on_policy: before the first step, compare the log-probs of a few drawn tokens with those of the training
            pass, and stop the run if they differ by more than rounding. Takes under 2 seconds. Set it to false for an
            engine that draws from another policy on purpose.
        optimizer: AdamW with a learning rate of 1e-6 by default, as in the recipes of TRL, verl and OpenRLHF (5e-7 to
            1e-6): larger ones drift far from the reference. An adapter (`policy.lora`) gets ten times that.
        lr_scheduler: stepped after each optimizer step; `WarmupCosine` and `WarmupLinear` know the length of the run.
        max_skipped_steps: an optimizer step whose gradient is not finite is skipped; the run ends after this many in a
            row. One may be due to a single batch; 5 in a row mean that training has diverged.
        stall_timeout: seconds without a batch, a rollout, a score or a checkpoint, after which the stacks of all ranks
            are written to the folder of the run and the run ends. Half an hour, as torch's collectives wait by default:
            a single rollout or checkpoint rarely takes as long. Null watches nothing, as for a debugger.
        cudnn_attention: whether attention may run in cuDNN on CUDA. Off, because it has returned NaN gradients for
            padded rows (pytorch#196678) and takes about a second to plan each new shape.

    Raises:
        UserError: if the choices contradict each other.
        TypeError: if an argument is of another type.
    """

    def __init__(
        self,
        policy: ModelSource,
        reward: RewardSource,
        reference: ModelSource | None = None,
        tokenizer: str | None = None,
        rollout: RolloutEngine | None = None,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        kl_coef: Annotated[float, at_least(0)] = 0.05,
        kl: KLConfig = KLConfig(),  # noqa: B008
        advantage: AdvantageConfig = AdvantageConfig(),  # noqa: B008
        loss: LossConfig = LossConfig(),  # noqa: B008
        check_on_policy: bool = True,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_skipped_steps: MaxSkippedSteps = 5,
        stall_timeout: StallSeconds = 1800.0,
        cudnn_attention: bool = False,
    ) -> None:
        check_ranges(ReMaxModule.__init__, locals(), "model")
        policy = as_model_config(policy, "policy")
        reference = checks.reference_source(reference, policy, kl_coef, kl)
        # Raises where choices contradict each other: now, and not after minutes of loading models.
        objective = Objective(kl, advantage, loss, sampling.num_samples)
        reward = as_reward(reward)
        checks.check_compares(reward, objective.baseline, advantage)
        checks.check_normalized(reward, advantage)
        checks.check_ahead(getattr(rollout, "ahead", 0), objective.baseline, loss.mismatch.kind)
        penalty, cache = objective.truncation_penalty, advantage.soft_cache(sampling.max_response_length)
        worker = RolloutWorker(rollout or AutoEngine(), sampling, reward, penalty, cache)
        super().__init__(
            policy, worker, tokenizer, optimizer, lr_scheduler, max_skipped_steps, stall_timeout, cudnn_attention
        )
        self.reference_source, self.kl_coef, self.objective = reference, kl_coef, objective
        self.evaluator, self.check_on_policy = Evaluator(worker, objective), check_on_policy
        self.rollouts, self.buffer = Rollouts(worker, objective), RolloutBuffer()
        self._plan: UpdatePlan | None = None  # of the rollout batches; made when a fit starts
        self._reference: Reference | None = None
        steps = kl.reference_sync_steps
        self._moving = None if steps is None else MovingReference(steps, kl.reference_mixup_alpha)
        self._metrics, self._meter = StepMetrics(), TrainingMeter()  # the meter is for a baseline that learns
        self.norm_askers: list[Callable[..., bool]] = []
        """Callbacks add what asks for the norms of the gradients of a rollout, once it is made; called with `is_free`,
        whether training runs all of its responses anyway."""
        self.gradients = StepGradients()

    def hyper_parameters(self) -> dict[str, Any]:
        """Return the arguments that are text, numbers or made of them, for its checkpoints."""
        return {
            "policy": asdict(self.policy_source),
            "reference": None if self.reference_source is None else asdict(self.reference_source),
            "tokenizer": self.tokenizer_path,
            "sampling": asdict(self.sampling),
            "kl_coef": self.kl_coef,
            "kl": asdict(self.objective.kl_config),
            "advantage": self.objective.advantage_config.as_dict(),
            "loss": asdict(self.objective.loss_config),
            "check_on_policy": self.check_on_policy,
            "max_skipped_steps": self.skipped_steps.maximum,
            "stall_timeout": self.stall_timeout,
            "cudnn_attention": self.cudnn_attention,
        }

    # ---- Loading ----

    def setup(self, stage: str) -> None:
        """Let training batches hold the next one, too, where the engine writes ahead."""
        super().setup(stage)
        if stage == "fit" and self.worker.ahead:
            checks.look_ahead(getattr(self.trainer, "datamodule", None), self.worker.ahead)

    @property
    def reward(self) -> Reward:
        """The reward that scores responses."""
        return cast(Reward, self.worker.reward)

    @property
    def reference(self) -> PreTrainedModel | None:
        """The model of the reference; the policy itself if they share weights."""
        return None if self._reference is None else self._reference.model

    def configure_model(self) -> None:
        """Load policy, tokenizer and reference."""
        super().configure_model()
        # Lightning calls this hook for every stage of a trainer; the models are loaded at the first.
        if self._reference is None:
            strategy = self.trainer.strategy
            self._reference = make_reference(self.reference_source, self.policy, self.policy_source, strategy)

    def on_fit_start(self) -> None:
        """Move frozen models to the device, plan the updates, and check settings that need the loaded models."""
        self.on_validation_start()
        self._plan_updates(getattr(self.trainer, "datamodule", None))  # a contradiction ends the run before a rollout

    def on_train_start(self) -> None:
        """Check that no epoch ends within a rollout; the length of an epoch is known only now."""
        super().on_train_start()
        if self._moving is not None:
            # Strategies that shard load their checkpoints after `on_fit_start`.
            self._moving.restore(self._reference)
        self._plan_updates(getattr(self.trainer, "datamodule", None))
        if self.check_on_policy:
            prove_on_policy(self.trainer, self.policy, self.worker, self.policy_source, is_16_bit=self.is_16_bit)

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Plan the updates where a loader shows its micro-batches only here; tell what was measured of a rollout."""
        super().on_train_batch_start(batch, batch_idx)
        if self._plan is None or self._plan.num_micro_batches != batch.num_micro_batches:
            self._plan_updates(batch)
        if batch.micro_batch_index == 0 and self.objective.baseline.learns_from_training:
            self._meter.tell(self.objective.baseline, self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the clock of the step for a baseline that learns from training."""
        self._meter.stop()
        super().on_train_batch_end(outputs, batch, batch_idx)

    def _plan_updates(self, source: Any) -> None:
        has_reference = self._reference is not None
        self._plan = plan_of_run(self.objective, self.trainer, source, self.kl_coef, has_reference)

    def on_validation_start(self) -> None:
        """Move frozen models to the device, and start an evaluation."""
        # The strategy has cast buffers along with the weights by now.
        self.constants.restore()
        if self._reference is not None:
            self._reference.prepare(self.device, needs_head=self.objective.kl_config.full)
            checks.check_full_kl(self.objective.kl_config, self.policy, self._reference)
        if self._moving is not None:
            self._moving.check(self._reference, self.policy)
            self._moving.restore(self._reference)
        self.prepare_rollouts()
        # ---- What only a run knows: its ranks, its seed, and the lengths of its data ----
        self._sum_over_ranks = partial(sum_tensor_over_ranks, self.trainer)
        seed = self.rollouts.prepare(self.trainer)
        self.evaluator.prepare(self.trainer, self.policy, self._reference, seed)
        data = getattr(self.trainer, "datamodule", None)
        longest = getattr(data, "max_prompt_length", None)
        checks.check_run(self.policy, self.worker, data)
        with self.trainer.precision_plugin.forward_context():  # an engine's own server computes in its dtype, too
            self.worker.check_engine(self.policy, longest, self.policy_source, self.tokenizer_path)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    # ---- Training ----

    def training_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Train on one micro-batch of a rollout; the first one makes the rollout."""
        # ---- Experience: made for the whole rollout batch, trained on micro-batch by micro-batch ----
        if batch.micro_batch_index == 0:
            # y ~ pi(.|x) and y* greedy, decoded together; r = reward(x, y), b = reward(x, y*); log pi_ref(y_t)
            self.buffer.experience = self._make_experience(batch)
        cut = self.buffer.micro_batches_before(batch.micro_batch_index, self._num_cut)  # none, but in a resumed run
        experience = self.buffer.micro_batch(batch.micro_batch_index)  # r [S], b [B], mask [S, R]
        # N of the update that this micro-batch is part of, over all ranks. Lightning and the strategy divide every
        # gradient by micro-batches and ranks: undo that.
        accumulate = self.trainer.accumulate_grad_batches
        normalizer = experience.normalizers[batch.micro_batch_index // accumulate]
        normalizer = normalizer / (accumulate * self.trainer.world_size)
        if cut:
            self._repeat(cut, normalizer)
        # ---- The only pass with gradients; a budget of tokens makes several of it ----
        passes: list[TrainingPass] = []
        for part in [experience] if experience.parts is None else experience.split():
            if passes:  # Lightning makes the backward pass of the last one
                self.gradients.accumulate(self.trainer, passes[-1].loss)
            passes.append(self._training_pass(part, normalizer))
        whole = passes[0] if len(passes) == 1 else join_passes(passes, experience, self.objective.loss_mask)
        baseline = self.objective.baseline
        if baseline.learns_from_training:
            self._meter.add(whole)
        # ---- What callbacks get, and means over an optimizer step for the logs ----
        closes_step = (batch.micro_batch_index + 1) % accumulate == 0
        output = self._metrics.report(whole, self.objective, self.worker.timer.pop(), closes_step=closes_step)
        if closes_step:
            # Final means. Without `batch_size` Lightning would search the batch for it.
            means = self._metrics.means(self._sum_over_ranks, partial(max_over_ranks, self.trainer))
            means |= baseline.metrics() if baseline.learns_from_training else {}
            figures = {f"train/{name}": value for name, value in means.items()}
            for name, value in (figures | self.worker.engine_metrics()).items():
                self.log(name, value, prog_bar=name in ("train/reward", "train/kl"), batch_size=1)
        return output

    def _training_pass(self, part: Experience, normalizer: Tensor) -> TrainingPass:
        """Run the policy with gradients over a part of a rollout; the loss is a term of that of the step."""
        active = part.active_responses()  # [S], False where every advantage is 0
        stats = self.token_statistics(part.rollout, active, norm=part.squared_norm is not None)  # log pi(y_t) [S, R]
        # A_t = r - b - beta * sum_{s>=t} kl_s [S, R]
        trained = self.objective.with_advantages(part, stats, self.kl_coef, self._sum_over_ranks)
        # ---- The loss: - sum_t A_t log pi(y_t) / N ----
        loss, clip_fraction = self.objective.loss(stats.log_probs, trained, normalizer, stats.kl)
        return TrainingPass(loss, trained, stats, active, clip_fraction)

    def _repeat(self, cut: Sequence[Experience], normalizer: Tensor) -> None:
        """Compute the gradients anew of the first micro-batches of a step that a checkpoint has cut."""
        self._num_cut = 0
        for part in cut:
            repeated = self._training_pass(part, normalizer)
            self.gradients.accumulate(self.trainer, repeated.loss / self.trainer.accumulate_grad_batches)
            self._metrics.report(repeated, self.objective, {}, closes_step=False)
        self.gradients.pop_begun()  # Lightning zeroes none in the middle of a step

    @property
    def repeats_cut_steps(self) -> bool:
        """Yes, as the rollout is in the checkpoint; but DeepSpeed counts the passes of a step itself."""
        return not isinstance(self.trainer.strategy, DeepSpeedStrategy)

    def _make_experience(self, batch: PromptBatch) -> Experience:
        """Make a rollout with everything that training on it needs."""
        plan, learns = cast(UpdatePlan, self._plan), self.objective.baseline.learns_from_training
        # ---- The rollout: y, y*, r and b; with it log pi_old(y_t), where the engine returns it ----
        self.rollouts.free_gradients()
        if self._moving is not None:
            self._moving.move(self._reference, self.policy, self.trainer.global_step)
        rollout = self.rollouts.make(self.policy, batch, plan)
        weights = cast(Reward, self.worker.reward).normalized_weights
        if weights is not None:
            # r - b part by part, on scales that are those of all micro-batches and ranks
            penalty = self.worker.penalty_above_greedy(rollout)  # [S]
            rollout = self.objective.normalize(rollout, weights, penalty, self._sum_over_ranks)
        if learns:
            self._meter.start(self.worker.timer.total)
        baseline = None  # b of every sampled response [S], where it reads the scores of the whole batch of all ranks
        if self.objective.reads_all_scores:
            baseline = self.objective.baseline_of_batch(rollout, self.trainer)
        # ---- What training needs besides, from passes without gradients ----
        if plan.has_kl and self._reference is not None:  # log pi_ref(y_t) [S, R]
            rollout = self.worker.with_reference(rollout, self._reference, self.objective, self.trainer)
        # N of each update: response tokens (or responses) over all ranks
        normalizers = self._sum_over_ranks(self.objective.update_counts(rollout, plan.updates_per_rollout))  # [U]
        experience = Experience(rollout, normalizers, baseline=baseline)
        if not plan.has_kl and not self.objective.baseline.reads_gradients:
            # A_t needs nothing of the policy
            experience = self.objective.with_advantages(experience, None, self.kl_coef, self._sum_over_ranks)
        # Which responses each training pass runs, now that their lengths are known, and which have an advantage
        if batch.tokens_per_micro_batch is not None:
            experience = experience.within_budget(batch.tokens_per_micro_batch, self.policy, self.trainer)
        # pi_old is the policy before the first update on this rollout. Several updates need it for pi / pi_old, and
        # whitening with a KL needs all log-probs at once.
        if plan.needs_old_log_probs:
            experience = self._with_old_log_probs(experience, plan)
        # Advantages with a KL of a single update are computed in the training pass.
        if not learns and not self.norm_askers:
            return experience
        return self._meter.ask(experience, plan, self.objective.baseline, self.norm_askers, self.token_statistics)

    def _with_old_log_probs(self, experience: Experience, plan: UpdatePlan) -> Experience:
        """Add log pi_old(y_t), and the advantages that depend on a KL."""
        rollout = experience.rollout
        if rollout.log_probs is None:
            with torch.no_grad(), self.worker.timer.measure("reward", self.device):
                active = experience.active_responses(plan.num_micro_batches)  # [S]
                passes, reads = experience.passes(plan.num_micro_batches), self.objective.baseline.reads_gradients
                stats = self.token_statistics(rollout, active, passes, norm=reads)
            # Training passes need the hidden states of the reference only for a KL loss over the vocabulary.
            hidden = rollout.reference_hidden if self.objective.kl_config.full_loss else None
            if reads:  # b of every token [S, R]
                baseline = self.objective.baseline_of_batch(rollout, self.trainer, stats.squared_norm)
                experience = experience._replace(baseline=baseline)
            rollout = rollout._replace(log_probs=stats.log_probs, reference_hidden=hidden)
        else:
            stats = TokenStatistics(rollout.log_probs)  # the engine's; a KL over the vocabulary is refused with them
        experience = experience._replace(rollout=rollout)
        return self.objective.with_advantages(experience, stats, self.kl_coef, self._sum_over_ranks)

    def token_statistics(
        self, rollout: Rollout, active: Tensor | None = None, passes: Sequence[Tensor] | None = None, norm: bool = False
    ) -> TokenStatistics:
        """Return log-probs, entropies and, if needed, the full KL of the sampled tokens, each `[S, R]`.

        With `passes`, those before the first update, no entropies: nobody reads them. Squared norms are 0 where the
        tokens are not trained on, whose gradient is 0 with any baseline.
        """
        reference = None if self._reference is None else self._reference.model
        sampling, suppressed = self.worker.sampling, self.worker.suppressed
        asked = {"entropy": passes is None, "squared_norm": norm}
        stats = policy_statistics(self.policy, rollout, sampling, reference, active, passes, suppressed, **asked)
        if stats.squared_norm is None:
            return stats
        return stats._replace(squared_norm=stats.squared_norm.masked_fill(~self.objective.loss_mask(rollout), 0.0))

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Zero the gradients, unless those of this step have begun: Lightning calls this behind `training_step`."""
        if not self.gradients.pop_begun():
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def with_reference(self, rollout: Rollout) -> Rollout:
        """Return `rollout` with the log-probs of its sampled tokens under the reference, if there is one."""
        if self._reference is None:
            return rollout
        return self.worker.with_reference(rollout, self._reference, self.objective, self.trainer)

    # ---- Evaluation ----

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Evaluate sampled and greedy responses, with the same random numbers in every validation."""
        num_samples = self.evaluator.config.num_samples
        rollout = self.with_reference(self.rollouts.make(self.policy, batch, None, batch_idx, num_samples))
        return self.evaluator.evaluate(rollout, self.token_statistics(rollout), self.kl_coef, batch_idx)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all ranks, under `val/` or `test/`."""
        stage = "test" if self.trainer.testing else "val"
        for name, mean in self.evaluator.means().items():  # the same on every rank already
            self.log(f"{stage}/{name}", mean, prog_bar=name in ("reward", "baseline_reward"))

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return prompt, sampled and greedy response and their rewards, one dictionary per sampled response."""
        num_samples = self.evaluator.config.num_samples
        return predictions(self.rollouts.make(self.policy, batch, None, batch_idx, num_samples))

    # ---- Checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the number of rollouts, and an unfinished rollout."""
        super().on_save_checkpoint(checkpoint)
        with raise_on_all_ranks(self.trainer):
            written = self.worker.state_dict()  # of the weights before this step, so it is waited for
        # Seed and count fix the random numbers of the next rollout. Each rank has a rollout of its own.
        checkpoint["remax"] = {
            "seed": self.rollouts.seed,
            "rollouts": self.rollouts.count,
            "experience": gather_rank_states(self.buffer.state_dict()),
            "ahead": gather_rank_states(written),
            "reference": None if self._moving is None else self._moving.state_dict(self._reference),
            "baseline": self.objective.state_dict(),
            "meter": self._meter.state_dict() if self.objective.baseline.learns_from_training else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume where the saved run was."""
        super().on_load_checkpoint(checkpoint)
        if (state := checkpoint.get("remax")) is None:
            return
        self.rollouts.seed, self.rollouts.count = state["seed"], state["rollouts"]
        if self._moving is not None:
            self._moving.load_state_dict(state.get("reference"))
        if self.objective.load_state_dict(state.get("baseline")):
            self._meter.load_state_dict(state.get("meter"), self.trainer)
        self.buffer.load_state_dict(select_rank_state(state["experience"], self.trainer))
        written = state.get("ahead") or []  # of other prompts with another number of processes; then written anew
        self.worker.load_state_dict(written[self.global_rank] if len(written) == self.trainer.world_size else None)

    def teardown(self, stage: str) -> None:
        """Give up on responses that nobody will ask for."""
        self.worker.drop_responses()
        super().teardown(stage)
