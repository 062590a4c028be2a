"""The rollouts of a run: how each is trained on, which one comes next, and the one that is trained on now.

The plan of the updates on a rollout follows from the configuration, and is made once when a fit starts. A rollout has
random numbers of its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy

from remax_lightning.distributed import broadcast, raise_on_all_ranks
from remax_lightning.errors import UserError
from remax_lightning.training.config_checks import engine_log_probs
from remax_lightning.training.experience import Experience
from remax_lightning.training.objective import Objective
from remax_lightning.training.prompt_selection import PromptSelector, make_selector
from remax_lightning.training.worker import RolloutWorker
from remax_lightning.types import PromptBatch, Responses, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# ---- The plan of the updates ----


class UpdatePlan(NamedTuple):
    """How a rollout is trained on. It depends on the configuration only.

    Args:
        num_micro_batches: training passes per rollout batch.
        updates_per_rollout: optimizer steps per rollout batch, `U`.
        has_kl: whether a KL to the reference enters advantages or loss.
        needs_old_log_probs: whether training needs log-probs of the policy before its first update: for the ratio of
            several updates, to whiten advantages with a KL over all micro-batches, or for a baseline that reads
            gradients.
        old_log_probs_from_rollout: whether these come from decoding; otherwise from a pass without gradients.
        compares_engine: whether the log-probs of decoding are compared with the trainer's, to correct a mismatch.
    """

    num_micro_batches: int
    updates_per_rollout: int
    has_kl: bool
    needs_old_log_probs: bool
    old_log_probs_from_rollout: bool
    compares_engine: bool = False

    @property
    def runs_policy_before_training(self) -> bool:
        """Whether the policy runs once more, without gradients, before the training passes."""
        return self.needs_old_log_probs and not self.old_log_probs_from_rollout


def plan_of_run(
    objective: Objective, trainer: Trainer, source: Any, kl_coef: float, has_reference: bool
) -> UpdatePlan | None:
    """Return the plan for the rollout batches of a data module, or for those that are like a batch.

    Args:
        objective: the configuration of the loss.
        trainer: of the run.
        source: the data module, or a batch. None is returned for one that does not tell its micro-batches, as loaders
            without a data module, whose batches do.
        kl_coef: weight of the KL in the reward.
        has_reference: whether there is a reference.
    """
    num_micro_batches = getattr(source, "num_micro_batches", None)
    if num_micro_batches is None:
        return None
    return plan_update(
        objective,
        num_micro_batches,
        trainer.accumulate_grad_batches,
        kl_coef=kl_coef,
        has_reference=has_reference,
        num_batches=trainer.num_training_batches,
        has_token_budget=getattr(source, "tokens_per_micro_batch", None) is not None,
    )


def plan_update(
    objective: Objective,
    num_micro_batches: int,
    accumulate: int,
    *,
    kl_coef: float,
    has_reference: bool,
    num_batches: int | float = math.inf,
    has_token_budget: bool = False,
) -> UpdatePlan:
    """Return the plan of the updates on a rollout.

    Args:
        objective: the configuration of the loss.
        num_micro_batches: training passes per rollout batch.
        accumulate: training passes per optimizer step.
        kl_coef: weight of the KL in the reward.
        has_reference: whether there is a reference.
        num_batches: training passes per epoch, as far as known.
        has_token_budget: whether a budget of tokens cuts a rollout batch into passes.

    Raises:
        UserError: if an optimizer step would span two rollouts, or the loss does not support several updates, or
            not a budget of tokens.
    """
    if has_token_budget:
        check_token_budget(accumulate, objective.loss_config.normalizer)
    updates = updates_per_rollout(num_micro_batches, accumulate, objective.loss_config.kind, num_batches)
    has_kl = objective.uses_kl(kl_coef) and has_reference
    # Whitening takes its moments over the whole rollout, so all advantages must exist before its first micro-batch.
    whitens_micro_batches = objective.advantage_config.whiten and (num_micro_batches > 1 or has_token_budget)
    # pi / pi_old is 1 until the first update
    needs_old = updates > 1 or (has_kl and whitens_micro_batches) or objective.baseline.reads_gradients
    from_rollout = needs_old and objective.loss_config.old_log_probs == "rollout"
    compares = objective.loss_config.mismatch.kind != "none"
    return UpdatePlan(num_micro_batches, updates, has_kl, needs_old, from_rollout, compares)


def has_next_rollout(trainer: Trainer, plan: UpdatePlan) -> bool:
    """Whether another rollout follows the one that is being made, and its prompts are those that the loader told."""
    if 0 <= trainer.max_steps <= trainer.global_step + plan.updates_per_rollout:
        return False
    if trainer.fit_loop.epoch_loop.batch_idx + plan.num_micro_batches < trainer.num_training_batches:
        return True
    # The next one is in another epoch. Where a limit ends this one early, the loader does not know what comes then.
    is_whole = trainer.num_training_batches == len(cast(Any, trainer.train_dataloader))
    return is_whole and trainer.current_epoch + 1 != trainer.max_epochs


def check_token_budget(accumulate: int, normalizer: str) -> None:
    """Refuse what a budget of tokens per micro-batch cannot be combined with.

    Raises:
        UserError: if a step spans several batches, or the loss depends on how the rollout is cut.
    """
    if accumulate > 1:
        raise UserError(
            f"trainer.accumulate_grad_batches must be 1 with data.tokens_per_micro_batch, got {accumulate}: a rollout"
            " batch arrives once, is cut into as many micro-batches as its tokens need, and makes one update"
        )
    if normalizer == "micro_batch":
        raise UserError(
            "model.loss.normalizer must be tokens or responses with data.tokens_per_micro_batch, got micro_batch: the"
            " gradient would depend on how the lengths of the responses cut the rollout; or set data.micro_batch_size"
        )


def updates_per_rollout(
    num_micro_batches: int, accumulate: int, loss_kind: str, num_batches: int | float = math.inf
) -> int:
    """Return the number of optimizer steps per rollout batch.

    Args:
        num_micro_batches: micro-batches per rollout batch.
        accumulate: micro-batches per optimizer step.
        loss_kind: `reinforce` or `clipped`.
        num_batches: micro-batches per epoch; infinite if unknown.

    Raises:
        UserError: if an optimizer step would span two rollouts, an epoch would end within one, or the loss does not
            support several updates.
    """
    # ---- A step must not reach into the next rollout, nor an epoch end within one ----
    if num_micro_batches % accumulate:
        raise UserError(
            f"trainer.accumulate_grad_batches is {accumulate}, but a rollout batch comes in {num_micro_batches}"
            " micro-batches (data.batch_size / data.micro_batch_size) and an optimizer step cannot reach into the next"
            f" one; set trainer.accumulate_grad_batches to {num_micro_batches}, or to a divisor of it for several"
            " updates per rollout"
        )
    if math.isfinite(num_batches) and num_batches % num_micro_batches:
        raise UserError(
            f"trainer.limit_train_batches ends the epoch after {num_batches} micro-batches, in the middle of a rollout"
            f" batch, which comes in {num_micro_batches}; set it to a multiple of {num_micro_batches}"
        )
    # ---- REINFORCE has no ratio pi / pi_old, so its gradient is right for one update only ----
    updates = num_micro_batches // accumulate
    if updates > 1 and loss_kind == "reinforce":
        raise UserError(
            f"trainer.accumulate_grad_batches {accumulate} with {num_micro_batches} micro-batches per rollout makes"
            f" {updates} updates per rollout; model.loss.kind reinforce is right for one only. Set"
            f" trainer.accumulate_grad_batches to {num_micro_batches}, or model.loss.kind to clipped"
        )
    return updates


# ---- Rollouts ----


TRAINING, EVALUATION, REFERENCE = 0, 1, 2
"""What rollouts are made for. The reference's responses in an evaluation have random numbers of their own, because
responses that are compared have to be independent."""


def rollout_generator(seed: int, rank: int, stage: int, count: int, device: torch.device) -> torch.Generator:
    """Return a generator for one rollout, its seed made from run, rank, stage and number.

    A checkpoint needs the count alone, and an evaluation does not change the random numbers of training.

    Args:
        seed: that of the run.
        rank: of this process.
        stage: `TRAINING`, `EVALUATION` or `REFERENCE`.
        count: how many rollouts the stage has made before.
        device: where the numbers are drawn.
    """
    # SeedSequence mixes all four, so that neighboring seeds, ranks and counts share no stream.
    entropy = [seed, rank, stage, count]
    # 63 bits, so that the number is not negative where it is read as signed.
    rollout_seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(rollout_seed)


class Rollouts:
    """Makes the rollouts of a run. Call `prepare` before the first.

    Args:
        worker: generates responses and scores them.
        objective: says whether greedy responses are needed.
    """

    trainer: Trainer
    seed: int | None = None
    """Of the run: rank 0's, or that of the checkpoint."""
    selector: PromptSelector | None = None
    """Of `data.selection`; None where each rollout is trained on as it is."""
    count: int = 0
    """Rollouts made in training; with the seed it fixes the random numbers of the next one."""

    def __init__(self, worker: RolloutWorker, objective: Objective) -> None:
        self.worker, self.objective = worker, objective

    def prepare(self, trainer: Trainer) -> int:
        """Return the seed of the run; every rank calls this."""
        self.trainer = trainer
        self.selector = make_selector(trainer, self.objective, self.worker.reward)
        if self.seed is None:
            # The seed of rank 0, because a checkpoint holds that one.
            self.seed = int(broadcast(trainer.strategy, torch.initial_seed() % 2**63))
        return self.seed

    def make(
        self,
        policy: PreTrainedModel,
        batch: PromptBatch,
        plan: UpdatePlan | None,
        number: int = 0,
        num_samples: int | None = None,
        selects: bool = True,
    ) -> Rollout:
        """Sample, decode greedily and score: `y ~ pi(.|x)`, `y*`, `r = reward(x, y)`, `b = reward(x, y*)`.

        Args:
            policy: the model that responds.
            batch: the prompts.
            plan: of the updates on the rollout; None in an evaluation.
            number: of the batch, in an evaluation; training counts its rollouts.
            num_samples: responses per prompt, in an evaluation; None for those of training.
            selects: whether prompts without an advantage may make room for others, where `data.selection` asks for it.

        Raises:
            UserError: if the engine or the reward cannot be used; on every rank in a fit.
        """
        # An evaluation compares with y*, whatever the baseline is in training.
        always = plan is None or self.objective.baseline.greedy == "always"
        greedy = always or self.objective.needs_greedy_now(batch, self.trainer)
        stage, count = (EVALUATION, number) if plan is None else (TRAINING, self.count)
        # log pi_old(y_t) or log mu(y_t), where training reads the engine's
        log_probs = plan is not None and (plan.old_log_probs_from_rollout or plan.compares_engine)
        rank, device = self.trainer.global_rank, batch.prompt_ids.device
        generator = rollout_generator(cast(int, self.seed), rank, stage, count, device)
        # What fails on one rank ends all ranks, with its message. A block for each part, since ranks may wait for each
        # other in the next: for weights that are sent ahead, or for a reward model in shares.
        with raise_on_all_ranks(self.trainer):
            responses = self.worker.generate_responses(
                policy, batch, generator, greedy=greedy, return_log_probs=log_probs, num_samples=num_samples
            )  # y [S, R], y* [B, R]
        if plan is not None and self.worker.ahead:
            with raise_on_all_ranks(self.trainer):
                self._begin_next(policy, batch, plan)
        with raise_on_all_ranks(self.trainer):
            rollout = self.worker.score_responses(batch._replace(following=None), responses)  # r [S], b [B]
        if plan is not None:
            self.count += 1
            if plan.compares_engine:  # log mu(y_t) [S, R]
                rollout = engine_log_probs(rollout, self.worker.engine, self.objective.loss_config.mismatch.kind)
            if selects and self.selector is not None:
                rollout = self.selector.select(rollout, lambda more: self.make(policy, more, plan, selects=False))
        return rollout

    def free_gradients(self) -> None:
        """Free the gradients of the last step, which Lightning would keep during a rollout."""
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):  # frees them itself
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    def _begin_next(self, policy: PreTrainedModel, batch: PromptBatch, plan: UpdatePlan) -> None:
        """Let the engine write the responses of the next rollout while this one trains, unless the run ends before."""
        if batch.following is None or not has_next_rollout(self.trainer, plan):
            return
        rank, device = self.trainer.global_rank, batch.prompt_ids.device
        generator = rollout_generator(cast(int, self.seed), rank, TRAINING, self.count + 1, device)
        greedy = self.objective.baseline.greedy == "always"
        self.worker.begin_responses(policy, batch.following, generator, greedy=greedy)


class RolloutBuffer:
    """Holds the rollout that is trained on."""

    experience: Experience | None = None
    """The rollout; None between two."""

    def micro_batch(self, index: int) -> Experience:
        """Return micro-batch `index` of the rollout; the last one empties the buffer.

        Raises:
            UserError: if a loader starts in the middle of a rollout batch.
        """
        experience = self.experience
        if experience is None:
            raise UserError(f"data: part {index} of a rollout batch came first; a loader starts with part 0")
        num_micro_batches = experience.rollout.prompt.num_micro_batches
        # The rollout is done with its last part: a checkpoint between two rollouts holds none.
        if index + 1 == num_micro_batches:
            self.experience = None
        return experience if num_micro_batches == 1 else experience.micro_batch(index, num_micro_batches)

    def micro_batches_before(self, index: int, count: int) -> list[Experience]:
        """Return the `count` micro-batches before `index`."""
        if self.experience is None or not count:
            return []
        number = self.experience.rollout.prompt.num_micro_batches
        return [self.experience.micro_batch(each, number) for each in range(index - count, index)]

    # ---- Checkpoints ----

    def state_dict(self) -> dict[str, Any] | None:
        """Return the rollout as nested dictionaries of tensors, numbers and text, which `weights_only=True` reads.

        None where the buffer is empty. The rows of the data set and the messages of the prompts stay out: they may
        hold anything, and once a rollout is scored nothing reads them.
        """
        if self.experience is None:
            return None
        rollout = self.experience.rollout
        # `Prompt` is a subclass of str, which `weights_only=True` would refuse.
        prompt = rollout.prompt._replace(rows=[], prompts=[str(text) for text in rollout.prompt.prompts])
        state = self.experience._asdict()
        state["rollout"] = rollout._asdict() | {
            "prompt": prompt._asdict(),
            "sampled": rollout.sampled._asdict(),
            "greedy": None if rollout.greedy is None else rollout.greedy._asdict(),
        }
        return state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore the rollout of a checkpoint, also of version 0.1."""
        if state is None:
            self.experience = None
            return
        # A copy, since the checkpoint belongs to Lightning.
        rollout = dict(state["rollout"])
        rollout["prompt"] = PromptBatch(**_rename_old_keys(rollout["prompt"]))
        rollout["sampled"] = Responses(**rollout["sampled"])
        rollout["greedy"] = None if rollout["greedy"] is None else Responses(**rollout["greedy"])
        self.experience = Experience(**{**_rename_old_keys(state), "rollout": Rollout(**rollout)})


_OLD_NAMES = {"normalisers": "normalizers", "split": "micro_batch_index", "num_splits": "num_micro_batches"}
"""Names of version 0.1 and their new names."""


def _rename_old_keys(state: dict[str, Any]) -> dict[str, Any]:
    return {_OLD_NAMES.get(name, name): value for name, value in state.items()}
