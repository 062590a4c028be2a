"""The order of the rows, and padded batches.

Seed and epoch determine the order. It is split over the ranks and resumable at every position.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from remax_lightning.errors import UserError
from remax_lightning.types import PreferenceBatch, Prompt, PromptBatch, SupervisedBatch

# index, (index, micro_batch_index), or (index, micro_batch_index, index of the same place in the next rollout batch)
Key = int | tuple[int, int] | tuple[int, int, int]


class MicroBatchSampler(DistributedSampler[Key]):
    """Yields the keys of each rollout batch `num_micro_batches` times in a row, one micro-batch after the other.

    A data loader that cuts the keys into batches of `batch_size` thus sees the same prompts once per micro-batch. A
    key is `(index, micro_batch_index)`, or the index alone where there is one micro-batch. Where it looks ahead, the
    keys of first micro-batches also have the index of the row that takes their place in the next rollout batch.

    It is a `DistributedSampler` so that Lightning leaves it in place and tells it the epoch. Rank `r` of `W`
    takes every `W`-th row, so the rows of one step over all ranks depend on `W * batch_size` only.

    Args:
        num_rows: rows of the data set.
        batch_size: prompts per rollout batch and rank.
        num_micro_batches: how often each batch is yielded.
        shuffle: whether to shuffle, differently in each epoch. Else the rows come in their order.
        drop_last: whether to leave out the rows that do not fill a batch on every rank. Where they are kept,
            a rank that would have one batch less than another repeats a row, because ranks that disagree wait
            for each other forever.
        seed: with the epoch, fixes the order.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: if short batches would be split into micro-batches of unequal size.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        num_micro_batches: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_micro_batches > 1 and not drop_last:
            raise ValueError(
                f"drop_last must be True where num_micro_batches > 1, got num_micro_batches={num_micro_batches}"
            )
        rows: Any = range(num_rows)  # all that the base class asks of a data set is its length
        super().__init__(rows, world_size, rank, shuffle, seed, drop_last)
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.num_micro_batches = num_micro_batches
        self.looks_ahead = False
        # 9 rows, 2 ranks, batches of 2: rank 0 has 0 2 4 6 8 in 3 batches, rank 1 has 1 3 5 7 in 2. `drop_last`: both
        # use 2 full batches. Otherwise rank 1 repeats a row, so that it has 3 batches, too.
        full, local_rows = num_rows // (batch_size * world_size), len(range(rank, num_rows, world_size))
        batches = full if drop_last else math.ceil(math.ceil(num_rows / world_size) / batch_size)
        self.repeats_row = not drop_last and math.ceil(local_rows / batch_size) < batches  # in a batch of its own
        self.num_samples = full * batch_size if drop_last else local_rows + self.repeats_row

    def order(self, epoch: int) -> list[int]:
        """Return the indices of this rank's rows in `epoch`, each once but for the repeated one."""
        indices = list(range(self.num_rows))
        if self.shuffle:
            # a text, because the sum of seed and epoch would give run 1 the order of run 0 one epoch later
            random.Random(f"{self.seed}/{epoch}").shuffle(indices)
        # The repeated row is the first of the epoch; `num_samples` has room for it only where this rank lacks a batch.
        local = indices[self.rank :: self.num_replicas]
        return (local + indices[:1])[: self.num_samples]

    def __iter__(self) -> Iterator[Key]:
        return SamplerIterator(self)

    def __len__(self) -> int:
        """Keys in an epoch: rows of this rank times micro-batches."""
        return self.num_samples * self.num_micro_batches

    def signature(self) -> dict[str, int | bool]:
        """Return what fixes the order besides the epoch; a position means nothing under another one."""
        return {
            "rows": self.num_rows,
            "batch_size": self.batch_size,
            "num_micro_batches": self.num_micro_batches,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "world_size": self.num_replicas,
            "selection": False,
        }


class SamplerIterator(Iterator[Key]):
    """A place in an epoch, which `StatefulDataLoader` saves and restores.

    The epoch is read from the sampler at the first key: Lightning makes the iterator before it calls
    `set_epoch`.
    """

    def __init__(self, sampler: MicroBatchSampler) -> None:
        self.sampler = sampler
        self.yielded = 0
        self._epoch: int | None = None
        self._order: list[int] = []
        self._next_order: list[int] | None = None  # of the next epoch, where it is looked at

    def __next__(self) -> Key:
        """Return the next key."""
        if self._epoch is None:
            self._start_epoch(self.sampler.epoch)
        if self.yielded >= len(self.sampler):
            raise StopIteration
        # batch_size 2, 2 micro-batches, order a b c d -> (a, 0) (b, 0) (a, 1) (b, 1) (c, 0) (d, 0) (c, 1) (d, 1)
        batch_size, num_micro_batches = self.sampler.batch_size, self.sampler.num_micro_batches
        batch, rest = divmod(self.yielded, batch_size * num_micro_batches)
        micro_batch_index, offset = divmod(rest, batch_size)
        self.yielded += 1
        index = self._index(batch, offset)
        if self.sampler.looks_ahead and micro_batch_index == 0:
            return index, 0, self._following(batch, offset)
        return index if num_micro_batches == 1 else (index, micro_batch_index)

    def _index(self, batch: int, offset: int) -> int:
        """Return the row of this rank at a place of a rollout batch."""
        return self._order[batch * self.sampler.batch_size + offset]

    def _following(self, batch: int, offset: int) -> int:
        """Return the row behind `batch`; behind the last batch of an epoch comes the first of the next one."""
        place = (batch + 1) * self.sampler.batch_size + offset
        if place < len(self._order):
            return self._order[place]
        if self._next_order is None:
            self._next_order = self.sampler.order(cast(int, self._epoch) + 1)
        return self._next_order[offset]

    def state_dict(self) -> dict[str, Any]:
        """Return the place, and what it is a place in."""
        epoch = self.sampler.epoch if self._epoch is None else self._epoch
        return {
            "epoch": epoch,
            "yielded": self.yielded,
            "length": len(self.sampler),
            "signature": self.sampler.signature(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a place.

        Raises:
            UserError: if it lies within an epoch of another order.
        """
        # ---- Read the saved position ----
        epoch, yielded, saved = state["epoch"], state["yielded"], dict(state["signature"])
        if "num_splits" in saved:  # as version 0.1 named it
            saved["num_micro_batches"] = saved.pop("num_splits")
        saved.setdefault("selection", False)  # versions before there was one
        if yielded >= state["length"]:
            # Saved after the last batch of an epoch: what comes next is the next one.
            epoch, yielded = epoch + 1, 0
        # ---- Convert it to the present number of ranks ----
        now = self.sampler.signature()
        batches, rest = divmod(yielded, saved["batch_size"])
        if (
            _rows_per_rollout(saved) == _rows_per_rollout(now)
            and rest == 0
            and batches % saved["num_micro_batches"] == 0
        ):
            # Another number of ranks takes the same rows step by step: rank r always has every W-th of them.
            saved |= {name: now[name] for name in ("batch_size", "world_size")}
            yielded = batches * self.sampler.batch_size
        # ---- Refuse another order; at the start of an epoch (`yielded` 0) any order will do ----
        changed = [f"{name} {saved[name]} to {now[name]}" for name in now if saved[name] != now[name]]
        if yielded and changed:
            raise UserError(
                "data: the checkpoint was saved in the middle of an epoch whose order has changed:"
                f" {', '.join(changed)}; resume with its settings (on another number of processes, set a"
                f" data.batch_size that makes {_rows_per_rollout(state['signature'])} prompts in total, and resume"
                " after a whole rollout), or start a new run from its exported policy"
            )
        # ---- Continue from there ----
        self.sampler.set_epoch(epoch)
        self._start_epoch(epoch)
        self.yielded = yielded

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._order, self._next_order = self.sampler.order(epoch), None


def _rows_per_rollout(signature: dict[str, Any]) -> int:
    """Return how many rows make a rollout, on all ranks together."""
    return int(signature["batch_size"] * signature["world_size"])


class Example(NamedTuple):
    """One row, ready to be batched.

    Args:
        prompt_ids: token ids of the prompt.
        prompt: the prompt as text, as the policy reads it.
        row: the raw row.
        where: its place in the source, for messages.
        response_ids: token ids of the response to imitate, end-of-sequence token included; empty where there
            is none.
        number: the row's place among those that were read.
        texts: what is tokenized beside the prompt, as it is rendered: the response to imitate, or the two whole
            conversations of a pair.
    """

    prompt_ids: list[int]
    prompt: Prompt
    row: dict[str, Any]
    where: str
    response_ids: Sequence[int] = ()
    number: int = 0
    texts: tuple[str, ...] = ()


class PairExample(NamedTuple):
    """A pair of responses to one prompt, ready to be batched.

    Args:
        chosen_ids: token ids of the whole conversation with the preferred response.
        rejected_ids: token ids of the one with the other response.
        margin: required difference between the scores of the chosen and the rejected response.
        prompt: the prompt as text.
        row: the row, its prompt and its responses apart.
        where: its place in the source, for messages.
        number: its place among the pairs that were read.
    """

    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float
    prompt: Prompt
    row: dict[str, Any]
    where: str
    number: int


class ExampleDataset(Dataset[tuple[Any, ...]]):
    """Examples by the keys of `MicroBatchSampler`: each item is the example, its micro-batch and what follows it."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: Key) -> tuple[Any, ...]:
        index, micro_batch_index, *following = key if isinstance(key, tuple) else (key, 0)
        return self.examples[index], micro_batch_index, *(self.examples[place] for place in following)


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Pad token ids to the longest of them.

    Args:
        sequences: `B` sequences of token ids.
        pad_id: id that fills up.
        side: where it fills up.

    Returns:
        Ids `[B, L]` int64 and mask `[B, L]` bool, True on real tokens.
    """
    width = max(len(ids) for ids in sequences)  # L
    padded = torch.full((len(sequences), width), pad_id)  # [B, L]
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)  # [B, L]
    for row, ids in enumerate(sequences):
        start = width - len(ids) if side == "left" else 0
        padded[row, start : start + len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask[row, start : start + len(ids)] = True
    return padded, mask


def collate_prompts(
    items: Sequence[tuple[Any, ...]],
    *,
    pad_id: int,
    num_micro_batches: int,
    tokens_per_micro_batch: int | None = None,
) -> PromptBatch:
    """Return the `PromptBatch` of examples, which all belong to one micro-batch; items may hold the next one's, too."""
    examples: list[Example] = [item[0] for item in items]
    following = None
    if len(items[0]) > 2:
        rest = [(item[2], 0) for item in items]
        budget = tokens_per_micro_batch
        following = collate_prompts(
            rest, pad_id=pad_id, num_micro_batches=num_micro_batches, tokens_per_micro_batch=budget
        )
    ids, mask = pad([example.prompt_ids for example in examples], pad_id, "left")  # [B, P]
    return PromptBatch(
        prompt_ids=ids,
        prompt_mask=mask,
        prompts=[example.prompt for example in examples],
        rows=[example.row for example in examples],
        micro_batch_index=items[0][1],
        num_micro_batches=num_micro_batches,
        indices=[example.number for example in examples],
        tokens_per_micro_batch=tokens_per_micro_batch,
        following=following,
    )


def collate_supervised(
    items: Sequence[tuple[Example, int]], *, pad_id: int, num_micro_batches: int = 1
) -> SupervisedBatch:
    """Return the `SupervisedBatch` of examples.

    Args:
        items: the examples of a whole optimizer step, all with one micro-batch index: the batch holds that part of
            them.
        pad_id: id that fills up.
        num_micro_batches: batches that the optimizer step comes in.
    """
    # Every micro-batch gets the examples of the whole step, takes its part of them, and counts the tokens of all.
    size, micro_batch_index = len(items) // num_micro_batches, items[0][1]
    examples = [example for example, _ in items[micro_batch_index * size : (micro_batch_index + 1) * size]]
    prompt_ids, prompt_mask = pad([example.prompt_ids for example in examples], pad_id, "left")  # [B, P]
    response_ids, response_mask = pad([example.response_ids for example in examples], pad_id, "right")  # [B, R]
    return SupervisedBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        prompts=[example.prompt for example in examples],
        rows=[example.row for example in examples],
        step_batches=num_micro_batches,
        step_tokens=sum(len(example.response_ids) for example, _ in items),
        indices=[example.number for example in examples],
    )


def collate_pairs(items: Sequence[tuple[PairExample, int]], *, pad_id: int) -> PreferenceBatch:
    """Return the `PreferenceBatch` of examples."""
    examples = [example for example, _ in items]
    chosen_ids, chosen_mask = pad([example.chosen_ids for example in examples], pad_id, "right")  # [B, T]
    rejected_ids, rejected_mask = pad([example.rejected_ids for example in examples], pad_id, "right")  # [B, T']
    return PreferenceBatch(
        chosen_ids=chosen_ids,
        chosen_mask=chosen_mask,
        rejected_ids=rejected_ids,
        rejected_mask=rejected_mask,
        margin=torch.tensor([example.margin for example in examples]),  # [B]
        prompts=[example.prompt for example in examples],
        rows=[example.row for example in examples],
        indices=[example.number for example in examples],
    )
