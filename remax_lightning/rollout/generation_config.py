"""The settings in a model's `generation_config` that sampling ignores: `SamplingConfig` alone decides."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from remax_lightning.config import SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
}
"""Settings of transformers that change the sampled distribution, and the value with which they do not."""
IMPLICIT_TOP_K = 50
"""The top-k that transformers 5 uses if sampling is on and none is set."""


def ignored_settings(model: PreTrainedModel, sampling: SamplingConfig) -> dict[str, Any]:
    """Return the settings with which `model.generate` would sample from another distribution than `sampling` says."""
    config: Any = model.generation_config
    if config is None:
        return {}
    settings = {name: getattr(config, name, None) for name in NEUTRAL}
    if settings["top_k"] is None:
        settings["top_k"] = IMPLICIT_TOP_K
    wanted = {name: getattr(sampling, name, neutral) for name, neutral in NEUTRAL.items()}
    return {name: value for name, value in settings.items() if value is not None and value != wanted[name]}


def log_ignored_settings(model: PreTrainedModel, sampling: SamplingConfig) -> None:
    """Log the settings of the model that sampling ignores."""
    ignored = ignored_settings(model, sampling)
    if ignored:
        log.info(
            "responses are sampled as model.sampling says; model.generate would also have taken %s",
            ", ".join(f"{name} {value}" for name, value in ignored.items()),
        )
