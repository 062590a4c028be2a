"""Rollout engines: they sample and decode greedily with the policy's own weights."""

from remax_lightning.config import ProofConfig, SamplingConfig
from remax_lightning.rollout.base import GenerationOutput, GenerationRequest, RolloutEngine, StopCheck
from remax_lightning.rollout.engines import AutoEngine, HuggingFaceEngine, PairedEngine, clone_engine
from remax_lightning.rollout.vllm import VLLMEngine

__all__ = [
    "AutoEngine",
    "GenerationOutput",
    "GenerationRequest",
    "HuggingFaceEngine",
    "PairedEngine",
    "ProofConfig",
    "RolloutEngine",
    "SamplingConfig",
    "StopCheck",
    "VLLMEngine",
    "clone_engine",
]
