"""Choosing the rollout engine for a model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from remax_lightning.models.forward import accepts_argument, language_model, model_inputs
from remax_lightning.rollout.base import GenerationOutput, GenerationRequest, RolloutEngine
from remax_lightning.rollout.huggingface import HuggingFaceEngine
from remax_lightning.rollout.paired import PairedEngine
from remax_lightning.rollout.static_cache import bucketed_length, cache_of_slots, fill_slots, layout_of, make_slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class AutoEngine:
    """`PairedEngine` if it supports the model, `HuggingFaceEngine` otherwise; the log says which and why."""

    def __init__(self) -> None:
        self._engine: RolloutEngine | None = None

    def generate(self, model: PreTrainedModel, request: GenerationRequest) -> GenerationOutput:
        """Generate responses with the engine that fits `model`; see `RolloutEngine`."""
        model = language_model(model)
        if self._engine is None:
            self._engine = choose_engine(model)
        return self._engine.generate(model, request)


def clone_engine(engine: RolloutEngine) -> RolloutEngine:
    """Return an engine of the same kind for another model, because ours keep CUDA graphs of the last one.

    An engine of the user's own is returned as it is.
    """
    if type(engine) is AutoEngine:
        return AutoEngine()
    if type(engine) is PairedEngine:
        return PairedEngine(cuda_graphs=engine.cuda_graphs, keep_cache=engine.keep_cache)
    return engine


def choose_engine(model: PreTrainedModel) -> RolloutEngine:
    """Return the fastest engine that supports `model`."""
    unsupported = why_unsupported(model)
    engine = HuggingFaceEngine() if unsupported else PairedEngine()
    reason = unsupported or "takes a key-value cache"
    log.info("rollout engine: %s, since %s %s", type(engine).__name__, type(model).__name__, reason)
    return engine


def why_unsupported(model: PreTrainedModel) -> str:
    """Return why `PairedEngine` cannot decode with `model`, or an empty string; runs the model on a few tokens."""
    if getattr(model, "_is_stateful", False):
        return "keeps a recurrent state"
    if not accepts_argument(model, "past_key_values"):
        return "takes no key-value cache"
    try:
        return _probe(model)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"cannot be tried ({type(error).__name__}: {error})"


@torch.no_grad()
def _probe(model: PreTrainedModel) -> str:
    """Decode one token with and without left padding, and compare its logits with those of a plain forward pass."""
    from transformers import DynamicCache

    # Two prompts of random tokens, one of them with left padding.
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab_size, (2, 6), generator=generator).to(model.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3] = False
    cache, last = DynamicCache(config=model.config), ids.shape[1] - 1
    model(**model_inputs(model, ids[:, :-1], mask[:, :-1]), past_key_values=cache, use_cache=True)
    layout = layout_of(cache)
    if layout is None:
        # For example a convolutional or recurrent state, whose rows cannot be selected like those of keys and values.
        return "keeps more than keys and values in its cache"
    # The expected logits, by one pass over all tokens.
    inputs = model_inputs(model, ids, mask)
    full_cache = DynamicCache(config=model.config)
    expected = model(**inputs, past_key_values=full_cache, use_cache=True).logits[:, -1]  # [2, V]
    # The last token decoded on a static cache.
    length = bucketed_length(ids.shape[1])
    slots = make_slots(cache, 2, length)
    fill_slots(slots, cache, torch.arange(2, device=ids.device), last)
    step = {name: values[:, -1:] for name, values in inputs.items()}
    step["attention_mask"] = torch.nn.functional.pad(mask.long(), (0, length - ids.shape[1]))
    static_cache = cache_of_slots(layout, slots, torch.tensor([last], device=ids.device), length)
    decoded = model(**step, past_key_values=static_cache, use_cache=True).logits[:, -1]  # [2, V]
    # The tolerance allows for rounding; a wrong mask or position is far outside it.
    tolerance = 1e-3 if expected.dtype == torch.float32 else 0.1
    close = (decoded.double() - expected.double()).norm() <= tolerance * expected.double().norm()
    return "" if close else "gives other logits when it decodes in slots"
