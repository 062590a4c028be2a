"""How a rollout is trained on, as the configuration decides it."""

from __future__ import annotations

from typing import Any

import pytest

from remax_lightning.config import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.errors import UserError
from remax_lightning.training.objective import Objective
from remax_lightning.training.rollouts import UpdatePlan, plan_update

CLIPPED, FROM_ROLLOUT = LossConfig("clipped"), LossConfig("clipped", old_log_probs="rollout")


def plan(
    num_micro_batches: int, accumulate: int, *, whiten: bool = False, loss: Any = None, reference: bool = True
) -> UpdatePlan:
    objective = Objective(KLConfig(), AdvantageConfig(whiten=whiten), loss or LossConfig(), 1)
    return plan_update(objective, num_micro_batches, accumulate, kl_coef=0.05, has_reference=reference)


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((1, 1), {}, UpdatePlan(1, 1, True, False, False)),
        ((4, 4), {}, UpdatePlan(4, 1, True, False, False)),  # one update: the training pass is on-policy
        ((4, 4), {"whiten": True}, UpdatePlan(4, 1, True, True, False)),  # whitening needs the KL of all micro-batches
        ((4, 4), {"whiten": True, "reference": False}, UpdatePlan(4, 1, False, False, False)),
        ((4, 1), {"loss": CLIPPED}, UpdatePlan(4, 4, True, True, False)),  # a ratio to the policy of the first update
        ((4, 2), {"loss": FROM_ROLLOUT}, UpdatePlan(4, 2, True, True, True)),
        ((2, 2), {"loss": FROM_ROLLOUT}, UpdatePlan(2, 1, True, False, False)),
    ],
)
def test_the_plan_follows_from_the_configuration(arguments: Any, options: Any, expected: UpdatePlan) -> None:
    made = plan(*arguments, **options)
    assert made == expected
    assert made.runs_policy_before_training == (expected.needs_old_log_probs and options.get("loss") != FROM_ROLLOUT)


def test_an_update_within_two_rollouts_is_refused() -> None:
    with pytest.raises(UserError, match="accumulate_grad_batches is 3"):
        plan(4, 3)
