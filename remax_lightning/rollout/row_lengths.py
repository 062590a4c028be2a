"""Attention of decoding steps on CUDA in 16 bits: torch's flash attention, which is told each row's length.

There is no mask. One CUDA graph serves all lengths of a number of rows, and rows leave without a copy of keys and
values.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from remax_lightning.models.forward import output_gap, run_probe
from remax_lightning.rollout.decode_attention import (
    Layout,
    RolloutSize,
    StepInputs,
    layout_of,
    slot_dtype,
    states_of,
    writing_cache,
)

if TYPE_CHECKING:
    from transformers import DynamicCache

log = logging.getLogger(__name__)

PAGE = 256
"""Tokens of a page of keys and values: the smallest that flash attention reads by a table."""


class RowLengths(NamedTuple):
    """Keys and values of rows whose tokens lie one behind the other from the left, and how many they are.

    They lie in a pool of `T` tokens. A row starts at a place of its own; or, where prompts are long, it has pages in a
    table, and the whole pages of its prompt are those of all rows of that prompt.

    Args:
        tokens: `[N, 1]` the tokens to feed.
        positions: `[N, 1]` their positions.
        mask: `[N, 1]` ones, for models that count tokens.
        lengths: `[N]` int32 tokens that each row attends to, the one that is fed included.
        slots: `[N]` where in the pool the keys and values of the tokens go.
        starts: `[N + 1]` int32 where rows start in the pool, without a table.
        ends: `[N + 1]` int32 the queries of each row: one.
        table: `[N, K]` int32 pages of each row; no columns without a table.
        states: `[T, H', d]` keys, then values of each layer.
        capacity: the most tokens of a row.
        windows: sliding window of each layer in tokens, or None.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    lengths: Tensor
    slots: Tensor
    starts: Tensor
    ends: Tensor
    table: Tensor
    states: list[Tensor]
    capacity: int
    windows: Layout

    @classmethod
    def create(cls, cache: DynamicCache, size: RolloutSize) -> RowLengths:
        """Allocate a pool for a rollout of this size."""
        columns, tokens = _pool(size)
        if columns and not _takes_pages(states_of(cache)[0]):
            columns, tokens = 0, size.num_rows * size.length
        states = [
            states.new_zeros(tokens, states.shape[1], states.shape[3], dtype=slot_dtype(states))
            for states in states_of(cache)
        ]
        device, rows = states[0].device, size.num_rows
        return cls(
            tokens=torch.zeros(rows, 1, dtype=torch.long, device=device),
            positions=torch.zeros(rows, 1, dtype=torch.long, device=device),
            mask=torch.ones(rows, 1, dtype=torch.long, device=device),
            lengths=torch.zeros(rows, dtype=torch.int32, device=device),
            slots=torch.zeros(rows, dtype=torch.long, device=device),
            starts=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            ends=torch.arange(rows + 1, dtype=torch.int32, device=device),
            table=torch.zeros(rows, columns, dtype=torch.int32, device=device),
            states=states,
            capacity=columns * PAGE or size.length,
            windows=layout_of(cache) or (),
        )

    def fits(self, cache: DynamicCache, size: RolloutSize) -> bool:
        """Return whether a rollout of this size and model can use this pool."""
        shared, own = _pages(size)
        columns = self.table.shape[1]
        room = size.num_rows <= len(self.tokens) and size.length <= self.capacity
        if columns:
            tokens = (size.num_prompts * shared + size.num_rows * own) * PAGE
            room = room and shared + own <= columns and tokens <= len(self.states[0])
        kinds = [(states.shape[1], states.shape[2], states.dtype, states.device) for states in self.states]
        wanted = [(states.shape[1], states.shape[3], slot_dtype(states), states.device) for states in states_of(cache)]
        return room and kinds == wanted and layout_of(cache) == self.windows

    def fill(self, cache: DynamicCache, prompt_mask: Tensor, rows: Tensor) -> None:
        """Copy the prompts' keys and values to where their rows read them."""
        (num_prompts, width), num_rows = prompt_mask.shape, len(rows)
        places = torch.arange(width, device=rows.device)  # [P]
        lengths = prompt_mask.sum(-1)  # [B]
        # ---- Without a table each row has all of its prompt; with one, it shares the whole pages ----
        paged = self.table.shape[1] > 0
        taken = lengths // PAGE * PAGE if paged else torch.zeros_like(lengths)  # [B] tokens that are shared
        shared = width // PAGE * PAGE if paged else 0
        room = (len(self.states[0]) - num_prompts * shared) // len(rows) if paged else self.capacity
        room = room // PAGE * PAGE if paged else room  # tokens of a row
        begin = num_prompts * shared + torch.arange(num_rows, device=rows.device) * room  # [N]
        if paged:
            self._fill_table(rows, lengths, begin, shared, room)
        self.starts[:num_rows], self.starts[num_rows:] = begin.int(), len(self.states[0])
        # ---- Tokens from the left, the padding of the prompts behind them ----
        prompts = torch.arange(num_prompts, device=rows.device)[:, None]
        from_left = (places + (width - lengths)[:, None]) % width  # [B, P]
        rest = min(width, PAGE - 1) if paged else width
        of_rest = (taken[:, None] + places[:rest]).clamp_max(width - 1)  # [B, rest]
        for pool, states in zip(self.states, states_of(cache), strict=True):
            # A window's states are the last ones; those before it are never read.
            whole = torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0)).transpose(1, 2)
            aligned = whole[prompts, from_left].to(pool.dtype)  # [B, P, H', d]
            pool[: num_prompts * shared] = aligned[:, :shared].flatten(0, 1)
            own = pool[num_prompts * shared :][: num_rows * room].view(num_rows, room, *pool.shape[1:])
            own[:, :rest] = aligned[prompts, of_rest][rows]  # [N, rest, H', d]
        # ---- Of the last prompt token: a step begins one further ----
        self.lengths[:num_rows] = lengths[rows].int()
        self.slots[:num_rows] = begin + (lengths - taken)[rows] - 1
        self.positions[:num_rows, 0] = lengths[rows] - 1

    def _fill_table(self, rows: Tensor, lengths: Tensor, begin: Tensor, shared: int, room: int) -> None:
        """Write the pages of each row: the whole ones of its prompt, then its own; the last repeats."""
        column = torch.arange(self.table.shape[1], device=rows.device)  # [K]
        whole = (lengths[rows] // PAGE)[:, None]  # [N, 1]
        own = begin[:, None] // PAGE + (column - whole).clamp(0, room // PAGE - 1)  # [N, K]
        of_prompt = rows[:, None] * (shared // PAGE) + column  # [N, K]
        self.table[: len(rows)] = torch.where(column < whole, of_prompt, own).int()

    def keep_rows(self, rows: Tensor, filled: int) -> None:  # noqa: ARG002 - keys and values stay where they are
        """Move `rows` to the front."""
        for buffer in (self.positions, self.lengths, self.slots, self.starts, self.table):
            buffer[: len(rows)] = buffer[rows]
        self.starts[len(rows) :] = len(self.states[0])

    def begin_step(self, num_rows: int, slot: int, layout: Layout, last: StepInputs | None) -> StepInputs:
        """See `RolloutStates`. One graph serves all lengths."""
        for buffer in (self.positions, self.lengths, self.slots):
            buffer[:num_rows].add_(1)
        key = num_rows, self.capacity, self.table.shape
        if last is not None and last.key == key:
            return last
        tensors = self.tokens[:num_rows], self.positions[:num_rows], self.mask[:num_rows]
        return StepInputs(key, tensors, writing_cache(len(layout), slot))

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See `AttentionStates`."""
        for pool, states in zip(self.states[2 * layer : 2 * layer + 2], (keys, values), strict=True):
            pool.index_copy_(0, self.slots[: len(states)], states.squeeze(2).to(pool.dtype))

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """See `AttentionStates`."""
        from torch.nn.attention.varlen import varlen_attn

        rows, window = len(query), self.windows[layer]
        keys, values = self.states[2 * layer : 2 * layer + 2]  # [T, H', d]
        ends, starts, lengths = self.ends[: rows + 1], self.starts[: rows + 1], self.lengths[:rows]
        return _by_lengths(
            varlen_attn,
            (query.to(keys.dtype), keys, values),
            (ends, starts, lengths),
            self.table[:rows],
            self.capacity,
            scale=scaling,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            enable_gqa=query.shape[1] != keys.shape[1],
        )


def _by_lengths(
    attend: Callable[..., Any],
    states: tuple[Tensor, Tensor, Tensor],
    rows: tuple[Tensor, Tensor, Tensor],
    table: Tensor,
    capacity: int,
    **options: Any,
) -> Tensor:
    """Call torch's flash attention for one query per row.

    Args:
        attend: `varlen_attn`.
        states: `[M, H, d]` queries, `[T, H', d]` keys and values.
        rows: `ends`, `starts` and `lengths` as in `RowLengths`; flash attention 2 wants starts with a table, too.
        table: `[M, K]` pages; no columns without a table.
        capacity: the most tokens of a row.
        **options: of the attention.
    """
    (query, *pool), (ends, starts, lengths) = states, rows
    if table.shape[1]:
        options["block_table"] = table
        pool = [tensor.view(-1, PAGE, *tensor.shape[1:]) for tensor in pool]
    return cast(Tensor, attend(query, *pool, ends, starts, 1, capacity, seqused_k=lengths, **options))


def _takes_pages(states: Tensor) -> bool:
    """Whether flash attention reads keys and values like these by a table of pages."""
    from torch.nn.attention.varlen import varlen_attn

    return isinstance(states, FakeTensor) or _pages_are_right(varlen_attn, states.device, slot_dtype(states))


@lru_cache(maxsize=8)
def _pages_are_right(attend: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> bool:
    """Try it on random numbers: two rows, which lie in the pool one behind the other and overlap by a page."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(count, 2, 64, generator=generator) for count in (2, 3 * PAGE, 3 * PAGE))
    states: Any = tuple(tensor.to(dtype).to(device) for tensor in (query, keys, values))
    numbers = [[0, 1, 2], [0, PAGE, 3 * PAGE], [PAGE + 3, PAGE + 5]]
    rows: Any = tuple(torch.tensor(line, dtype=torch.int32).to(device) for line in numbers)
    table = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32).to(device)

    def probe() -> str:
        paged, expected = (_by_lengths(attend, states, rows, some, 2 * PAGE) for some in (table, table[:, :0]))
        gap = output_gap(paged, expected)
        return f"computes something else ({gap})" if gap else ""

    if fault := run_probe(probe, "fails ({})".format):
        log.info("rows of a prompt do not share its pages: flash attention by a table %s", fault)
    return not fault


def _pages(size: RolloutSize) -> tuple[int, int]:
    """Return the whole pages of the longest prompt, and those that a row needs beside."""
    shared = size.prompt_length // PAGE
    rest = min(size.prompt_length, PAGE - 1) if shared else size.prompt_length
    return shared, -(-(rest + size.response_length) // PAGE)


def _pool(size: RolloutSize) -> tuple[int, int]:
    """Return the columns of the table, 0 for none, and the tokens of the pool: whichever needs less."""
    shared, own = _pages(size)
    paged, plain = (size.num_prompts * shared + size.num_rows * own) * PAGE, size.num_rows * size.length
    return (shared + own, paged) if shared and paged < plain else (0, plain)


@lru_cache(maxsize=1)
def flash_takes_lengths() -> bool:
    """Whether torch's flash attention over texts can be told lengths and pages; it learned that after 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"seqused_k", "block_table"} <= set(inspect.signature(varlen_attn).parameters)
