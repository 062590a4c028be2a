"""ReMax: REINFORCE with the greedy response's reward as the baseline (Li et al. 2023, arXiv 2310.10505)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

from remax_lightning.config import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.distributed import broadcast, max_over_ranks, raise_on_all_ranks, sum_tensor_over_ranks
from remax_lightning.errors import UserError
from remax_lightning.evaluation.evaluator import Evaluator
from remax_lightning.functional import PolicyStatistics
from remax_lightning.models.loading import ModelSource, as_model_config
from remax_lightning.models.log_probs import policy_statistics, with_reference
from remax_lightning.models.packing import packing_obstacle
from remax_lightning.modules.policy import PolicyModule
from remax_lightning.rewards.base import Reward
from remax_lightning.rewards.weighted import RewardSource, as_reward
from remax_lightning.rollout import AutoEngine, RolloutEngine, SamplingConfig
from remax_lightning.strategies import accumulate_gradients
from remax_lightning.training import config_checks as checks
from remax_lightning.training.experience import Experience, RolloutBuffer, TrainingPass, join_passes
from remax_lightning.training.metrics import MeanMetrics, TrainingMeter, predictions, step_values
from remax_lightning.training.micro_batches import (
    MicroBatches,
    check_budget,
    plan_micro_batches,
    response_numbers,
    row_lengths,
)
from remax_lightning.training.objective import Objective, UpdatePlan, has_next_rollout
from remax_lightning.training.on_policy import OnPolicyGaps, judge_gaps, measure_gaps
from remax_lightning.training.reference import MovingReference, Reference, make_reference
from remax_lightning.training.resume import gather_rank_states, select_rank_state
from remax_lightning.training.worker import EVALUATION, TRAINING, RolloutWorker, rollout_generator
from remax_lightning.types import PromptBatch, Responses, Rollout, StepOutput

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
        kl_coef: float = 0.05,
        kl: KLConfig = KLConfig(),  # noqa: B008
        advantage: AdvantageConfig = AdvantageConfig(),  # noqa: B008
        loss: LossConfig = LossConfig(),  # noqa: B008
        check_on_policy: bool = True,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_skipped_steps: int = 5,
        stall_timeout: float | None = 1800.0,
        cudnn_attention: bool = False,
    ) -> None:
        policy = as_model_config(policy, "policy")
        reference = None if reference is None else as_model_config(reference, "reference")
        if reference is None and policy.lora is None and (kl_coef > 0 or kl.loss_coef > 0):
            reference = checks.start_of(policy)  # the KL is measured to where the policy starts
        checks.check_kl(kl_coef)
        checks.check_reference(reference)
        # Raises where choices contradict each other: now, and not after minutes of loading models.
        objective = Objective(kl, advantage, loss, sampling.num_samples)
        reward = as_reward(reward)
        checks.check_compares(reward, objective.baseline, advantage)
        checks.check_normalized(reward, advantage)
        checks.check_ahead(getattr(rollout, "ahead", 0), objective.baseline, loss.mismatch.kind)
        overlong_cache = advantage.soft_cache(sampling.max_response_length)
        penalty = objective.truncation_penalty
        worker = RolloutWorker(rollout or AutoEngine(), sampling, reward, penalty, overlong_cache)
        super().__init__(
            policy, worker, tokenizer, optimizer, lr_scheduler, max_skipped_steps, stall_timeout, cudnn_attention
        )
        self.reference_source, self.kl_coef, self.objective = reference, kl_coef, objective
        self.evaluator = Evaluator(worker, objective)
        self.check_on_policy = check_on_policy
        self.buffer = RolloutBuffer()
        self._plans: dict[tuple[int, bool], UpdatePlan] = {}  # by number of micro-batches, and whether tokens cut them
        self._reference: Reference | None = None
        steps = kl.reference_sync_steps
        self._moving = None if steps is None else MovingReference(steps, kl.reference_mixup_alpha)
        self._metrics = MeanMetrics()
        self._meter = TrainingMeter()  # for a baseline that learns from training
        self._has_gradients = False  # of this optimizer step, from passes before the one that Lightning runs backward
        self._num_rollouts = 0  # in training; with the seed it fixes the next one's random numbers
        self._seed: int | None = None  # of the run: rank 0's, or that of the checkpoint

    def hyper_parameters(self) -> dict[str, Any]:
        """Return the arguments that are text, numbers or made of them, for its checkpoints."""
        objective = self.objective
        return {
            "policy": asdict(self.policy_source),
            "reference": None if self.reference_source is None else asdict(self.reference_source),
            "tokenizer": self.tokenizer_path,
            "sampling": asdict(self.sampling),
            "kl_coef": self.kl_coef,
            "kl": asdict(objective.kl_config),
            "advantage": objective.advantage_config.as_dict(),
            "loss": asdict(objective.loss_config),
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
        self._prepare()
        self._plans.clear()
        # Plan now, so that a contradiction ends the run before the first rollout. Loaders without a data module show
        # their micro-batches only in their batches.
        data = getattr(self.trainer, "datamodule", None)
        num_micro_batches = getattr(data, "num_micro_batches", None)
        if num_micro_batches is not None:
            self.get_plan(num_micro_batches, getattr(data, "tokens_per_micro_batch", None) is not None)

    def on_train_start(self) -> None:
        """Check that no epoch ends within a rollout; the length of an epoch is known only now."""
        super().on_train_start()
        if self._moving is not None:
            # Strategies that shard load their checkpoints after `on_fit_start`.
            self._moving.restore(self._reference)
        # Plan again with the number of batches in an epoch.
        plans = list(self._plans)
        self._plans.clear()
        for plan in plans:
            self.get_plan(*plan)
        if self.check_on_policy:
            self._check_on_policy()

    def _check_on_policy(self) -> None:
        """Stop a run whose engine, model or precision separates what is drawn from what is trained."""
        model, lora = self.policy, self.policy_source.lora
        # Where the user asked for dropout, train mode differs from eval mode on purpose.
        asked = not self.policy_source.disable_dropout or (lora is not None and lora.dropout > 0)
        # In the run's own precision, so that rounding is that of a training step.
        with self.trainer.precision_plugin.train_step_context():
            with raise_on_all_ranks(self.trainer):
                gaps = measure_gaps(model, self.worker)
            # The largest gap of any rank, so that all ranks judge alike: looking for a layer to blame runs the policy.
            gaps = OnPolicyGaps(*max_over_ranks(self.trainer, gaps))
            judge_gaps(gaps, model, self.worker, is_16_bit=self.is_16_bit, random_layers=asked)

    def on_validation_start(self) -> None:
        """Move frozen models to the device, and start an evaluation."""
        self._prepare()

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def _prepare(self) -> None:
        # The strategy has cast buffers along with the weights by now.
        self.constants.restore()
        if self._reference is not None:
            self._reference.prepare(self.device, needs_head=self.objective.kl_config.full)
            checks.check_full_kl(self.objective.kl_config, self.policy, self._reference)
        if self._moving is not None:
            self._moving.check(self._reference, self.policy)
            self._moving.restore(self._reference)
        self.prepare_rollouts()
        # ---- What only a run knows: its seed, and the longest prompt of its data ----
        if self._seed is None:
            # The seed of rank 0, because a checkpoint holds that one.
            self._seed = broadcast(self.trainer.strategy, torch.initial_seed() % 2**63)
        self.evaluator.prepare(self.trainer, self.policy, self._reference, self._seed)
        data = getattr(self.trainer, "datamodule", None)
        longest = getattr(data, "max_prompt_length", None)
        budget = getattr(data, "tokens_per_micro_batch", None)
        check_budget(budget, longest, self.sampling.max_response_length, self.sampling.num_samples)
        checks.check_lengths(self.policy, longest, self.sampling.max_response_length)
        checks.check_rope(self.policy, longest, self.sampling.max_response_length)
        self.worker.check_engine(self.policy, longest)

    def get_plan(self, num_micro_batches: int, has_token_budget: bool = False) -> UpdatePlan:
        """Return the plan for rollout batches of `num_micro_batches`; data modules have it at fit start.

        Raises:
            UserError: if an optimizer step would span two rollouts, or the loss does not support several updates.
        """
        key = num_micro_batches, has_token_budget
        if key not in self._plans:
            self._plans[key] = self.objective.plan_update(
                num_micro_batches,
                self.trainer.accumulate_grad_batches,
                kl_coef=self.kl_coef,
                has_reference=self._reference is not None,
                num_batches=self.trainer.num_training_batches,
                has_token_budget=has_token_budget,
            )
        return self._plans[key]

    # ---- Training ----

    def training_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Train on one micro-batch of a rollout; the first one makes the rollout."""
        # ---- Experience: made for the whole rollout batch, trained on micro-batch by micro-batch ----
        if batch.micro_batch_index == 0:
            # y ~ pi(.|x) and y* greedy, decoded together; r = reward(x, y), b = reward(x, y*); log pi_ref(y_t)
            self.buffer.fill(self._make_experience(batch))
        experience = self.buffer.micro_batch(batch.micro_batch_index)  # r [S], b [B], mask [S, R]
        # N of the update that this micro-batch is part of, over all ranks. Lightning and the strategy divide every
        # gradient by micro-batches and ranks: undo that.
        accumulate = self.trainer.accumulate_grad_batches
        normalizer = experience.normalizers[batch.micro_batch_index // accumulate]
        normalizer = normalizer / (accumulate * self.trainer.world_size)
        # ---- One pass; a budget of tokens makes several of it ----
        passes: list[TrainingPass] = []
        for part in experience.split():
            if passes:  # Lightning makes the backward pass of the last one
                accumulate_gradients(self.trainer, passes[-1].loss)
                self._has_gradients = True
            passes.append(self._training_pass(part, normalizer))
        result = join_passes(passes, experience)
        if self.objective.baseline.learns_from_training:
            self._meter.add(result.squared_norm)
        return self._report(result, batch.micro_batch_index)

    def _training_pass(self, experience: Experience, normalizer: Tensor) -> TrainingPass:
        """Return the loss of an experience from the only pass with gradients."""
        # ---- pi ----
        active = experience.active_responses()  # [S], False where every advantage is 0
        stats = self.token_statistics(experience.rollout, active)  # log pi(y_t) [S, R]
        # A_t = r - b - beta * sum_{s>=t} kl_s [S, R]
        experience = self.objective.with_advantages(experience, stats, self.kl_coef, self._sum_over_ranks)
        # ---- The loss: - sum_t A_t log pi(y_t) / N ----
        loss, clip_fraction = self.objective.loss(stats.log_probs, experience, normalizer, stats.kl)
        squared_norm = cast(Tensor, stats.squared_norm)
        if experience.squared_norm is not None:  # of the responses that are not run
            squared_norm = torch.where(active[:, None], squared_norm, experience.squared_norm)
        return TrainingPass(
            loss,
            experience,
            stats.log_probs.detach(),
            stats.entropy.detach(),
            squared_norm,
            active,
            clip_fraction,
        )

    def _make_experience(self, batch: PromptBatch) -> Experience:
        """Make a rollout with everything that training on it needs."""
        plan = self.get_plan(batch.num_micro_batches, batch.tokens_per_micro_batch is not None)
        self._meter.tell(self.objective.baseline, self.trainer)  # of the rollout before
        # ---- The rollout: y, y*, r and b; with it log pi_old(y_t), where the engine returns it ----
        self.free_gradients()
        if self._moving is not None:
            self._moving.move(self._reference, self.policy, self.trainer.global_step)
        from_engine = plan.old_log_probs_from_rollout or plan.compares_engine
        rollout = self._roll_out(batch, TRAINING, self._num_rollouts, from_engine)
        self._num_rollouts += 1
        if plan.compares_engine:
            rollout = self._as_engine_log_probs(rollout)  # log mu(y_t) [S, R]
        if self.reward.normalized_weights is not None:
            # r - b part by part, on scales that are those of all micro-batches and ranks
            rollout = self._normalize_parts(rollout, self.reward.normalized_weights)
        rollout_seconds = self.worker.timer.total
        # b of every sampled response [S], where it reads the whole batch of all ranks
        baseline = self.objective.baseline_of_batch(rollout, self.trainer)
        # ---- What training needs besides, from passes without gradients ----
        if plan.has_kl:
            rollout = self.with_reference(rollout)  # log pi_ref(y_t) [S, R]
        # N of each update: response tokens (or responses) over all ranks
        normalizers = self._sum_over_ranks(self.objective.update_counts(rollout, plan.updates_per_rollout))  # [U]
        experience = Experience(rollout, normalizers, baseline=baseline)
        if not plan.has_kl and not self.objective.baseline.reads_gradients:
            # A_t needs nothing of the policy
            experience = self.objective.with_advantages(experience, None, self.kl_coef, self._sum_over_ranks)
        # Which responses each training pass runs, now that their lengths are known, and which have an advantage
        if batch.tokens_per_micro_batch is not None:
            experience = experience._replace(parts=self._plan_parts(experience, batch.tokens_per_micro_batch))
        # pi_old is the policy before the first update on this rollout. Several updates need it for pi / pi_old, and
        # whitening with a KL needs all log-probs at once.
        if plan.needs_old_log_probs:
            experience = self._with_old_log_probs(experience, plan)
        # Advantages with a KL of a single update are computed in the training pass.
        return self._begin_measuring(experience, plan, rollout_seconds)

    def _begin_measuring(self, experience: Experience, plan: UpdatePlan, rollout_seconds: float) -> Experience:
        """Measure training on a rollout, where the baseline learns from it."""
        if not self.objective.baseline.learns_from_training:
            return experience
        has_norms = self.objective.baseline.needs_norms(is_free=plan.has_kl)
        self._meter.begin(rollout_seconds, has_norms=has_norms)
        return self._with_norms_of_idle(experience, plan) if has_norms and not plan.has_kl else experience

    def _with_norms_of_idle(self, experience: Experience, plan: UpdatePlan) -> Experience:
        """Add the squared norms of the responses that training leaves out, in passes without gradients."""
        passes = experience.passes(plan.num_micro_batches)
        idle = ~experience.active_responses(plan.num_micro_batches)  # [S]
        for numbers in passes:  # as many passes on every rank, each of at least one response
            idle[numbers[0]] |= ~idle[numbers].any()
        with torch.no_grad():
            stats = self.token_statistics(experience.rollout, idle, passes)
        return experience._replace(squared_norm=stats.squared_norm)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the clock of the step for a baseline that learns from training."""
        self._meter.stop()
        super().on_train_batch_end(outputs, batch, batch_idx)

    def _as_engine_log_probs(self, rollout: Rollout) -> Rollout:
        """Move the log-probs of decoding to where they are compared with the trainer's."""
        if rollout.log_probs is None:
            raise UserError(
                f"model.loss.mismatch.kind is {self.objective.loss_config.mismatch.kind}, which needs the log-probs of"
                f" drawn tokens, and model.rollout {type(self.engine).__name__} returns none; set it to none, or take"
                " an engine that returns them"
            )
        return rollout._replace(engine_log_probs=rollout.log_probs, log_probs=None)

    def _normalize_parts(self, rollout: Rollout, weights: dict[str, float]) -> Rollout:
        greedy_penalty = self.worker.overlong_penalty(cast(Responses, rollout.greedy))  # [B]
        penalty = self.worker.overlong_penalty(rollout.sampled) - greedy_penalty.repeat_interleave(rollout.num_samples)
        return self.objective.normalize(rollout, weights, penalty, self._sum_over_ranks)

    def _with_old_log_probs(self, experience: Experience, plan: UpdatePlan) -> Experience:
        """Add log pi_old(y_t), and the advantages that depend on a KL."""
        rollout = experience.rollout
        if rollout.log_probs is not None:
            # Advantages read log-probs only, so these stand in for the entropy as well. A KL over the vocabulary is
            # refused with log-probs of the engine.
            stats = PolicyStatistics(rollout.log_probs, rollout.log_probs, None)
            return self.objective.with_advantages(experience, stats, self.kl_coef, self._sum_over_ranks)
        with torch.no_grad(), self.worker.timer.measure("reward", self.device):
            active = experience.active_responses(plan.num_micro_batches)  # [S]
            stats = self.token_statistics(rollout, active, experience.passes(plan.num_micro_batches))
        # Training passes need the hidden states of the reference only for a KL loss over the vocabulary.
        hidden = rollout.reference_hidden if self.objective.kl_config.full_loss else None
        if self.objective.baseline.reads_gradients:
            baseline = self.objective.baseline_of_batch(rollout, self.trainer, stats.squared_norm)  # [S, R]
            experience = experience._replace(baseline=baseline)
        experience = experience._replace(rollout=rollout._replace(log_probs=stats.log_probs, reference_hidden=hidden))
        return self.objective.with_advantages(experience, stats, self.kl_coef, self._sum_over_ranks)

    def token_statistics(
        self, rollout: Rollout, active: Tensor | None = None, passes: Sequence[Tensor] | None = None
    ) -> PolicyStatistics:
        """Return log-probs, entropies and, if needed, the full KL of the sampled tokens, each `[S, R]`."""
        return policy_statistics(
            self.policy, rollout, self.worker.sampling, self.reference, active, passes, self.worker.suppressed
        )

    def _plan_parts(self, experience: Experience, budget: int) -> MicroBatches:
        """Return the prompts of each training pass of at most `budget` tokens: as many passes on every rank."""
        lengths = row_lengths(experience.rollout, experience.active_responses())  # B lists of n
        return plan_micro_batches(
            lengths,
            budget,
            packed=not packing_obstacle(self.policy, max(map(max, lengths))),
            agree=self._most_of_ranks,
        )

    def _most_of_ranks(self, number: int) -> int:
        return int(max_over_ranks(self.trainer, [number])[0])

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Zero the gradients, unless those of this step have begun: Lightning calls this behind `training_step`."""
        if not self._has_gradients:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        self._has_gradients = False

    def free_gradients(self) -> None:
        """Free the gradients of the last step, which Lightning would keep during the rollout."""
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):  # frees them itself
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    def _report(self, result: TrainingPass, micro_batch_index: int) -> StepOutput:
        """Return the output for callbacks, and log means at the end of an optimizer step."""
        rollout = result.experience.rollout
        output = StepOutput(
            loss=result.loss,
            rollout=rollout._replace(reference_hidden=None),  # a callback may keep outputs
            advantages=cast(Tensor, result.experience.advantages),
            kl=result.experience.kl,
            entropy=result.entropy,
            squared_norm=result.squared_norm,
            entropy_mask=rollout.sampled.response_mask & result.active[:, None],
            times=self.worker.timer.pop(),
            closes_step=(micro_batch_index + 1) % self.trainer.accumulate_grad_batches == 0,
        )
        # ---- Log means over an optimizer step: sums over its micro-batches and all ranks, divided once ----
        values = {**step_values(output), "loss": (output["loss"], None)}
        if self.objective.loss_config.kind == "clipped":
            mask = self.objective.loss_mask(rollout)
            # A mean already; weighted by its tokens it adds up with those of the other micro-batches.
            values["clip_fraction"] = (result.clip_fraction.expand_as(mask), mask)
        if rollout.engine_log_probs is not None:
            figures, largest = self.objective.mismatch_values(result.log_probs, rollout, result.active)
            values |= figures
            self._metrics.add_largest(largest)
        if rollout.baseline_reward is None and self.objective.baseline.greedy == "sometimes":
            # NaN and not a missing key: Lightning would log the last value again.
            values["baseline_reward"] = (rollout.reward.new_full((1,), torch.nan), None)
        self._metrics.add(values)
        if output["closes_step"]:
            for name, mean in self._metrics.means(self._sum_over_ranks, partial(max_over_ranks, self.trainer)).items():
                # The mean is final. Without `batch_size` Lightning would search the batch for it.
                self.log(f"train/{name}", mean, prog_bar=name in ("reward", "kl"), batch_size=1)
            numbers = {f"train/{name}": number for name, number in self.objective.baseline.metrics().items()}
            for name, number in (numbers | self.worker.engine_metrics()).items():
                self.log(name, number, batch_size=1)
        return output

    # ---- Rollouts ----

    def _roll_out(self, batch: PromptBatch, stage: int, count: int, return_log_probs: bool = False) -> Rollout:
        """Sample, decode greedily and score; `count` is the number of earlier rollouts of the stage."""
        # An evaluation compares with y*, whatever the baseline is in training.
        greedy = stage == EVALUATION or self.objective.needs_greedy_now(batch, self.trainer)
        num_samples = self.evaluator.config.num_samples if stage == EVALUATION else None
        generator = rollout_generator(cast(int, self._seed), self.global_rank, stage, count, self.device)
        # A reward that fails on one rank ends all ranks, with its message.
        with raise_on_all_ranks(self.trainer):
            responses = self.worker.generate_responses(
                self.policy,
                batch,
                generator,
                greedy=greedy,
                return_log_probs=return_log_probs,
                num_samples=num_samples,
            )  # y ~ pi(.|x) [S, R], y* greedy [B, R]
            if stage == TRAINING and self.worker.ahead:
                self._begin_next(batch, count + 1)
            batch = batch._replace(following=None)
            return self.worker.score_responses(batch, responses)  # r = reward(x, y) [S], b = reward(x, y*) [B]

    def _begin_next(self, batch: PromptBatch, count: int) -> None:
        """Let the engine write the responses of the next rollout while this one trains, unless the run ends before."""
        plan = self.get_plan(batch.num_micro_batches, batch.tokens_per_micro_batch is not None)
        if batch.following is None or not has_next_rollout(self.trainer, plan):
            return
        generator = rollout_generator(cast(int, self._seed), self.global_rank, TRAINING, count, self.device)
        greedy = self.objective.baseline.greedy == "always"
        self.worker.begin_responses(self.policy, batch.following, generator, greedy=greedy)

    def with_reference(self, rollout: Rollout) -> Rollout:
        """Return `rollout` with the log-probs of its sampled tokens under the reference, if there is one."""
        if self._reference is None:
            return rollout
        kl = self.objective.kl_config
        with self.worker.timer.measure("reward", self.device), torch.no_grad(), self._reference.running():
            return with_reference(
                rollout,
                self._reference.model,
                self.worker.sampling,
                kl.full,
                kl.reference_batch_size or self._reference_passes(rollout),
                self.worker.suppressed,
            )

    def _reference_passes(self, rollout: Rollout) -> Sequence[Tensor] | None:
        """Return the responses of each pass of the reference under a budget of tokens; ranks may differ in number."""
        budget = rollout.prompt.tokens_per_micro_batch
        if budget is None:
            return None
        lengths = row_lengths(rollout)  # B lists of n
        packed = not packing_obstacle(cast("PreTrainedModel", self.reference), max(map(max, lengths)))
        # In training every rank makes this rollout, so all can agree on a number. What a rank would repeat for another
        # that has more would run without packing.
        agree = self._most_of_ranks if self.trainer.training else int
        return response_numbers(rollout, plan_micro_batches(lengths, budget, packed=packed, agree=agree))

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return sum_tensor_over_ranks(self.trainer, values)

    # ---- Evaluation ----

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Evaluate sampled and greedy responses, with the same random numbers in every validation."""
        rollout = self.with_reference(self._roll_out(batch, EVALUATION, batch_idx))
        return self.evaluator.evaluate(rollout, self.token_statistics(rollout), self.kl_coef, batch_idx)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all ranks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log as in validation, under `test/`."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        for name, mean in self.evaluator.means().items():  # the same on every rank already
            self.log(f"{stage}/{name}", mean, prog_bar=name in ("reward", "baseline_reward"))

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return prompt, sampled and greedy response and their rewards, one dictionary per sampled response."""
        return predictions(self._roll_out(batch, EVALUATION, batch_idx))

    def settings(self) -> dict[str, Any]:
        """Return the JSON-ready settings that an evaluation depends on."""
        reference = None if self.reference_source is None else self.reference_source.path
        return {
            "policy": self.policy_source.path,
            "reference": "the policy's start" if reference is None and self._reference is not None else reference,
            "reward": {"class_path": f"{type(self.reward).__module__}.{type(self.reward).__qualname__}"},
            "truncation_penalty": self.objective.truncation_penalty,
            "overlong_cache": self.worker.overlong_cache,
            "sampling": asdict(self.sampling),
            "kl": asdict(self.objective.kl_config),
        }

    # ---- Checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the number of rollouts, and an unfinished rollout."""
        super().on_save_checkpoint(checkpoint)
        with raise_on_all_ranks(self.trainer):
            written = self.worker.state_dict()  # of the weights before this step, so it is waited for
        # Seed and count fix the random numbers of the next rollout, so no generator is saved. Each rank has a rollout
        # of its own.
        checkpoint["remax"] = {
            "seed": self._seed,
            "rollouts": self._num_rollouts,
            "experience": gather_rank_states(self.buffer.state_dict()),
            "ahead": gather_rank_states(written),
            "reference": None if self._moving is None else self._moving.state_dict(self._reference),
            # The same on every rank, with the class that it belongs to.
            "baseline": (type(self.objective.baseline).__qualname__, self.objective.baseline.state_dict()),
            "meter": self._meter.state_dict() if self.objective.baseline.learns_from_training else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume where the saved run was."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("remax")
        if state is None:
            return
        self._seed, self._num_rollouts = state["seed"], state["rollouts"]
        if self._moving is not None:
            self._moving.load_state_dict(state.get("reference"))
        # Another baseline than the checkpoint's starts anew; its memory would mean something else.
        kind, memory = state.get("baseline") or ("", {})
        if kind == type(self.objective.baseline).__qualname__:
            self.objective.baseline.load_state_dict(memory)
            self._meter.load_state_dict(state.get("meter"), self.trainer)
        self.buffer.load_state_dict(select_rank_state(state["experience"], self.trainer))
        written = state.get("ahead") or []  # of other prompts with another number of processes; then written anew
        self.worker.load_state_dict(written[self.global_rank] if len(written) == self.trainer.world_size else None)

    def teardown(self, stage: str) -> None:
        """Give up on responses that nobody will ask for."""
        self.worker.drop_responses()
        super().teardown(stage)
