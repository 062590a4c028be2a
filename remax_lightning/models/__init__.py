"""Loading the policy and the reference."""

from remax_lightning.models.loading import ModelConfig, freeze
from remax_lightning.models.lora import LoRAConfig, add_adapter, has_adapter, initial_adapter

__all__ = ["LoRAConfig", "ModelConfig", "add_adapter", "freeze", "has_adapter", "initial_adapter"]
