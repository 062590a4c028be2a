"""ReMax, REINFORCE with a greedy baseline, as a modular experiment framework on PyTorch Lightning.

Names are imported when they are first used, so that `import remax_lightning` stays light.
"""

from importlib import import_module
from typing import Any

from remax_lightning.version import __version__

_PUBLIC = {
    "callbacks": (
        "BaselineMonitor",
        "CollapseDetector",
        "Evaluation",
        "ExportPolicy",
        "KLMonitor",
        "LMEval",
        "PredictionWriter",
        "RunProgress",
        "SampleDump",
        "TensorBoardReport",
        "Throughput",
        "default_callbacks",
    ),
    "data": ("PreferenceDataModule", "PromptDataModule", "ReasoningGymDataModule", "SFTDataModule"),
    "loggers": ("TrackioLogger",),
    "errors": ("DataError", "RewardError", "UserError"),
    "models": ("ModelConfig",),
    "modules": (
        "AdvantageConfig",
        "KLConfig",
        "LossConfig",
        "MismatchConfig",
        "ReMaxModule",
        "RewardModelModule",
        "SFTModule",
        "WarmupCosine",
        "WarmupLinear",
    ),
    "rewards": (
        "ClassifierReward",
        "FunctionReward",
        "HTTPReward",
        "JudgeReward",
        "Reward",
        "Scores",
        "TimedReward",
        "WeightedReward",
    ),
    "rollout": (
        "AutoEngine",
        "GenerationOutput",
        "GenerationRequest",
        "HuggingFaceEngine",
        "PairedEngine",
        "RolloutEngine",
        "SamplingConfig",
        "VLLMEngine",
    ),
    "types": ("PreferenceBatch", "PromptBatch", "Response", "Responses", "Rollout", "StepOutput", "SupervisedBatch"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"remax_lightning.{_HOME[name]}"), name)
    raise AttributeError(f"module 'remax_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
