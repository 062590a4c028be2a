"""On a CPU: one prefix of keys and values for all rows of a prompt.

A step reads a prompt once, for the queries of all its rows in one product, and then each row's own tokens; one softmax
over both makes it exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from remax_lightning.rollout.decode_attention import (
    Layout,
    RolloutSize,
    StepInputs,
    layout_of,
    states_of,
    writing_cache,
)

if TYPE_CHECKING:
    from transformers import DynamicCache


class GridLayout(NamedTuple):
    """How heads of rows become a grid of prompts, `[B * H', G * H / H', ...]`, as products with prompts take them.

    Args:
        places: `G` where the rows of all prompts stand place by place, as a sampled and a greedy row of each do until
            the first ones leave, and 1 elsewhere.
        to_grid: from rows, `[places, M * H / places, ...]`: a view where they stand place by place, else a copy.
        to_rows: the way back.
    """

    places: int
    to_grid: Callable[[Tensor], Tensor]
    to_rows: Callable[[Tensor], Tensor]


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
        self.layouts: dict[tuple[int, int], GridLayout] = {}  # by heads of queries and of keys
        self.row_of_cell: Tensor = prompts  # the plan has shapes alone, and as many rows of each prompt
        self.cell_of_row: Tensor = prompts
        if isinstance(prompts, FakeTensor):
            self.places, self.is_by_place = len(prompts) // len(self.prefix[0]), False
            return
        counts = torch.bincount(prompts, minlength=len(self.prefix[0]))  # [B]
        self.places = int(counts.max())
        order = prompts.argsort(stable=True)  # the rows, prompt by prompt
        place = torch.arange(len(prompts)) - (counts.cumsum(0) - counts)[prompts[order]]
        cells = prompts[order] * self.places + place
        # A blank cell repeats row 0, and nobody reads what it gets.
        self.row_of_cell = torch.zeros(len(counts) * self.places, dtype=torch.long).index_copy_(0, cells, order)
        self.cell_of_row = torch.empty_like(prompts).index_copy_(0, order, cells)  # [M]
        self.is_by_place = torch.equal(prompts, torch.arange(len(counts)).repeat(self.places))

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
        rows, at = keys.shape[0], self.width - 1
        self.suffix[2 * layer][:rows, :, at] = keys.squeeze(2)
        self.suffix[2 * layer + 1][:rows, :, at] = values.squeeze(2)

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
        by_row = rows * groups, heads // groups  # M * H', H / H'
        # ---- Products with the prompts, one for each head and prompt, and with what the rows have written ----
        if (heads, groups) not in self.layouts:  # one for all layers with as many heads
            self.layouts[heads, groups] = self._layout(heads, groups)
        places, to_grid, to_rows = self.layouts[heads, groups]  # rows stand as [places, M * H / places, ...]
        query = (query * scaling).reshape(places, -1, width)
        before = to_grid(query).bmm(prompt_keys.mT)  # [B * H', G * H / H', P]
        if self.bias is not None:
            bias = self.bias[..., self.bias.shape[-1] - length :]
            before = (before.view(len(bias), groups, before.shape[1], length) + bias).flatten(0, 1)
        after = query.view(*by_row, width).bmm(keys.mT).view(places, -1, keys.shape[1])
        # ---- One softmax over both ----
        probs = torch.cat([to_rows(before), after], -1).softmax(-1)  # [places, M * H / places, P + t]
        output = probs[..., length:].view(*by_row, -1).bmm(values).view(places, -1, values.shape[2])
        return output.add_(to_rows(to_grid(probs[..., :length]).bmm(prompt_values))).view(rows, heads, -1)

    def _layout(self, heads: int, groups: int) -> GridLayout:
        """Return how `H` heads of queries of each row, and `H'` of keys, are laid out in the grid."""
        share = heads // groups  # heads of queries for a head of keys
        if share == 1 and self.is_by_place:
            turn = partial(torch.transpose, dim0=0, dim1=1)  # [G, B * H, ...] to [B * H, G, ...] and back, no copy
            return GridLayout(self.places, turn, turn)
        # ---- Which head of which row stands in each cell, [B, H', G, H / H'], and the way back, [M, H] ----
        group, head = torch.arange(groups), torch.arange(share)
        row = self.row_of_cell.view(-1, 1, self.places, 1)
        in_grid = (row * heads + (group * share)[:, None, None] + head).flatten()
        prompt, place = self.cell_of_row[:, None] // self.places, self.cell_of_row[:, None] % self.places
        group, head = torch.arange(heads) // share, torch.arange(heads) % share
        in_rows = (((prompt * groups + group) * self.places + place) * share + head).flatten()
        shape = len(self.prefix[0]) * groups, self.places * share

        def to_grid(states: Tensor) -> Tensor:  # [1, M * H, ...]
            return states[0].index_select(0, in_grid).view(*shape, states.shape[2])

        def to_rows(states: Tensor) -> Tensor:  # [B * H', G * H / H', ...]
            return states.flatten(0, 1).index_select(0, in_rows).unsqueeze(0)

        return GridLayout(1, to_grid, to_rows)
