from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from remax_lightning.data import MicroBatchSampler
from remax_lightning.errors import UserError


class Identity(Dataset[Any]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, key: Any) -> Any:
        return key


def collate(items: list[Any]) -> list[Any]:
    return items


def loader(num_rows: int = 23, batch_size: int = 4, num_workers: int = 0, **options: Any) -> Any:
    sampler = MicroBatchSampler(num_rows, batch_size, **options)
    return StatefulDataLoader(
        Identity(),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler.drop_last,
        num_workers=num_workers,
        collate_fn=collate,
    )


def test_each_batch_comes_once_per_split() -> None:
    batches = list(loader(num_micro_batches=3))
    assert len(batches) == len(loader(num_micro_batches=3)) == 15
    seen = []
    for start in range(0, 15, 3):
        group = batches[start : start + 3]
        assert [{split for _, split in batch} for batch in group] == [{0}, {1}, {2}]
        indices = [[index for index, _ in batch] for batch in group]
        assert indices[0] == indices[1] == indices[2]
        seen += indices[0]
    assert len(set(seen)) == 20, "no row twice in an epoch"


def test_order_is_fixed_by_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): MicroBatchSampler(50, 5, seed=seed).order(epoch) for seed in range(3) for epoch in range(3)
    }
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9, "seed 0 in epoch 1 is not seed 1 in epoch 0"
    assert MicroBatchSampler(50, 5, seed=2).order(1) == orders[2, 1]


def test_order_does_not_change_between_releases() -> None:
    assert MicroBatchSampler(8, 2, seed=7).order(3) == [1, 7, 6, 5, 2, 3, 4, 0]


def test_ranks_share_the_rows_of_a_step() -> None:
    one = [set(batch) for batch in loader(num_rows=48, batch_size=8)]
    ranks = [list(loader(num_rows=48, batch_size=4, rank=rank, world_size=2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(one) == 6
    for whole, left, right in zip(one, *ranks, strict=True):
        assert set(left) | set(right) == whole
        assert not set(left) & set(right)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_rows", range(1, 26))
def test_evaluation_sees_every_row_and_every_rank_as_many_batches(num_rows: int, world_size: int) -> None:
    ranks = [
        list(loader(num_rows, rank=rank, world_size=world_size, shuffle=False, drop_last=False))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [index for batches in ranks for batch in batches for index in batch]
    assert set(rows) == set(range(num_rows))
    missing_batch = [r for r in range(world_size) if len(range(r, num_rows, world_size)) <= (len(ranks[0]) - 1) * 4]
    assert len(rows) == num_rows + len(missing_batch), "a row is repeated only for a rank that lacks a batch"
    if world_size == 1:
        assert rows == list(range(num_rows))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_ranks_have_as_many_batches(world_size: int) -> None:
    ranks = [list(loader(31, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [len(batches) for batches in ranks] == [31 // (4 * world_size)] * world_size
    assert all(len(batch) == 4 for batches in ranks for batch in batches)


def test_lightning_finds_set_epoch() -> None:
    from lightning.fabric.utilities.data import _set_sampler_epoch

    data = loader()
    _set_sampler_epoch(data, 5)
    assert [index for batch in data for index in batch] == MicroBatchSampler(23, 4).order(5)


def test_epoch_may_be_set_after_the_iterator_is_made() -> None:
    data = loader()
    batches = iter(data)
    data.sampler.set_epoch(2)
    assert next(batches) == MicroBatchSampler(23, 4).order(2)[:4]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("done", [1, 4, 7])
def test_resume_within_an_epoch_is_exact(num_workers: int, epoch: int, done: int) -> None:
    whole = loader(num_micro_batches=2, num_workers=num_workers)
    whole.sampler.set_epoch(epoch)
    batches = iter(whole)
    for _ in range(done):
        next(batches)
    state = whole.state_dict()
    rest = list(batches)
    assert len(rest) == 10 - done

    resumed = loader(num_micro_batches=2, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert list(resumed) == rest
    resumed.sampler.set_epoch(epoch + 1)
    whole.sampler.set_epoch(epoch + 1)
    assert list(resumed) == list(whole)


@pytest.mark.parametrize("exhausted", [False, True])
def test_state_after_the_last_batch_leads_into_the_next_epoch(exhausted: bool) -> None:
    whole = loader()
    whole.sampler.set_epoch(1)
    batches = iter(whole)
    for _ in range(5):
        next(batches)
    if exhausted:  # torchdata then makes a second iterator on resuming
        assert next(batches, None) is None
    resumed = loader()
    resumed.load_state_dict(whole.state_dict())
    assert [index for batch in resumed for index in batch] == MicroBatchSampler(23, 4).order(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 24}, "rows 23 to 24"),
        ({"seed": 1}, "seed 0 to 1"),
        ({"num_micro_batches": 2}, "num_micro_batches 1 to 2"),
        ({"world_size": 2}, "world_size 1 to 2"),
    ],
)
def test_resume_under_another_order_is_refused(options: dict[str, int], message: str) -> None:
    whole = loader()
    next(iter(whole))
    resumed = loader(**options)
    resumed.load_state_dict(whole.state_dict())
    with pytest.raises(UserError, match=message):
        next(iter(resumed))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_another_number_of_ranks_goes_on_with_the_same_rows(before: int, after: int) -> None:
    def ranks(world_size: int) -> list[Any]:
        size = 8 // world_size
        return [
            loader(50, batch_size=size, num_micro_batches=2, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]

    def rows(batches: list[list[Any]]) -> list[list[int]]:
        """Those of each step over all ranks; one rank's keys are `(row, micro_batch_index)`."""
        return [sorted(key[0] for keys in step for key in keys) for step in zip(*batches, strict=True)]

    whole = [list(each) for each in ranks(before)]
    stopped = ranks(before)
    for each in stopped:
        batches = iter(each)
        for _ in range(4):
            next(batches)
    rest = []
    for each in ranks(after):
        each.load_state_dict(stopped[0].state_dict())  # a checkpoint holds that of rank 0
        rest.append(list(each))
    assert rows(rest)[::2] == rows(whole)[4::2]
    assert len(rows(rest)) == 8


def test_a_position_of_version_0_1_resumes() -> None:
    """Version 0.1 called `num_micro_batches` `num_splits`."""

    def saved_by_version_0_1(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        return {
            {"num_micro_batches": "num_splits"}.get(key, key): saved_by_version_0_1(value)
            for key, value in state.items()
        }

    whole = loader(num_micro_batches=2)
    batches = iter(whole)
    for _ in range(3):
        next(batches)
    state = saved_by_version_0_1(whole.state_dict())
    assert "num_splits" in repr(state)
    assert "num_micro_batches" not in repr(state)
    resumed = loader(num_micro_batches=2)
    resumed.load_state_dict(state)
    assert list(resumed) == list(batches)


def test_another_number_of_ranks_cannot_take_over_half_a_rollout() -> None:
    whole = loader(50, batch_size=4, num_micro_batches=2, world_size=2)
    next(iter(whole))
    resumed = loader(50, batch_size=8, num_micro_batches=2)
    resumed.load_state_dict(whole.state_dict())
    with pytest.raises(UserError, match=r"batch_size 4 to 8, world_size 2 to 1.*after a whole rollout"):
        next(iter(resumed))


def test_state_at_the_end_of_an_epoch_fits_another_batch_size() -> None:
    whole = loader()
    batches = iter(whole)
    for _ in range(5):
        next(batches)
    resumed = loader(batch_size=6)
    resumed.load_state_dict(whole.state_dict())
    assert next(iter(resumed)) == MicroBatchSampler(23, 6).order(1)[:6]


def test_short_batches_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="drop_last must be True"):
        MicroBatchSampler(10, 4, num_micro_batches=2, drop_last=False)


def test_sizes_that_deepspeed_and_lightning_look_for() -> None:
    data = loader()
    assert (data.batch_sampler.batch_size, data.batch_sampler.drop_last) == (4, True)
    assert (data.sampler.batch_size, data.sampler.drop_last) == (4, True)


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_it_tells_the_rows_of_the_next_rollout(num_micro_batches: int) -> None:
    made = loader(num_rows=12, num_micro_batches=num_micro_batches)
    plain = loader(num_rows=12, num_micro_batches=num_micro_batches)
    made.sampler.looks_ahead = True
    firsts: list[list[Any]] = []
    for epoch in range(3):
        made.sampler.set_epoch(epoch)
        plain.sampler.set_epoch(epoch)
        batches, same = list(made), list(plain)
        # Of the parts of a rollout the first one tells; the rows themselves are those of a loader that tells nothing.
        assert [[key[:2] if num_micro_batches > 1 else (key[0],) for key in batch] for batch in batches] == [
            [key if isinstance(key, tuple) else (key,) for key in batch] for batch in same
        ]
        firsts += batches[::num_micro_batches]
    assert len(firsts) == 9
    for batch, following in itertools.pairwise(firsts):  # across epochs, too
        assert [key[2] for key in batch] == [key[0] for key in following]


def test_a_position_is_the_same_whether_it_looks_ahead_or_not() -> None:
    plain, made = loader(), loader()
    made.sampler.looks_ahead = True
    iterator = iter(plain)
    next(iterator)
    made.load_state_dict(plain.state_dict())
    assert [key[0] for key in next(iter(made))] == next(iterator)
