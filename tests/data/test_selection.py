"""Prompts that rest, a curriculum, and where a stream of prompts resumes."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import pytest
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from remax_lightning.data import MicroBatchSampler, PromptDataModule, SelectionConfig
from remax_lightning.data.selection import PromptStream, SelectingSampler
from remax_lightning.errors import UserError


class Identity(Dataset[Any]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, key: Any) -> Any:
        return key


def rows_of(batch: list[Any]) -> list[int]:
    return [key[0] if isinstance(key, tuple) else key for key in batch]


def make(num_rows: int = 20, batch_size: int = 4, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    micro_batches = options.pop("num_micro_batches", 1)
    stream = PromptStream(num_rows, 3, SelectionConfig(**options))
    sampler = SelectingSampler(
        stream, batch_size, num_micro_batches=micro_batches, seed=3, rank=rank, world_size=world_size
    )
    return StatefulDataLoader(Identity(), batch_size=batch_size, sampler=sampler, drop_last=True, collate_fn=list)


def test_with_nothing_left_out_the_order_is_that_of_the_epochs() -> None:
    stream, plain = PromptStream(12, 3, SelectionConfig(skip_uninformative=1)), MicroBatchSampler(12, 4, seed=3)
    drawn = [stream.draw(4) for _ in range(6)]
    assert list(chain(*drawn[:3])) == plain.order(0)
    assert list(chain(*drawn[3:])) == plain.order(1)


def test_no_prompt_comes_twice_in_a_batch_across_passes() -> None:
    stream = PromptStream(7, 0, SelectionConfig(skip_uninformative=1))
    for _ in range(30):
        assert len(set(stream.draw(5))) == 5
    with pytest.raises(ValueError, match="at most 7"):
        stream.draw(8)


def test_no_prompt_comes_twice_in_a_step_across_passes() -> None:
    sampler = SelectingSampler(PromptStream(9, 0, SelectionConfig(oversample=2)), 2, world_size=2)
    for _ in range(30):
        assert len({*sampler.draw(starts_step=True), *sampler.draw(starts_step=False)}) == 8
    with pytest.raises(ValueError, match="at most 1, got 4"):
        sampler.draw(starts_step=False)


@pytest.mark.parametrize("num_rows", [8, 12, 28])
def test_a_run_goes_on_with_another_number_of_rows_behind_an_epoch(num_rows: int) -> None:
    loader = make(num_rows=20, skip_uninformative=1)
    list(loader)
    for index in range(20):
        loader.sampler.stream.observe(index, False, 0.0, 1)
    resumed = make(num_rows=num_rows, skip_uninformative=1)
    resumed.load_state_dict(loader.state_dict())
    rows = [row for batch in resumed for row in rows_of(batch)]
    assert sorted(rows) == list(range(num_rows))  # nothing is known of these prompts
    assert rows == MicroBatchSampler(num_rows, 4, seed=3).order(1)


def test_a_prompt_rests_after_visits_without_an_advantage_and_comes_back() -> None:
    stream = PromptStream(6, 0, SelectionConfig(skip_uninformative=2))
    seen: list[int] = []  # passes in which prompt 5 is drawn
    for number in range(9):
        for index in stream.draw(6 - (stream.num_resting() if number else 0)):
            stream.observe(index, index != 5, 0.0, 1)
            if index == 5:
                seen.append(number)
    # Two visits, two passes of rest, one more visit, two more passes of rest.
    assert seen[:3] == [0, 1, 4]
    assert stream.skipped > 0


def test_an_advantage_ends_the_count() -> None:
    stream = PromptStream(3, 0, SelectionConfig(skip_uninformative=2))
    for informative in (False, True, False):
        for index in stream.draw(3):
            stream.observe(index, informative, 0.0, 1)
    assert stream.num_resting() == 0


def test_prompts_are_drawn_even_if_all_of_them_rest() -> None:
    stream = PromptStream(5, 0, SelectionConfig(skip_uninformative=1))
    for _ in range(20):
        for index in stream.draw(5):
            stream.observe(index, False, 0.0, 1)


def test_the_curriculum_draws_prompts_by_the_variance_of_their_reward() -> None:
    stream = PromptStream(30, 0, SelectionConfig(curriculum=0.2))
    counts = dict.fromkeys(range(30), 0)
    for _ in range(400):
        for index in stream.draw(5):
            counts[index] += 1
            # a third never passes, a third always, a third half of the time
            stream.observe(index, True, (0.0, 1.0, 0.5)[index % 3], 4)
    never, always, half = (sum(counts[index] for index in range(start, 30, 3)) for start in range(3))
    # With 20 samples that count, (0 + 1) / (20 + 2) gives a probability of 0.17, so that the floor of 0.2 holds.
    assert 0.15 < never / half < 0.27
    assert 0.15 < always / half < 0.27


def test_the_curriculum_refuses_rewards_that_are_no_rates() -> None:
    stream = PromptStream(4, 0, SelectionConfig(curriculum=0.5))
    with pytest.raises(UserError, match=r"data\.selection\.curriculum needs rewards from 0 to 1.* got a mean of -0\.5"):
        stream.observe(0, True, -0.5, 1)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("done", [1, 3, 4, 9])
def test_a_resumed_loader_draws_what_the_other_would_have(done: int, micro_batches: int) -> None:
    options = {"skip_uninformative": 1, "curriculum": 0.3, "num_micro_batches": micro_batches}

    def batches(loader: Any, count: int) -> list[list[Any]]:
        """Batches over several epochs, each told of as a run does when it is trained on."""
        found: list[list[Any]] = []
        while len(found) < count:
            for batch in loader:
                for index in rows_of(batch) if isinstance(batch[0], int) or batch[0][1] == 0 else ():
                    loader.sampler.stream.observe(index, index % 3 > 0, (index % 4) / 3, 2)
                found.append(batch)
                if len(found) == count:
                    break
        return found

    whole = make(**options)
    first = batches(whole, done)
    state = copy.deepcopy(whole.state_dict())
    resumed = make(**options)
    resumed.load_state_dict(state)
    assert first == batches(make(**options), done)
    rest = batches(resumed, 2 * 5 * micro_batches)
    # Lightning goes on with the same iterator.
    everything = batches(make(**options), done + len(rest))
    assert rest == everything[done:]


def test_ranks_share_what_one_process_draws() -> None:
    alone, ranks = make(24, 8), [make(24, 4, rank, 2) for rank in range(2)]
    for whole, left, right in zip(alone, *ranks, strict=True):
        assert sorted(left + right) == sorted(whole)
        assert whole[::2] == left


def test_another_number_of_ranks_goes_on_with_the_same_prompts() -> None:
    def observe(loader: Any, rows: list[int]) -> None:
        for index in rows:
            loader.sampler.stream.observe(index, index % 2 > 0, 0.5, 1)

    one = make(24, 8, skip_uninformative=1)
    batches = iter(one)
    observe(one, next(batches))
    state = copy.deepcopy(one.state_dict())
    ranks = [make(24, 4, rank, 2, skip_uninformative=1) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    resumed = [iter(loader) for loader in ranks]
    for _ in range(2):
        whole, parts = next(batches), [next(iterator) for iterator in resumed]
        assert parts == [whole[::2], whole[1::2]]
        for loader in (one, *ranks):
            observe(loader, whole)


def test_an_epoch_under_way_without_a_selection_is_not_gone_on_with() -> None:
    plain = StatefulDataLoader(Identity(), batch_size=4, sampler=MicroBatchSampler(20, 4, seed=3), collate_fn=list)
    next(iter(plain))
    batches = iter(plain)
    next(batches)
    state = plain.state_dict()
    selecting = make(skip_uninformative=1)
    selecting.load_state_dict(state)
    with pytest.raises(UserError, match="selection False to True"):
        next(iter(selecting))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_uninformative": 0}, r"skip_uninformative must be null or at least 1, got 0"),
        ({"oversample": 0}, r"oversample must be at least 1 \(rollout batches\), got 0"),
        ({"curriculum": 0.0}, r"curriculum must be null or above 0 and at most 1, got 0"),
        ({"curriculum": 1.5}, r"curriculum must be null or above 0 and at most 1, got 1\.5"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"^data\.selection\." + message):
        SelectionConfig(**options)


def test_workers_that_draw_ahead_are_refused() -> None:
    from remax_lightning.data import LoadingConfig

    with pytest.raises(UserError, match=r"data\.loading\.num_workers must be 0 with data\.selection, got 2"):
        PromptDataModule(
            "x.jsonl", "t", selection=SelectionConfig(curriculum=0.5), loading=LoadingConfig(num_workers=2)
        )
