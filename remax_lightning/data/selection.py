"""Which prompts are drawn next, by what earlier responses gave: rests, and a curriculum by pass rate.

Prompts come in passes over the data set, each in an order of its own that seed and number of the pass determine. With
nothing left out, a pass is an epoch. All ranks observe the same and so draw the same.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from remax_lightning.data.collate import Key, MicroBatchSampler, SamplerIterator
from remax_lightning.data.options import SELECTION, SelectionConfig
from remax_lightning.errors import UserError

DECAY = 0.8
"""How much of earlier samples still counts for a pass rate at the next visit: about five visits. The policy moves."""


class PromptStream:
    """Draws prompts without end, and remembers what their visits gave.

    Args:
        num_rows: prompts of the data set.
        seed: with the number of the pass, fixes the order.
        config: which prompts are left out.
    """

    def __init__(self, num_rows: int, seed: int, config: SelectionConfig) -> None:
        self.num_rows, self.seed, self.config = num_rows, seed, config
        self.skipped = 0
        """Prompts that were left out so far."""
        self._pass = self._place = 0
        self._order: list[int] = []
        # ---- By prompt ----
        self._without: dict[int, int] = {}  # visits in a row without an advantage
        self._rests_until: dict[int, int] = {}  # the first pass that draws it again
        self._passed: dict[int, tuple[float, float]] = {}  # sum of rewards, samples; older ones count less

    def start(self, number: int) -> None:
        """Start a pass, unless one has begun: a run that is resumed without a memory goes on at its epoch."""
        if not self._order:
            self._start_pass(number)

    def draw(self, count: int, without: Collection[int] = ()) -> list[int]:
        """Return the next `count` different prompts, of the passes from the present one on.

        Args:
            count: how many.
            without: prompts that the step has drawn already, none of which comes again.
        """
        if count > self.num_rows - len(without):
            raise ValueError(f"count must be at most {self.num_rows - len(without)}, got {count}")
        drawn: dict[int, None] = {}
        in_vain = 0  # prompts in a row that were left out
        self.start(0)
        while len(drawn) < count:
            if self._place == self.num_rows:
                self._start_pass(self._pass + 1)
            index = self._order[self._place]
            self._place += 1
            if index in drawn or index in without:
                continue
            # After a whole pass of prompts that rest, the next ones are taken all the same.
            if in_vain < self.num_rows and self._is_left_out(index):
                self.skipped += 1
                in_vain += 1
                continue
            drawn[index] = None
            in_vain = 0
        return list(drawn)

    def observe(self, index: int, informative: bool, pass_rate: float, num_samples: int) -> None:
        """Remember a visit.

        Args:
            index: of the prompt.
            informative: whether one of its samples has an advantage.
            pass_rate: mean reward of its samples.
            num_samples: how many there are.
        """
        visits = self.config.skip_uninformative
        if visits is not None:
            self._without[index] = 0 if informative else self._without.get(index, 0) + 1
            if self._without[index] >= visits:
                self._rests_until[index] = self._pass + 1 + visits
        if self.config.curriculum is not None:
            if not 0 <= pass_rate <= 1:
                raise UserError(
                    f"{SELECTION}.curriculum needs rewards from 0 to 1, which are the rate at which a prompt passes;"
                    f" got a mean of {pass_rate:g}; set it to null, or scale the reward"
                )
            passed, samples = self._passed.get(index, (0.0, 0.0))
            self._passed[index] = DECAY * passed + num_samples * pass_rate, DECAY * samples + num_samples

    def num_resting(self) -> int:
        """Return how many prompts the present pass leaves out because they rest."""
        return sum(until > self._pass for until in self._rests_until.values())

    def _is_left_out(self, index: int) -> bool:
        if self._rests_until.get(index, 0) > self._pass:
            return True
        if self.config.curriculum is None or index not in self._passed:
            return False
        passed, samples = self._passed[index]
        rate = (passed + 1) / (samples + 2)  # of a uniform prior, so that one visit decides on nothing
        probability = max(self.config.curriculum, 4 * rate * (1 - rate))
        # Of pass and prompt alone: a resumed run and every rank decide alike.
        return random.Random(f"curriculum/{self.seed}/{self._pass}/{index}").random() >= probability

    def _start_pass(self, number: int) -> None:
        self._pass, self._place = number, 0
        self._order = list(range(self.num_rows))
        random.Random(f"{self.seed}/{number}").shuffle(self._order)  # as `MicroBatchSampler` does in that epoch

    # ---- Checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """Return position and memory as tensors and numbers, the same for any number of ranks."""

        def table(values: dict[int, int]) -> torch.Tensor:
            return torch.tensor(sorted(values.items()), dtype=torch.long).view(-1, 2)

        passed = sorted(self._passed.items())
        return {
            "pass": self._pass,
            "place": self._place,
            "has_begun": bool(self._order),
            "skipped": self.skipped,
            "without": table(self._without),
            "rests_until": table(self._rests_until),
            "prompts": torch.tensor([index for index, _ in passed], dtype=torch.long),
            "passed": torch.tensor([values for _, values in passed], dtype=torch.float64).view(-1, 2),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore position and memory."""
        if state["has_begun"]:
            self._start_pass(state["pass"])
        self._place, self.skipped = state["place"], state["skipped"]
        self._without = dict(state["without"].tolist())
        self._rests_until = dict(state["rests_until"].tolist())
        pairs = zip(state["prompts"].tolist(), state["passed"].tolist(), strict=True)
        self._passed = {index: (passed, samples) for index, (passed, samples) in pairs}


class SelectingSampler(MicroBatchSampler):
    """Yields the prompts of a `PromptStream` as `MicroBatchSampler` yields rows: a rollout batch per step and rank.

    An epoch has as many batches as without selection. Prompts that a rollout leaves out come in a later pass.

    Args:
        stream: draws the prompts of all ranks.
        batch_size: prompts per rollout batch and rank.
        num_micro_batches: how often each batch is yielded.
        seed: of the stream.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        stream: PromptStream,
        batch_size: int,
        *,
        num_micro_batches: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(
            stream.num_rows,
            batch_size,
            num_micro_batches=num_micro_batches,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        self.stream = stream
        self._of_step: set[int] = set()  # prompts of all ranks that the present step has drawn

    def __iter__(self) -> Iterator[Key]:
        return _StreamIterator(self)

    def draw(self, *, starts_step: bool) -> list[int]:
        """Return the rows of the next rollout batch of all ranks; rank `r` of `W` takes every `W`-th of them.

        Args:
            starts_step: whether it is the first one of a step; later ones repeat no row of those before.
        """
        if starts_step:
            self._of_step.clear()
        rows = self.stream.draw(self.batch_size * self.num_replicas, self._of_step)
        self._of_step.update(rows)
        return rows

    def mine(self, rows: Sequence[int]) -> list[int]:
        """Return the rows of this rank among those of all."""
        return list(rows[self.rank :: self.num_replicas])

    def signature(self) -> dict[str, int | bool]:
        """Return what fixes the order besides what was observed."""
        return super().signature() | {"selection": True}


class _StreamIterator(SamplerIterator):
    """A place in an epoch whose rollout batches are drawn when their first key is asked for."""

    sampler: SelectingSampler

    def __init__(self, sampler: SelectingSampler) -> None:
        super().__init__(sampler)
        self._batch = -1
        self._rows: list[int] = []  # of rollout batch `_batch`, of all ranks

    def _index(self, batch: int, offset: int) -> int:
        if batch != self._batch:
            self._batch, self._rows = batch, self.sampler.draw(starts_step=True)
        return self._rows[self.sampler.rank + offset * self.sampler.num_replicas]

    def _start_epoch(self, epoch: int) -> None:
        super()._start_epoch(epoch)
        self.sampler.stream.start(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return place, stream, and the batch that is being yielded."""
        stream = self.sampler.stream.state_dict()
        return super().state_dict() | {"stream": stream, "batch": self._batch, "rows": list(self._rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the place, and the stream if the saved run had one, of as many rows: others are other prompts."""
        if "stream" in state and state["signature"]["rows"] == self.sampler.num_rows:
            self.sampler.stream.load_state_dict(state["stream"])
        super().load_state_dict(state)
        # The batch that is being yielded; at the start of one there is nothing to keep.
        is_inside = self.yielded % (self.sampler.batch_size * self.sampler.num_micro_batches)
        self._batch, self._rows = (state["batch"], list(state["rows"])) if is_inside else (-1, [])
