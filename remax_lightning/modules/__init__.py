"""The LightningModules, one per stage, and their options."""

from remax_lightning.config import AdvantageConfig, KLConfig, LossConfig, MismatchConfig
from remax_lightning.modules.remax import ReMaxModule
from remax_lightning.modules.reward_model import RewardModelModule
from remax_lightning.modules.sft import SFTModule
from remax_lightning.training.optimization import WarmupCosine, WarmupLinear

__all__ = [
    "AdvantageConfig",
    "KLConfig",
    "LossConfig",
    "MismatchConfig",
    "ReMaxModule",
    "RewardModelModule",
    "SFTModule",
    "WarmupCosine",
    "WarmupLinear",
]
