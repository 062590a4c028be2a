"""The plan of the updates on a rollout: it follows from the configuration, and is made once when a fit starts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from remax_lightning.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from remax_lightning.training.objective import Objective


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
    objective: Objective, trainer: Trainer, source: Any, *, kl_coef: float, has_reference: bool
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
