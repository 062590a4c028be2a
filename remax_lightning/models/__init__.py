"""Loading of the policy and the reference."""

from remax_lightning.models.loading import PretrainedModel, freeze
from remax_lightning.models.lora import LoRAConfig, add_adapter, at_start, is_adapted

__all__ = ["LoRAConfig", "PretrainedModel", "add_adapter", "at_start", "freeze", "is_adapted"]
