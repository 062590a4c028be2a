"""A static key-value cache with one slot per token: a decoding step writes one slot and copies none.

The model attends to a bucketed number of slots, and the mask excludes those that are still empty. So many tokens share
one shape, which CUDA graphs require (`cuda_graph.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache

MIN_BUCKET = 16
"""Bucketed lengths are multiples of this, and of 1/16 of the next power of two: few shapes, at most 1/8 wasted."""


def bucketed_length(filled: int) -> int:
    """Return the number of slots that a step attends to, at least `filled`, rounded up to a bucket."""
    size = _bucket_size(filled)
    return -(-filled // size) * size


def _bucket_size(length: int) -> int:
    return max(MIN_BUCKET, 1 << max(0, (length - 1).bit_length() - 4))


Layout: TypeAlias = tuple[int | None, ...]
"""The part of a cache that is not tensors: the sliding window of each layer in tokens, or None."""


def layout_of(cache: DynamicCache) -> Layout | None:
    """Return the layout of a prefilled cache, or None if it has layers with other states than keys and values."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers: list[Any] = cache.layers
    supported = (DynamicLayer, DynamicSlidingWindowLayer)
    if not all(type(layer) in supported and layer.is_initialized for layer in layers):
        return None
    return tuple(getattr(layer, "sliding_window", None) for layer in layers)


def make_slots(cache: DynamicCache, num_rows: int, length: int) -> list[Tensor]:
    """Return `[N, H, length, D]` keys, then values of each layer; zeros, as attention multiplies masked slots too."""
    return [
        states.new_zeros(num_rows, states.shape[1], length, states.shape[3], dtype=slot_dtype(states))
        for states in states_of(cache)
    ]


def slot_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype of slots for such keys or values of a prefilled cache.

    In mixed precision some are float32, as rotary keys are, and attention would cast them at every token; so slots are
    stored in 16 bits.
    """
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def states_of(cache: DynamicCache) -> list[Tensor]:
    """Return `[B, H, P, D]` keys, then values of each layer of a prefilled cache."""
    layers: list[Any] = cache.layers
    return [states for layer in layers for states in (layer.keys, layer.values)]


def fill_slots(slots: list[Tensor], cache: DynamicCache, rows: Tensor, prompt_length: int) -> None:
    """Copy the prompts' keys and values into the slots of the rows that continue them.

    Args:
        slots: from `make_slots`; may have more rows.
        cache: the prefilled cache of the `B` prompts. Layers with a sliding window hold the last tokens only.
        rows: `[N]` index of the prompt that each row continues.
        prompt_length: `P`.
    """
    for slot, prompt in zip(slots, states_of(cache), strict=True):
        slot[: len(rows), :, prompt_length - prompt.shape[2] : prompt_length] = prompt.index_select(0, rows)


def keep_rows(slots: list[Tensor], rows: Tensor, length: int) -> None:
    """Move `rows`, with their first `length` slots, to the front."""
    for slot in slots:
        slot[: len(rows), :, :length] = slot[:, :, :length].index_select(0, rows)


def cache_of_slots(layout: Layout, slots: Sequence[Tensor], position: Tensor, length: int) -> DynamicCache:
    """Return a cache that writes a token's keys and values at `position` and attends to `length` slots.

    Args:
        layout: layout of the cache that the slots were filled from.
        slots: `[M, H, C, D]` keys, then values of each layer.
        position: `[1]` the slot to write; `bucketed_length(position + 1)` is `length`.
        length: number of slots to attend to.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    layers: list[Any] = cache.layers
    for index, window in enumerate(layout):
        # Slots before this one are outside the window for every position in this bucket.
        first = 0 if window is None else max(0, length - _bucket_size(length) - window + 1)
        layer = _slot_layer()(slots[2 * index], slots[2 * index + 1], position, range(first, length))
        layer.is_sliding = window is not None
        layers.append(layer)
    cache.layer_class_to_replicate = None  # no layers are added lazily
    return cache


@lru_cache(maxsize=1)
def _slot_layer() -> Any:
    """Return the layer class, defined here so that importing this file does not import transformers."""
    from transformers.cache_utils import DynamicLayer

    base: Any = DynamicLayer

    class SlotLayer(base):  # type: ignore[misc]
        """The keys and values of one layer in slots."""

        # Stops transformers from reading the mask on the host to see whether it can be left out.
        is_compileable = True

        def __init__(self, keys: Tensor, values: Tensor, position: Tensor, attended: range) -> None:
            super().__init__()
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.keys, self.values, self.position, self.attended = keys, values, position, attended

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.keys.index_copy_(2, self.position, key_states.to(self.keys.dtype))
            self.values.index_copy_(2, self.position, value_states.to(self.values.dtype))
            attended = slice(self.attended.start, self.attended.stop)
            return self.keys[:, :, attended], self.values[:, :, attended]

        def get_seq_length(self) -> Any:
            return self.position

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 (part of the interface)
            return len(self.attended), self.attended.start

    return SlotLayer
