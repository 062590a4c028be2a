"""Select rows from the batches of a data loader."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.types import PreferenceBatch, PromptBatch, SupervisedBatch


def first_rows(loader: Iterable[Any], count: int, pad_id: int) -> PromptBatch | SupervisedBatch | PreferenceBatch:
    """Return the first `count` rows of a loader as one batch; all rows if there are fewer.

    Args:
        loader: yields batches. A rollout batch that arrives in several micro-batches counts once.
        count: number of rows.
        pad_id: token id of the padding.

    Raises:
        UserError: if the loader yields nothing, or something other than a batch of this package.
    """
    batches: list[Any] = []
    for batch in loader:
        if not isinstance(batch, PromptBatch | SupervisedBatch | PreferenceBatch):
            raise UserError(
                f"data: its loader yields a {type(batch).__name__}; expected PromptBatch, SupervisedBatch or"
                " PreferenceBatch of remax_lightning.types"
            )
        if getattr(batch, "micro_batch_index", 0) == 0:
            batches.append(batch)
        if sum(len(item.prompts) for item in batches) >= count:
            break
    if not batches:
        raise UserError("data: its training loader yields no batch; give more rows, or lower data.batch_size")
    return cast(PromptBatch, _first_n(_concatenate(batches, pad_id), count))


def _concatenate(batches: Sequence[Any], pad_id: int) -> Any:
    """Return batches of one type as a single batch."""
    first = batches[0]
    fields: dict[str, Any] = {}
    for name in first._fields:
        values = [getattr(batch, name) for batch in batches]
        if isinstance(values[0], Tensor) and values[0].dim() == 2:
            # Prompts are padded on the left, responses on the right.
            fields[name] = _pad_and_concatenate(values, 0 if name.endswith("mask") else pad_id, left="prompt" in name)
        elif isinstance(values[0], Tensor):
            fields[name] = torch.cat(values)
        elif isinstance(values[0], list):
            fields[name] = [item for value in values for item in value]
    return type(first)(**fields)  # the fields about micro-batches keep their defaults


def _pad_and_concatenate(values: Sequence[Tensor], fill: int, *, left: bool) -> Tensor:
    width = max(value.shape[1] for value in values)
    missing = [width - value.shape[1] for value in values]
    padded = [
        torch.nn.functional.pad(value, (lacks, 0) if left else (0, lacks), value=fill)
        for value, lacks in zip(values, missing, strict=True)
    ]
    return torch.cat(padded)


def _first_n(batch: Any, count: int) -> Any:
    fields = {name: value[:count] for name, value in batch._asdict().items() if isinstance(value, Tensor | list)}
    return batch._replace(**fields)


def select_rows(batch: PromptBatch, indices: Sequence[int]) -> PromptBatch:
    """Return the prompts at `indices`, without columns that are padding in all of them."""
    chosen = list(indices)
    mask = batch.prompt_mask[chosen]
    first = int(mask.any(0).long().argmax())
    return PromptBatch(
        batch.prompt_ids[chosen, first:],
        mask[:, first:],
        [batch.prompts[i] for i in chosen],
        [batch.rows[i] for i in chosen],
    )


def unpadded_ids(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the token ids of `[B, T]` rows as `B` lists without padding."""
    return [row[real].tolist() for row, real in zip(ids.cpu(), mask.cpu(), strict=True)]
