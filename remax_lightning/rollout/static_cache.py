"""A static key-value cache with one slot per token: a decoding step writes one slot and copies none.

The model attends to a bucketed number of slots, and the mask excludes those that are still empty. So many tokens share
one shape, which CUDA graphs require (`cuda_graph.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from remax_lightning.rollout.decode_attention import Layout, RolloutSize, StepInputs, slot_dtype, states_of

if TYPE_CHECKING:
    from transformers import DynamicCache

MIN_BUCKET = 16
"""Bucketed lengths are multiples of this, and of 1/16 of the next power of two: few shapes, at most 1/8 wasted."""


def bucketed_length(filled: int) -> int:
    """Return the number of slots that a step attends to, at least `filled`, rounded up to a bucket."""
    size = _bucket_size(filled)
    return -(-filled // size) * size


def _bucket_size(length: int) -> int:
    # A sixteenth of the next power of two, so eight lengths between two powers.
    return max(MIN_BUCKET, 1 << max(0, (length - 1).bit_length() - 4))


class DecodeBuffers(NamedTuple):
    """What a decoding step reads and writes; `C` is the number of cache slots.

    Args:
        tokens: `[N, 1]` the tokens to feed.
        positions: `[N, 1]` their positions.
        mask: `[N, C]` 1 on the slots of real tokens, 0 on padding and on slots that are still empty.
        slot: `[1]` the slot to write next.
        states: `[N, H, C, D]` keys, then values of each layer.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    slot: Tensor
    states: list[Tensor]

    @classmethod
    def create(cls, cache: DynamicCache, num_rows: int, length: int) -> DecodeBuffers:
        """Allocate buffers for `num_rows` rows and `length` slots of a model with such a prefilled cache."""
        states = [
            # Zeros, as attention multiplies masked slots too.
            states.new_zeros(num_rows, states.shape[1], length, states.shape[3], dtype=slot_dtype(states))
            for states in states_of(cache)
        ]  # [N, H, C, D] each
        zeros = partial(torch.zeros, dtype=torch.long, device=states[0].device)
        return cls(zeros(num_rows, 1), zeros(num_rows, 1), zeros(num_rows, length), zeros(1), states)

    def fits(self, cache: DynamicCache, size: RolloutSize) -> bool:
        """Return whether a rollout of this size and model can use these buffers."""
        (rows, slots), length = self.mask.shape, bucketed_length(size.length)
        kinds = [(states.shape[1], states.shape[3], states.dtype, states.device) for states in self.states]
        wanted = [(states.shape[1], states.shape[3], slot_dtype(states), states.device) for states in states_of(cache)]
        return rows >= size.num_rows and slots >= length and kinds == wanted

    def fill(self, cache: DynamicCache, prompt_mask: Tensor, rows: Tensor) -> None:
        """Copy the prompts' keys and values into the slots of the rows that continue them; reset mask and positions.

        Args:
            cache: the prefilled cache of the `B` prompts. Layers with a sliding window hold the last tokens only.
            prompt_mask: `[B, P]` bool, True on real tokens.
            rows: `[N]` index of the prompt that each row continues; there may be more rows in the buffers.
        """
        num_rows, length = len(rows), prompt_mask.shape[1]
        for slots, states in zip(self.states, states_of(cache), strict=True):
            # Prompts are padded on the left, so the last token of each is in slot P - 1. A window's states are the last
            # ones.
            slots[:num_rows, :, length - states.shape[2] : length] = states.index_select(0, rows)
        mask = prompt_mask[rows].long()  # [N, P]
        # Slots of the response are empty.
        self.mask[:num_rows] = torch.nn.functional.pad(mask, (0, self.mask.shape[1] - length))
        # Of the last prompt token: a step begins one further.
        self.positions[:num_rows, 0] = mask.sum(-1) - 1

    def keep_rows(self, rows: Tensor, filled: int) -> None:
        """Move `rows`, with their first `filled` slots, to the front."""
        for slots in self.states:
            # `index_select` copies first, so a row may move over one that moves as well.
            slots[: len(rows), :, :filled] = slots[:, :, :filled].index_select(0, rows)
        for buffer in (self.positions, self.mask):
            buffer[: len(rows)] = buffer[rows]

    def view(self, num_rows: int, length: int) -> DecodeBuffers:
        """Return views, in the same memory, for a step of the first `num_rows` rows that attends to `length` slots."""
        states = [slots[:num_rows] for slots in self.states]  # all slots: the cache picks those to attend to
        return DecodeBuffers(
            self.tokens[:num_rows], self.positions[:num_rows], self.mask[:num_rows, :length], self.slot, states
        )

    def begin_step(self, num_rows: int, slot: int, layout: Layout, last: StepInputs | None) -> StepInputs:
        """See `RolloutStates`. Rows, slots attended to and slots allocated, the strides, decide the kernels."""
        self.mask[:num_rows, slot] = 1
        self.positions[:num_rows].add_(1)
        self.slot.fill_(slot)
        length = bucketed_length(slot + 1)
        key = num_rows, length, self.mask.shape[1]
        if last is not None and last.key == key:
            return last
        view = self.view(num_rows, length)
        cache = cache_of_slots(layout, view.states, view.slot, length)
        return StepInputs(key, (view.tokens, view.positions, view.mask), cache)


def allocate_slots(cache: DynamicCache, size: RolloutSize) -> DecodeBuffers:
    """Return masked slots for a rollout of this size, of any model whose cache has a layout."""
    return DecodeBuffers.create(cache, size.num_rows, bucketed_length(size.length))


def cache_of_slots(layout: Layout, slots: Sequence[Tensor], position: Tensor, length: int) -> DynamicCache:
    """Return a cache that writes a token's keys and values at `position` and attends to `length` slots.

    Args:
        layout: layout of the cache that the slots were filled from.
        slots: `[M, H, C, D]` keys, then values of each layer.
        position: `[1]` the slot to write; `bucketed_length(position + 1)` is `length`.
        length: number of slots to attend to.
    """
    from transformers import DynamicCache

    # Without a configuration it has no layers, so ours are the only ones.
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
            # A tensor, since a captured graph would freeze a number.
            return self.position

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 (part of the interface)
            return len(self.attended), self.attended.start  # keys, and the slot of the first

    return SlotLayer
