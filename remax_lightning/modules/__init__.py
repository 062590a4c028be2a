"""The LightningModules, one per stage, and the choices they take."""

from remax_lightning.modules.options import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.modules.remax import ReMaxModule
from remax_lightning.modules.reward_model import RewardModelModule
from remax_lightning.modules.schedules import WarmupCosine, WarmupLinear
from remax_lightning.modules.sft import SFTModule

__all__ = [
    "AdvantageConfig",
    "KLConfig",
    "LossConfig",
    "ReMaxModule",
    "RewardModelModule",
    "SFTModule",
    "WarmupCosine",
    "WarmupLinear",
]
