"""Attention of decoding steps without masks: a step reads what its rows have written, and nothing else.

transformers takes an attention function by name; ours asks the states of the rollout, which are one of two kinds:

- `SharedPrefix`, on a CPU in float32: the rows of a prompt share its keys and values. A step reads a prompt once, for
  the queries of all its rows in one product, and then each row's own tokens; one softmax over both makes it exact.
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
from torch._subclasses import FakeTensor

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


# ---- On a CPU: one prefix for the rows of a prompt ----


class SharedPrefix:
    """Keys and values of prompts, each for all its rows, and of what every row has written.

    Args:
        cache: the prefilled cache of the `B` prompts, whose tensors are used as they are.
        size: of the rollout.
    """

    def __init__(self, cache: DynamicCache, size: RolloutSize) -> None:
        self.prefix, self.size = states_of(cache), size  # [B, H', P, d] keys, then values of each layer
        self.windows = layout_of(cache) or ()
        rows, length = size.num_rows, size.response_length
        # Unread until it is written, so nothing is cleared.
        self.suffix = [
            states.new_empty(rows, states.shape[1], length, states.shape[3]) for states in self.prefix
        ]  # [N, H', R, d]
        ones = torch.ones(rows, 1, dtype=torch.long)
        self.tokens, self.positions, self.mask = ones.clone(), ones.clone(), ones  # [N, 1]
        self.width = 0  # tokens of the responses that attention reads

    @property
    def states(self) -> list[Tensor]:
        """All keys and values."""
        return self.prefix + self.suffix

    def fits(self, cache: DynamicCache, size: RolloutSize) -> bool:  # noqa: ARG002
        """Return False: they hold the prompts of one rollout."""
        return False

    def fill(self, cache: DynamicCache, prompt_mask: Tensor, rows: Tensor) -> None:  # noqa: ARG002 - has the prefix
        """See `RolloutStates`, as for the methods below."""
        self.positions[:, 0] = prompt_mask.sum(-1)[rows] - 1  # of the last prompt token: a step begins one further
        self.bias: Tensor | None = None
        if not isinstance(prompt_mask, FakeTensor) and not prompt_mask.all():  # the plan has shapes alone
            padding = torch.zeros(prompt_mask.shape).masked_fill_(~prompt_mask, -torch.inf)
            self.bias = padding[:, None, None]  # [B, 1, 1, P]
        self._group(rows)

    def keep_rows(self, rows: Tensor, filled: int) -> None:
        """Move `rows`, with their first `filled` tokens, to the front; prompts without rows leave, too."""
        written = filled - self.size.prompt_length
        for states in self.suffix:
            states[: len(rows), :, :written] = states[:, :, :written].index_select(0, rows)
        self.positions[: len(rows)] = self.positions[rows]
        left, prompts = self.prompts[rows].unique(return_inverse=True)
        if len(left) < len(self.prefix[0]):
            self.prefix = [states.index_select(0, left) for states in self.prefix]
            self.bias = None if self.bias is None else self.bias[left]
        self._group(prompts)

    def _group(self, prompts: Tensor) -> None:
        """Lay the rows out in a grid of prompts and places, `G` of them as the prompt with the most rows has.

        Args:
            prompts: `[M]` the prompt of each row.
        """
        self.prompts = prompts
        # As products take them: of each layer, keys and values of prompts, [B * H', P, d], and of rows, [N * H', R, d].
        flat = [states.flatten(0, 1) for states in self.states]
        half = len(self.prefix)
        self.flat = list(zip(flat[:half:2], flat[1:half:2], flat[half::2], flat[half + 1 :: 2], strict=True))
        self.orders: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by heads of queries and of keys
        self.row_of_cell: Tensor = prompts  # the plan has shapes alone, and as many rows of each prompt
        self.cell_of_row: Tensor = prompts
        if isinstance(prompts, FakeTensor):
            self.places = len(prompts) // len(self.prefix[0])
            return
        counts = torch.bincount(prompts, minlength=len(self.prefix[0]))  # [B]
        self.places = int(counts.max())
        order = prompts.argsort(stable=True)  # the rows, prompt by prompt
        place = torch.arange(len(prompts)) - (counts.cumsum(0) - counts)[prompts[order]]
        cells = prompts[order] * self.places + place
        # A blank cell repeats row 0, and nobody reads what it gets.
        self.row_of_cell = torch.zeros(len(counts) * self.places, dtype=torch.long).index_copy_(0, cells, order)
        self.cell_of_row = torch.empty_like(prompts).index_copy_(0, order, cells)  # [M]

    def begin_step(self, num_rows: int, slot: int, layout: Layout, last: StepInputs | None) -> StepInputs:
        """Attend to the token of `slot` and all before it."""
        self.width = slot + 1 - self.size.prompt_length
        self.positions[:num_rows].add_(1)
        if last is not None and last.key == num_rows:
            return last
        tensors = self.tokens[:num_rows], self.positions[:num_rows], self.mask[:num_rows]
        return StepInputs(num_rows, tensors, writing_cache(len(layout), self.size.prompt_length))

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See `AttentionStates`."""
        at = self.width - 1
        self.suffix[2 * layer][: len(keys), :, at] = keys.squeeze(2)
        self.suffix[2 * layer + 1][: len(values), :, at] = values.squeeze(2)

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """See `AttentionStates`."""
        (rows, heads, width), groups = query.shape, self.prefix[2 * layer].shape[1]
        # ---- What the layer sees: all, or what is left in its window ----
        prompt_keys, prompt_values, keys, values = self.flat[layer]
        first, window, length = 0, self.windows[layer], self.size.prompt_length
        if window is not None:
            first = max(0, length + self.width - window)
            # A window's prompt states are the last ones of the prompt.
            skipped = max(0, first - length + prompt_keys.shape[1])
            prompt_keys, prompt_values = prompt_keys[:, skipped:], prompt_values[:, skipped:]
        seen = slice(max(0, first - length), self.width)
        keys, values = keys[: rows * groups, seen], values[: rows * groups, seen]  # [M * H', t, d]
        length = prompt_keys.shape[1]
        # ---- Products with the prompts, one for each head and prompt, and with what the rows have written ----
        to_grid, to_rows = self._orders(heads, groups)
        grid = len(prompt_keys), len(to_grid) // len(prompt_keys)  # B * H', G * H / H'
        query = (query * scaling).flatten(0, 1)  # [M * H, d]
        before = query.index_select(0, to_grid).view(*grid, width).bmm(prompt_keys.mT)  # [B * H', G * H / H', P]
        if self.bias is not None:
            bias = self.bias[..., self.bias.shape[-1] - length :]
            before = before.view(len(bias), groups, grid[1], length) + bias
        before = before.view(len(to_grid), length).index_select(0, to_rows)  # [M * H, P]
        after = query.view(len(keys), -1, width).bmm(keys.mT).view(rows * heads, -1)  # [M * H, t]
        # ---- One softmax over both ----
        probs = torch.cat([before, after], -1).softmax(-1)  # [M * H, P + t]
        of_prompt = probs[:, :length].index_select(0, to_grid).view(*grid, length)
        of_row = probs[:, length:].view(len(keys), heads // groups, -1)
        output = of_prompt.bmm(prompt_values).view(-1, values.shape[2]).index_select(0, to_rows)  # [M * H, d]
        return output.view(rows, heads, -1).add_(of_row.bmm(values).view(rows, heads, -1))

    def _orders(self, heads: int, groups: int) -> tuple[Tensor, Tensor]:
        """Return which head of which row stands at each place of the grid of prompts, and the way back.

        Args:
            heads: `H`, of queries.
            groups: `H'`, of keys.

        Returns:
            `[B * H' * G * H / H']` and `[M * H]` indices, the same for all layers with as many heads.
        """
        if (heads, groups) not in self.orders:
            share = heads // groups  # heads of queries for a head of keys
            group, head = torch.arange(groups), torch.arange(share)
            row = self.row_of_cell.view(-1, 1, self.places, 1)
            in_grid = row * heads + (group * share)[:, None, None] + head  # [B, H', G, H / H']
            prompt, place = self.cell_of_row[:, None] // self.places, self.cell_of_row[:, None] % self.places
            group, head = torch.arange(heads) // share, torch.arange(heads) % share
            in_rows = ((prompt * groups + group) * self.places + place) * share + head  # [M, H]
            self.orders[heads, groups] = in_grid.flatten(), in_rows.flatten()
        return self.orders[heads, groups]
