from __future__ import annotations

import torch

from remax_lightning.data.collate import Example, ExampleDataset, collate_prompts, collate_supervised, pad

SHORT = Example([5], "a", {"n": 0}, "f, line 1", [7, 2])
LONG = Example([5, 9, 6], "abc", {"n": 1}, "f, line 2", [2])


def test_prompts_are_padded_on_the_left() -> None:
    batch = collate_prompts([(SHORT, 1), (LONG, 1)], pad_id=9, num_micro_batches=3)
    assert batch.prompt_ids.tolist() == [[9, 9, 5], [5, 9, 6]]
    assert batch.prompt_ids.dtype == torch.int64
    # a pad id inside a prompt is a token like any other
    assert batch.prompt_mask.tolist() == [[False, False, True], [True, True, True]]
    assert (batch.prompts, batch.rows) == (["a", "abc"], [{"n": 0}, {"n": 1}])
    assert (batch.micro_batch_index, batch.num_micro_batches) == (1, 3)


def test_responses_are_padded_on_the_right() -> None:
    batch = collate_supervised([(SHORT, 0), (LONG, 0)], pad_id=2)
    assert batch.prompt_ids.tolist() == [[2, 2, 5], [5, 9, 6]]
    assert batch.response_ids.tolist() == [[7, 2], [2, 2]]
    # with pad = eos, the end of sequence counts and the padding does not
    assert batch.response_mask.tolist() == [[True, True], [True, False]]
    assert (batch.prompts, batch.rows) == (["a", "abc"], [{"n": 0}, {"n": 1}])


def test_empty_sequences_are_all_padding() -> None:
    ids, mask = pad([[], [4]], 3, "left")
    assert ids.tolist() == [[3], [4]]
    assert mask.tolist() == [[False], [True]]


def test_dataset_takes_both_kinds_of_keys() -> None:
    dataset = ExampleDataset([SHORT, LONG])
    assert dataset[1] == (LONG, 0)
    assert dataset[0, 2] == (SHORT, 2)
    assert len(dataset) == 2
