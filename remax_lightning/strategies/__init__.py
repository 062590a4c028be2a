"""Distributed training: how processes share the work, and how a policy that is spread over them is read whole."""

from remax_lightning.strategies.deepspeed import ReMaxDeepSpeedStrategy
from remax_lightning.strategies.fsdp2 import ReMaxFSDP2Strategy, shard_policy
from remax_lightning.strategies.gather import passes_meet, rollout_parameters, whole_parameters
from remax_lightning.strategies.placement import loading_policy, outside_partitioning

__all__ = [
    "ReMaxDeepSpeedStrategy",
    "ReMaxFSDP2Strategy",
    "loading_policy",
    "outside_partitioning",
    "passes_meet",
    "rollout_parameters",
    "shard_policy",
    "whole_parameters",
]
