"""From examples to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from remax_lightning.data.sampler import Key
from remax_lightning.types import PreferenceBatch, Prompt, PromptBatch, SupervisedBatch


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
        margin: what the chosen response's score has to be ahead by.
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


class ExampleDataset(Dataset[tuple[Any, int]]):
    """Examples by the keys of `MicroBatchSampler`: each item is the example and its micro-batch."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: Key) -> tuple[Any, int]:
        index, micro_batch_index = key if isinstance(key, tuple) else (key, 0)
        return self.examples[index], micro_batch_index


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Pad token ids to the longest of them.

    Args:
        sequences: `B` sequences of token ids.
        pad_id: id that fills up.
        side: where it fills up.

    Returns:
        Ids `[B, L]` int64 and mask `[B, L]` bool, True on real tokens.
    """
    width = max(len(ids) for ids in sequences)
    padded = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        start = width - len(ids) if side == "left" else 0
        padded[row, start : start + len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask[row, start : start + len(ids)] = True
    return padded, mask


def collate_prompts(items: Sequence[tuple[Example, int]], *, pad_id: int, num_micro_batches: int) -> PromptBatch:
    """Return the `PromptBatch` of examples, which all belong to one micro-batch."""
    examples = [example for example, _ in items]
    ids, mask = pad([example.prompt_ids for example in examples], pad_id, "left")
    return PromptBatch(
        prompt_ids=ids,
        prompt_mask=mask,
        prompts=[example.prompt for example in examples],
        rows=[example.row for example in examples],
        micro_batch_index=items[0][1],
        num_micro_batches=num_micro_batches,
        indices=[example.number for example in examples],
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
    size, micro_batch_index = len(items) // num_micro_batches, items[0][1]
    examples = [example for example, _ in items[micro_batch_index * size : (micro_batch_index + 1) * size]]
    prompt_ids, prompt_mask = pad([example.prompt_ids for example in examples], pad_id, "left")
    response_ids, response_mask = pad([example.response_ids for example in examples], pad_id, "right")
    return SupervisedBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        prompts=[example.prompt for example in examples],
        rows=[example.row for example in examples],
        step_batches=num_micro_batches,
        step_tokens=sum(len(example.response_ids) for example, _ in items),
    )


def collate_pairs(items: Sequence[tuple[PairExample, int]], *, pad_id: int) -> PreferenceBatch:
    """Return the `PreferenceBatch` of examples."""
    examples = [example for example, _ in items]
    chosen_ids, chosen_mask = pad([example.chosen_ids for example in examples], pad_id, "right")
    rejected_ids, rejected_mask = pad([example.rejected_ids for example in examples], pad_id, "right")
    return PreferenceBatch(
        chosen_ids=chosen_ids,
        chosen_mask=chosen_mask,
        rejected_ids=rejected_ids,
        rejected_mask=rejected_mask,
        margin=torch.tensor([example.margin for example in examples]),
        prompts=[example.prompt for example in examples],
        rows=[example.row for example in examples],
        indices=[example.number for example in examples],
    )
