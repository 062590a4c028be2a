"""Distributed training: how processes share the work, save it and fail together, and how a policy in parts is read."""

from remax_lightning.strategies.atomic_checkpoint import AtomicCheckpointIO, newest, settle, sweep
from remax_lightning.strategies.deepspeed import ReMaxDeepSpeedStrategy
from remax_lightning.strategies.fsdp2 import ReMaxFSDP2Strategy, shard_policy
from remax_lightning.strategies.gather import passes_meet, rollout_parameters, whole_parameters
from remax_lightning.strategies.model_init import loading_policy, outside_partitioning

__all__ = [
    "AtomicCheckpointIO",
    "ReMaxDeepSpeedStrategy",
    "ReMaxFSDP2Strategy",
    "loading_policy",
    "newest",
    "outside_partitioning",
    "passes_meet",
    "rollout_parameters",
    "settle",
    "shard_policy",
    "sweep",
    "whole_parameters",
]
