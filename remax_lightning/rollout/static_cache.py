"""A key-value cache with a slot for every token of prompt and response: a decoding step writes one and copies none.

Slots make the step's shape fixed, too: the model attends to all slots of a length, and the mask leaves out those that
are still empty. So many tokens share one shape, as CUDA graphs need it (`cuda_graph.py`).
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
"""Attended lengths are multiples of this, and of a sixteenth of the next power of two: few shapes, little wasted."""


def bucketed_length(filled: int) -> int:
    """Return the number of slots that a step attends to, at least `filled`, rounded up to a bucket."""
    step = _spacing(filled)
    return -(-filled // step) * step


def _spacing(length: int) -> int:
    return max(MIN_BUCKET, 1 << max(0, (length - 1).bit_length() - 4))


Layout: TypeAlias = tuple[int | None, ...]
"""What of a cache is no tensor: for each layer its sliding window, in tokens, or None."""


def layout_of(cache: DynamicCache) -> Layout | None:
    """Return the layout of a prefilled cache, or None if it has layers that slots cannot stand for."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers: list[Any] = cache.layers
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    if not all(type(layer) in known and layer.is_initialized for layer in layers):
        return None
    return tuple(getattr(layer, "sliding_window", None) for layer in layers)


def make_slots(cache: DynamicCache, num_rows: int, length: int) -> list[Tensor]:
    """Return `[N, H, length, D]` keys, then values of each layer; zeros, since masked slots are multiplied too."""
    return [
        states.new_zeros(num_rows, states.shape[1], length, states.shape[3], dtype=slot_dtype(states))
        for states in states_of(cache)
    ]


def slot_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype of slots for such keys or values of a prefilled cache.

    In mixed precision those are float32, as rotary keys are, and the attention makes 16 bits of them at each token: so
    they are kept in 16 bits.
    """
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def states_of(cache: DynamicCache) -> list[Tensor]:
    """Return `[B, H, P, D]` keys, then values of each layer of a prefilled cache."""
    layers: list[Any] = cache.layers
    return [states for layer in layers for states in (layer.keys, layer.values)]


def fill_slots(slots: list[Tensor], cache: DynamicCache, rows: Tensor, prompt_length: int) -> None:
    """Write the prompts' keys and values into the slots of the rows that continue them.

    Args:
        slots: as `make_slots` makes them; may have more rows.
        cache: holds the `B` prompts. A sliding window holds the last tokens of them only.
        rows: `[N]` which prompt each row continues.
        prompt_length: `P`.
    """
    for slot, prompt in zip(slots, states_of(cache), strict=True):
        slot[: len(rows), :, prompt_length - prompt.shape[2] : prompt_length] = prompt.index_select(0, rows)


def keep_rows(slots: list[Tensor], rows: Tensor, length: int) -> None:
    """Move the given rows' first `length` slots to the front."""
    for slot in slots:
        slot[: len(rows), :, :length] = slot[:, :, :length].index_select(0, rows)


def cache_of_slots(layout: Layout, slots: Sequence[Tensor], position: Tensor, length: int) -> DynamicCache:
    """Return a cache that writes a token's keys and values at `position` and attends to `length` slots.

    Args:
        layout: of the cache that the slots were filled from.
        slots: `[M, H, S, D]` keys, then values of each layer.
        position: `[1]` the slot to be written, one of the last `bucketed_length` admits for `length`.
        length: of the slots that are attended to.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    layers: list[Any] = cache.layers
    for index, window in enumerate(layout):
        # Behind a window, even the first position that this length serves sees nothing.
        first = 0 if window is None else max(0, length - _spacing(length) - window + 1)
        layer = _slot_layer()(slots[2 * index], slots[2 * index + 1], position, range(first, length))
        layer.is_sliding = window is not None
        layers.append(layer)
    cache.layer_class_to_replicate = None  # all layers are there
    return cache


@lru_cache(maxsize=1)
def _slot_layer() -> Any:
    """Return the class of our layers; a function, so that importing this file stays light."""
    from transformers.cache_utils import DynamicLayer

    plain: Any = DynamicLayer

    class SlotLayer(plain):  # type: ignore[misc]
        """Keys and values in slots."""

        # Keeps transformers from reading the mask's values to do without it.
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

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 (transformers hands it over)
            return len(self.attended), self.attended.start

    return SlotLayer
