"""A key-value cache with room for the whole response, so that a decoding step writes one slot and copies nothing."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache


def repeat_into_slots(cache: DynamicCache, rows: Tensor, room: int) -> None:
    """Repeat the prompts' keys and values to the rows that are decoded, each layer with `room` more slots.

    transformers' `DynamicCache` concatenates all keys and values anew at every token, which costs about as much as the
    attention over them. Layers that do more than that (sliding windows, recurrent states) keep their own class.

    Args:
        cache: holds the `B` prompts; becomes a cache of `N` rows.
        rows: `[N]` which prompt each row continues.
        room: tokens that will be added.
    """
    slot_layer, plain_layer = _layer_classes()
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if type(layer) is plain_layer and layer.is_initialized:
            layers[index] = slot_layer(layer.keys, layer.values, rows, room)
        else:
            layer.batch_select_indices(rows)


@lru_cache(maxsize=1)
def _layer_classes() -> tuple[Any, Any]:
    """Return our layer and the one of transformers it replaces; a function, so that importing this stays light."""
    from transformers.cache_utils import DynamicLayer

    plain: Any = DynamicLayer

    class SlotLayer(plain):  # type: ignore[misc]
        """Keys and values `[N, H, P + R, D]`, allocated once; `keys` and `values` are views of what is filled."""

        def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, room: int) -> None:
            super().__init__()
            self.lazy_initialization(keys, values)
            self.filled = keys.shape[-2]
            self.key_slots, self.value_slots = _with_room(keys, rows, room), _with_room(values, rows, room)
            self._view()

        def _view(self) -> None:
            self.keys = self.key_slots[:, :, : self.filled]
            self.values = self.value_slots[:, :, : self.filled]

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            start, self.filled = self.filled, self.filled + key_states.shape[-2]
            self.key_slots[:, :, start : self.filled] = key_states
            self.value_slots[:, :, start : self.filled] = value_states
            self._view()
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            self.key_slots, self.value_slots = self.key_slots[indices], self.value_slots[indices]
            self._view()

    return SlotLayer, plain


def _with_room(states: Tensor, rows: Tensor, room: int) -> Tensor:
    """Return `[N, H, P + room, D]` states whose first `P` places hold those of each row's prompt."""
    _, heads, length, size = states.shape
    slots = states.new_empty(len(rows), heads, length + room, size)
    slots[:, :, :length] = torch.index_select(states, 0, rows)
    return slots
