"""Loading of the policy and the reference."""

from remax_lightning.models.pretrained import PretrainedModel, freeze

__all__ = ["PretrainedModel", "freeze"]
