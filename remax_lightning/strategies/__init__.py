"""Strategies for distributed training: sharding, gathering for rollouts, atomic checkpoints."""

from remax_lightning.strategies.atomic_checkpoint import (
    AtomicCheckpointIO,
    check_address,
    latest_checkpoint,
    recover_interrupted,
    remove_stale,
)
from remax_lightning.strategies.checks import (
    check_model,
    check_optimizers,
    global_grad_norm,
    guard_loading,
    keep_finite_checkpoints,
    nonfinite_in_model,
    nonfinite_state,
)
from remax_lightning.strategies.deepspeed import ReMaxDeepSpeedStrategy, StepGradients, strategy_of_name
from remax_lightning.strategies.fsdp2 import (
    PARAMETER_NAMES,
    ReMaxFSDP2Strategy,
    optimizer_parameter_names,
    shard_policy,
)
from remax_lightning.strategies.gather import (
    forward_is_collective,
    full_parameters,
    full_values,
    rollout_parameters,
    sharded_init,
    unsharded_init,
)

__all__ = [
    "PARAMETER_NAMES",
    "AtomicCheckpointIO",
    "ReMaxDeepSpeedStrategy",
    "ReMaxFSDP2Strategy",
    "StepGradients",
    "check_address",
    "check_model",
    "check_optimizers",
    "forward_is_collective",
    "full_parameters",
    "full_values",
    "global_grad_norm",
    "guard_loading",
    "keep_finite_checkpoints",
    "latest_checkpoint",
    "nonfinite_in_model",
    "nonfinite_state",
    "optimizer_parameter_names",
    "recover_interrupted",
    "remove_stale",
    "rollout_parameters",
    "shard_policy",
    "sharded_init",
    "strategy_of_name",
    "unsharded_init",
]
