"""Choosing the rollout engine for a model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remax_lightning.rollout.engine import Generated, RolloutEngine, SamplingConfig
from remax_lightning.rollout.forward import takes
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
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        log.info("rollout engine: HuggingFaceEngine, since %s keeps a recurrent state", name)
        return HuggingFaceEngine()
    if not takes(model, "past_key_values"):
        log.info("rollout engine: HuggingFaceEngine, since %s takes no key-value cache", name)
        return HuggingFaceEngine()
    log.info("rollout engine: PairedEngine, since %s takes a key-value cache", name)
    return PairedEngine()
