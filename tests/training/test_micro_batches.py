"""Micro-batches by a budget of tokens: none over the budget, none of another number than on other ranks."""

from __future__ import annotations

import random
from typing import Any

import pytest

from remax_lightning.errors import UserError
from remax_lightning.training.experience import check_budget, plan_micro_batches


def lengths_of(seed: int, prompts: int, samples: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.choice([0, 3, 9, 30, 50]) for _ in range(samples)] for _ in range(prompts)]


def padded(batch: list[int], lengths: list[list[int]]) -> int:
    """The tokens of a micro-batch whose rows are all as long as the longest."""
    rows = [length for prompt in batch for length in lengths[prompt] if length]
    return len(rows) * max(rows, default=0)


def packed(batch: list[int], lengths: list[list[int]]) -> int:
    return sum(sum(lengths[prompt]) for prompt in batch)


@pytest.mark.parametrize("size", [padded, packed])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_every_prompt_is_in_one_micro_batch_within_the_budget(seed: int, samples: int, size: Any) -> None:
    lengths, budget = lengths_of(seed, 17, samples), 50 * samples + seed
    alone = plan_micro_batches(lengths, budget, packed=size is packed)
    for number in (len(alone), len(alone) + 1, 17):
        batches = plan_micro_batches(lengths, budget, packed=size is packed, agree=lambda _, number=number: number)
        assert len(batches) == number
        assert sorted(prompt for batch in batches for prompt in batch) == list(range(17))
        assert all(batches)
        assert max(size(batch, lengths) for batch in batches) <= budget


def test_rows_of_like_length_stand_together_and_fill_the_budget() -> None:
    lengths = [[10], [40], [10], [38], [0], [9]]
    assert plan_micro_batches(lengths, 80, packed=False) == [[1, 3], [0, 2, 5, 4]]


def test_packed_micro_batches_are_as_few_as_their_tokens_need_and_of_like_size() -> None:
    lengths = [[10], [40], [10], [38], [0], [12], [9]]
    assert plan_micro_batches(lengths, 60, packed=True) == [[1, 0, 2], [3, 5, 6, 4]]
    assert len(plan_micro_batches(lengths, 59, packed=True)) == 3


def test_a_budget_below_the_longest_prompt_with_its_responses_is_refused() -> None:
    check_budget(None, 10, 6, 2)
    check_budget(32, 10, 6, 2)
    with pytest.raises(UserError, match=r"data\.tokens_per_micro_batch must be at least 32, got 31: .* 2 samples of"):
        check_budget(31, 10, 6, 2)


@pytest.mark.parametrize("packed", [True, False])
def test_a_prompt_beyond_the_budget_is_alone(packed: bool) -> None:
    batches = plan_micro_batches([[300] * 8] * 4, 1024, packed=packed)
    assert sorted(batches) == [[0], [1], [2], [3]]
