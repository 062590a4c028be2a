"""Which responses a pass runs: the one place that plans micro-batches by a budget of tokens.

A rollout's lengths are known only once it is made, and differ by rank. Each rank fills its micro-batches up to the
budget; then all ranks take the largest number of any, because under ZeRO and FSDP2 every pass is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from remax_lightning.errors import UserError
from remax_lightning.types import Rollout

MicroBatches = list[list[int]]
"""The numbers of the prompts in each micro-batch; every prompt is in one."""


def check_budget(budget: int | None, longest_prompt: int | None, longest_response: int, num_samples: int) -> None:
    """Refuse a budget of tokens that the longest prompt with its `num_samples` responses would exceed.

    Raises:
        UserError: if it does.
    """
    if budget is None or longest_prompt is None:
        return
    needed = num_samples * (longest_prompt + longest_response)
    if budget < needed:
        samples = "" if num_samples == 1 else f"{num_samples} samples of "
        raise UserError(
            f"data.tokens_per_micro_batch must be at least {needed}, got {budget}: a micro-batch holds a prompt with"
            f" all of its responses, {samples}data.max_prompt_length {longest_prompt} +"
            f" model.sampling.max_response_length {longest_response}; raise it, or shorten prompts or responses"
        )


def row_lengths(rollout: Rollout, active: Tensor | None = None) -> list[list[int]]:
    """Return the tokens of each prompt's responses, the prompt included: `B` lists of `n` numbers, 0 if not `active`.

    Args:
        rollout: the responses.
        active: `[S]` bool, the responses that are run; None for all.
    """
    prompts = rollout.prompt.prompt_mask.sum(-1).repeat_interleave(rollout.num_samples)  # [S]
    lengths = prompts + rollout.sampled.response_mask.sum(-1)  # [S]
    if active is not None:
        lengths = lengths * active
    rows: list[list[int]] = lengths.view(-1, rollout.num_samples).tolist()
    return rows


def plan_micro_batches(
    lengths: Sequence[Sequence[int]], budget: int, *, packed: bool, agree: Callable[[int], int] = int
) -> MicroBatches:
    """Return micro-batches of at most `budget` tokens each, the padding included, and as few as that allows.

    The largest come first, so that ranks whose passes wait for each other run passes of like size.

    Args:
        lengths: tokens of the rows of each prompt; rows of 0 tokens are not run.
        budget: most tokens of a micro-batch. A prompt with more is alone.
        packed: whether rows are packed; otherwise they are padded to the longest of their micro-batch.
        agree: from the number of micro-batches that this rank needs to the number that all ranks have.
    """
    tokens = [sum(row) for row in lengths]
    batches = _packed_batches(tokens, budget) if packed else _padded_batches(lengths, budget)
    return _with_number(batches, agree(len(batches)), tokens)


def _packed_batches(tokens: Sequence[int], budget: int) -> MicroBatches:
    """Return micro-batches of like size: the longest prompt that is left goes into the emptiest one."""
    order = sorted(range(len(tokens)), key=lambda prompt: -tokens[prompt])
    # As few as the sum needs, and one more until the fullest fits.
    fewest = min(max(1, -(-sum(tokens) // budget)), len(tokens))  # a prompt beyond the budget is alone
    for number in range(fewest, len(tokens) + 1):
        batches: MicroBatches = [[] for _ in range(number)]
        sizes = [0] * number
        for prompt in order:
            # Of equally full ones the one with fewer prompts, so that none stays empty.
            emptiest = min(range(number), key=lambda i: (sizes[i], len(batches[i])))
            batches[emptiest].append(prompt)
            sizes[emptiest] += tokens[prompt]
        if max(sizes) <= budget or number == len(tokens):
            break
    return [batches[i] for i in sorted(range(number), key=lambda i: -sizes[i])]


def _padded_batches(lengths: Sequence[Sequence[int]], budget: int) -> MicroBatches:
    """Return micro-batches of rows of like length, the longest first, so that padding is least."""
    order = sorted(range(len(lengths)), key=lambda prompt: -max(lengths[prompt]))
    batches: MicroBatches = []
    rows, width = 0, 0  # of the last micro-batch, which is `rows * width` tokens with its padding
    for prompt in order:
        added = sum(length > 0 for length in lengths[prompt])
        if not batches or (rows + added) * width > budget:
            batches.append([])
            rows, width = 0, max(lengths[prompt])
        batches[-1].append(prompt)
        rows += added
    return batches


def _with_number(batches: MicroBatches, number: int, tokens: Sequence[int]) -> MicroBatches:
    """Halve the largest micro-batches until there are `number`; what is halved still fits the budget."""
    while len(batches) < number:
        # Every rank has as many prompts, so there is one left to halve.
        largest = max(
            (i for i, batch in enumerate(batches) if len(batch) > 1),
            key=lambda i: sum(tokens[prompt] for prompt in batches[i]),
        )
        batch = batches[largest]
        batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches


def response_numbers(rollout: Rollout, batches: MicroBatches) -> list[Tensor]:
    """Return the numbers of the sampled responses in each micro-batch."""
    device = rollout.reward.device
    return [rollout.responses_of(torch.tensor(batch, device=device)) for batch in batches]
