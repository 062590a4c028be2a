from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from remax_lightning.functional import whiten_advantages


class Ranks:
    """Sums over threads, as an all-reduce sums over ranks."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.given: list[Tensor] = [torch.empty(0)] * size

    def reduce(self, rank: int) -> Callable[[Tensor], Tensor]:
        def add(values: Tensor) -> Tensor:
            self.given[rank] = values
            self.barrier.wait()
            total = torch.stack(self.given).sum(dim=0)
            self.barrier.wait()
            return total

        return add


def test_whitening_is_global_over_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 9, generator=generator) < 0.6
    mask[4:] = False  # the last rank has no token, and must reduce all the same
    ranks, parts = Ranks(3), [Tensor()] * 3

    def work(rank: int) -> None:
        rows = slice(2 * rank, 2 * rank + 2)
        parts[rank] = whiten_advantages(advantages[rows], mask[rows], ranks.reduce(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat(parts), whiten_advantages(advantages, mask))


def test_whitening_is_stable_far_from_zero() -> None:
    # The squares of these numbers differ in no digit of float32.
    values = 1e4 + torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(50, 40, dtype=torch.bool)
    white = whiten_advantages(values, mask)
    assert white.dtype == torch.float32
    assert white.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert white.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("spread", "expected"), [(1e-2, 1.0), (1e-6, 1e-2)])
def test_whitening_does_not_blow_up_noise(spread: float, expected: float) -> None:
    # The variance counts as 1e-8 at least, so what differs by less than 1e-4 stays below 1.
    white = whiten_advantages(torch.tensor([[spread, -spread]]), torch.ones(1, 2, dtype=torch.bool))
    assert white.tolist() == [pytest.approx([expected, -expected])]


@pytest.mark.parametrize("counted", [True, False])
def test_whitening_equal_or_no_tokens_gives_zero(counted: bool) -> None:
    mask = torch.full((2, 3), counted)
    assert whiten_advantages(torch.full((2, 3), 7.0), mask).tolist() == [[0.0] * 3] * 2
