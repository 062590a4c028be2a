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
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from remax_lightning.models.packing import (
    CHANGES_LOGITS,
    NotPackableError,
    attention_by_name,
    attention_configs,
)
from remax_lightning.rollout.static_cache import Layout, RolloutSize, layout_of, states_of

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

log = logging.getLogger(__name__)

NAME = "remax_decoding"
"""What transformers knows the attention function by. It makes no mask for a name that has no mask function."""


class RolloutStates(Protocol):
    """The keys and values of a rollout, as the decoding loop uses them.

    `slot` is the place of the token that is fed, if all prompts had the length of the longest.
    """

    @property
    def states(self) -> list[Tensor]:
        """The tensors that hold them."""

    def fill(self, cache: DynamicCache, prompt_mask: Tensor, rows: Tensor) -> None:
        """Begin with the prompts: their cache, `[B, P]` mask, and `[N]` the prompt of each row."""

    def keep_rows(self, rows: Tensor, filled: int) -> None:
        """Move `rows`, with the tokens in their first `filled` slots, to the front."""

    def step_key(self, num_rows: int, slot: int) -> Hashable:
        """Return what inputs and cache of a step depend on, and on CUDA its kernels."""

    def step_inputs(self, num_rows: int, slot: int, layout: Layout) -> tuple[tuple[Tensor, ...], DynamicCache]:
        """Return the inputs of steps with one key, tokens, positions and mask, and their cache."""

    def begin_step(self, num_rows: int, slot: int) -> None:
        """Let rows attend to the token of `slot`, too."""

    def end_step(self, num_rows: int) -> None:
        """Go one position further."""


class AttentionStates(Protocol):
    """Keys and values that know how a step attends to them; a layer is its number, from 0."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write `[M, H', 1, d]` keys and values of the tokens that are fed."""

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """Return `[M, H, d]` what the queries of `M` rows, `[M, H, d]`, read."""


class DecodeAttention:
    """Lets the attention layers of a model decode on states of a rollout inside.

    Args:
        model: the policy.
        states: what its layers read and write.
    """

    def __init__(self, model: PreTrainedModel, states: AttentionStates) -> None:
        self.configs, self.states = attention_configs(model), states
        self.layer: int | None = None
        """The layer that has written its token and has not attended yet."""
        self.calls = 0
        """How many layers have attended."""
        self._switch: Any = None

    def __enter__(self) -> Self:
        self._switch = attention_by_name(self.configs, NAME, decode_attention)
        self._switch.__enter__()
        _steps.running.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _steps.running.pop()
        self._switch.__exit__(*error)


class _Steps(threading.local):
    """The steps that run now, the innermost last; another thread may decode with another model."""

    def __init__(self) -> None:
        self.running: list[DecodeAttention] = []


_steps = _Steps()


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
    step = _steps.running[-1] if _steps.running else None
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
            step = _steps.running[-1]
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
        self.positions[:, 0] = prompt_mask.sum(-1)[rows]
        self.bias: Tensor | None = None
        if not _has_no_values(prompt_mask) and not prompt_mask.all():
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
        self._known_orders: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by heads of queries and of keys
        if _has_no_values(prompts):  # as many rows of each prompt
            self.places, self.row_of_cell, self.cell_of_row = len(prompts) // len(self.prefix[0]), prompts, prompts
            return
        counts = torch.bincount(prompts, minlength=len(self.prefix[0]))  # [B]
        self.places = int(counts.max())
        order = prompts.argsort(stable=True)  # the rows, prompt by prompt
        place = torch.arange(len(prompts)) - (counts.cumsum(0) - counts)[prompts[order]]
        cells = prompts[order] * self.places + place
        # A blank cell repeats row 0, and nobody reads what it gets.
        self.row_of_cell = torch.zeros(len(counts) * self.places, dtype=torch.long).index_copy_(0, cells, order)
        self.cell_of_row = torch.empty_like(prompts).index_copy_(0, order, cells)  # [M]

    def step_key(self, num_rows: int, slot: int) -> Hashable:  # noqa: ARG002 - any slot
        """Return what a step's inputs and cache depend on."""
        return num_rows

    def step_inputs(self, num_rows: int, slot: int, layout: Layout) -> tuple[tuple[Tensor, ...], DynamicCache]:  # noqa: ARG002
        """Return the inputs of a step, tokens, positions and mask, and its cache."""
        inputs = self.tokens[:num_rows], self.positions[:num_rows], self.mask[:num_rows]
        return inputs, writing_cache(len(layout), self.size.prompt_length)

    def begin_step(self, num_rows: int, slot: int) -> None:  # noqa: ARG002
        """Attend to the token of `slot` and all before it."""
        self.width = slot + 1 - self.size.prompt_length

    def end_step(self, num_rows: int) -> None:
        """Go one position further."""
        self.positions[:num_rows].add_(1)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See `AttentionStates`."""
        at = self.width - 1
        self.suffix[2 * layer][: len(keys), :, at] = keys.squeeze(2)
        self.suffix[2 * layer + 1][: len(values), :, at] = values.squeeze(2)

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """See `AttentionStates`."""
        # ---- What the layer sees: all, or what is left in its window ----
        (rows, heads, _), groups = query.shape, self.prefix[2 * layer].shape[1]
        length, window = self.size.prompt_length, self.windows[layer]
        first = 0 if window is None else max(0, length + self.width - window)
        # A window's prompt states are the last ones of the prompt.
        skipped = max(0, first - length + self.prefix[2 * layer].shape[2])
        prompt_keys, prompt_values = (states[:, :, skipped:] for states in self.prefix[2 * layer : 2 * layer + 2])
        seen = slice(max(0, first - length), self.width)
        keys, values = (states[:rows, :, seen] for states in self.suffix[2 * layer : 2 * layer + 2])
        query, length = query * scaling, prompt_keys.shape[2]
        # ---- Products with the prompts, one for each head and prompt, and with what the rows have written ----
        before = self._by_prompt(query, groups) @ prompt_keys.mT  # [B, H', G * H / H', P]
        if self.bias is not None:
            before = before + self.bias[..., self.bias.shape[-1] - length :]
        after = query.view(rows, groups, heads // groups, -1) @ keys.mT  # [M, H', H / H', t]
        # ---- One softmax over both ----
        probs = torch.cat([self._by_row(before, heads), after.view(rows, heads, -1)], -1).softmax(-1)  # [M, H, P + t]
        of_prompt = self._by_prompt(probs, groups)[..., :length]
        of_row = probs.view(rows, groups, heads // groups, -1)[..., length:]
        output = self._by_row(of_prompt @ prompt_values, heads)  # [M, H, d]
        return output.add_((of_row @ values).view(rows, heads, -1))

    def _by_prompt(self, of_rows: Tensor, groups: int) -> Tensor:
        """Return `[B, H', G * H / H', X]` of `[M, H, X]`, by prompt and head of keys."""
        to_grid, _ = self._orders(of_rows.shape[1], groups)
        grid = of_rows.flatten(0, 1).index_select(0, to_grid)
        return grid.view(len(self.prefix[0]), groups, -1, grid.shape[-1])

    def _by_row(self, of_prompts: Tensor, heads: int) -> Tensor:
        """Return `[M, H, X]` of `[B, H', G * H / H', X]`."""
        _, to_rows = self._orders(heads, of_prompts.shape[1])
        of_rows = of_prompts.flatten(0, 2).index_select(0, to_rows)
        return of_rows.view(len(self.cell_of_row), heads, of_prompts.shape[-1])

    def _orders(self, heads: int, groups: int) -> tuple[Tensor, Tensor]:
        """Return the order of rows and heads, `[M * H]`, in the grid of prompts, and the order of that in rows."""
        if (heads, groups) not in self._known_orders:
            share = heads // groups  # heads of queries for a head of keys
            group, head = torch.arange(groups), torch.arange(share)
            row = self.row_of_cell.view(-1, 1, self.places, 1)
            to_grid = row * heads + (group * share)[:, None, None] + head  # [B, H', G, H / H']
            prompt, place = self.cell_of_row[:, None] // self.places, self.cell_of_row[:, None] % self.places
            group, head = torch.arange(heads) // share, torch.arange(heads) % share
            to_rows = ((prompt * groups + group) * self.places + place) * share + head  # [M, H]
            self._known_orders[heads, groups] = to_grid.flatten(), to_rows.flatten()
        return self._known_orders[heads, groups]


def _has_no_values(tensor: Tensor) -> bool:
    """Whether this is the plan, which runs on tensors of a shape alone."""
    return isinstance(tensor, FakeTensor)
