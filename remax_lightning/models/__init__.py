"""Loading of the policy and the reference."""

from remax_lightning.models.loading import ModelConfig, freeze
from remax_lightning.models.lora import LoRAConfig, add_adapter, at_start, is_adapted

__all__ = ["LoRAConfig", "ModelConfig", "add_adapter", "at_start", "freeze", "is_adapted"]
