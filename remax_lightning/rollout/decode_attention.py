"""Attention of decoding steps without masks: a step reads what its rows have written, and nothing else.

transformers takes an attention function by name; ours asks the states of the rollout, which are one of two kinds:

- `SharedPrefix` (`shared_prefix.py`), on a CPU in float32: the rows of a prompt share its keys and values. A step reads
  a prompt once, for the queries of all its rows in one product, and then each row's own tokens.
- `RowLengths` (`row_lengths.py`), on CUDA in 16 bits: torch's flash attention is told each row's length. There is no
  mask, one CUDA graph for a number of rows, and whole pages of a prompt are shared by its rows.

What neither can do decodes in masked slots (`static_cache.py`), and the log says why.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from remax_lightning.models.packing import CHANGES_LOGITS, NotPackableError

if TYPE_CHECKING:
    from transformers import DynamicCache

log = logging.getLogger(__name__)

NAME = "remax_decoding"
"""What transformers knows the attention function by. It makes no mask for a name that has no mask function."""


# ---- Keys and values of a rollout ----


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


class RolloutSize(NamedTuple):
    """What the memory of a rollout depends on.

    Args:
        num_prompts: `B`.
        num_rows: `N`, all responses.
        prompt_length: `P`, tokens of the longest prompt.
        response_length: `R`, the most tokens of a response.
    """

    num_prompts: int
    num_rows: int
    prompt_length: int
    response_length: int

    @property
    def length(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return self.prompt_length + self.response_length


class StepInputs(NamedTuple):
    """What a decoding step runs on; the same object as long as its key is the same.

    Args:
        key: what the inputs depend on, and on CUDA the kernels of the step.
        tensors: tokens to feed, their positions and the mask, in memory that stays.
        cache: what the model writes into.
    """

    key: Hashable
    tensors: tuple[Tensor, Tensor, Tensor]
    cache: DynamicCache


class RolloutStates(Protocol):
    """The keys and values of a rollout, as the decoding loop uses them."""

    @property
    def states(self) -> list[Tensor]:
        """The tensors that hold them."""

    def fill(self, cache: DynamicCache, prompt_mask: Tensor, rows: Tensor) -> None:
        """Begin with the prompts: their cache, `[B, P]` mask, and `[N]` the prompt of each row."""

    def keep_rows(self, rows: Tensor, filled: int) -> None:
        """Move `rows`, with the tokens in their first `filled` slots, to the front."""

    def begin_step(self, num_rows: int, slot: int, layout: Layout, last: StepInputs | None) -> StepInputs:
        """Go one token further in the first `num_rows` rows, and return what the step runs on.

        Args:
            num_rows: rows that are left.
            slot: the place of the token that is fed, if all prompts had the length of the longest.
            layout: of the prefilled cache.
            last: inputs of the step before, which are taken again where their key is that of this step.
        """


class AttentionStates(Protocol):
    """Keys and values that know how a step attends to them; a layer is its number, from 0."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write `[M, H', 1, d]` keys and values of the tokens that are fed."""

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """Return `[M, H, d]` what the queries of `M` rows, `[M, H, d]`, read."""


# ---- The attention function, and the cache in front of it ----


@dataclass
class DecodeAttention:
    """What the attention layers of a model decode on.

    Args:
        states: what they read and write.
        layer: the one that has written its token and has not attended yet; None between two layers.
        calls: how many layers have attended.
    """

    states: AttentionStates
    layer: int | None = None
    calls: int = 0


class _Steps(threading.local):
    """The steps that run now, the innermost last; another thread may decode with another model."""

    def __init__(self) -> None:
        self.running: list[DecodeAttention] = []


steps = _Steps()


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,  # noqa: ARG001 - of this token, which the cache has written already
    value: Tensor,  # noqa: ARG001
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # noqa: ARG001 - a policy decodes in eval mode
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend to what each row has written; an attention function of transformers.

    Args:
        module: the attention layer.
        query: `[M, H, 1, d]`.
        key: what the cache has returned; unused, as is `value`.
        value: see `key`.
        attention_mask: None.
        dropout: of training; unused.
        scaling: of the products; None for `1 / sqrt(d)`.
        **options: what the layer gives beside.

    Returns:
        `[M, 1, H, d]`, and no attention weights.

    Raises:
        NotPackableError: if the layer has a mask of its own, no cache, or changes its logits.
    """
    changes = [name for name in CHANGES_LOGITS if options.get(name) is not None]
    step = steps.running[-1] if steps.running else None
    layer = None if step is None else step.layer
    if step is None or layer is None or attention_mask is not None or changes or query.shape[2] != 1:
        raise NotPackableError(f"{type(module).__name__} needs {', '.join(changes) or 'a mask or a cache of its own'}")
    step.layer, step.calls = None, step.calls + 1
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return step.states.attend(layer, query.squeeze(2), scaling).unsqueeze(1), None


def writing_cache(num_layers: int, filled: int) -> DynamicCache:
    """Return a cache whose layers write into the states of the step that runs.

    Args:
        num_layers: of the model.
        filled: what it says of its length.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    layers: list[Any] = cache.layers
    layers.extend(_writing_layer()(index, filled) for index in range(num_layers))
    cache.layer_class_to_replicate = None  # no layers are added lazily
    return cache


@lru_cache(maxsize=1)
def _writing_layer() -> Any:
    """Return the layer class, defined here so that importing this file does not import transformers."""
    from transformers.cache_utils import DynamicLayer

    base: Any = DynamicLayer

    class WritingLayer(base):  # type: ignore[misc]
        """One layer of a cache that keeps nothing itself."""

        is_compileable = True

        def __init__(self, index: int, filled: int) -> None:
            super().__init__()
            self.index, self.filled, self.is_initialized = index, filled, True

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            step = steps.running[-1]
            step.states.write(self.index, key_states, value_states)
            step.layer = self.index
            return key_states, value_states

        def get_seq_length(self) -> int:
            return self.filled

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.filled + query_length, 0

    return WritingLayer
