"""Choosing the rollout engine for a model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remax_lightning.rollout.engine import Generated, RolloutEngine, SamplingConfig
from remax_lightning.rollout.forward import language_model, takes
from remax_lightning.rollout.huggingface import HuggingFaceEngine
from remax_lightning.rollout.paired import PairedEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class AutoEngine:
    """`PairedEngine` where the model can hold it, `HuggingFaceEngine` otherwise; the log says which and why."""

    def __init__(self) -> None:
        self._engine: RolloutEngine | None = None

    def generate(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        sampling: SamplingConfig,
        eos_ids: list[int],
        pad_id: int,
        generator: torch.Generator,
        greedy: bool = True,
    ) -> Generated:
        """Write responses with the engine that fits `model`; see `RolloutEngine`."""
        model = language_model(model)
        if self._engine is None:
            self._engine = choose_engine(model)
        return self._engine.generate(
            model,
            prompt_ids,
            prompt_mask,
            sampling=sampling,
            eos_ids=eos_ids,
            pad_id=pad_id,
            generator=generator,
            greedy=greedy,
        )


def choose_engine(model: PreTrainedModel) -> RolloutEngine:
    """Return the fastest engine that is right for `model`."""
    against = obstacle(model)
    engine = HuggingFaceEngine() if against else PairedEngine()
    reason = against or "takes a key-value cache"
    log.info("rollout engine: %s, since %s %s", type(engine).__name__, type(model).__name__, reason)
    return engine


def obstacle(model: PreTrainedModel) -> str:
    """Return what keeps `PairedEngine` from decoding with `model`, or nothing."""
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    if getattr(model, "_is_stateful", False):
        return "keeps a recurrent state"
    if not takes(model, "past_key_values"):
        return "takes no key-value cache"
    # Such layers keep a state of convolution or recurrence, whose rows cannot be selected as those of keys and values.
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=model.config).layers):
        return "keeps more than keys and values in its cache"
    return ""
