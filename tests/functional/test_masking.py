from __future__ import annotations

import pytest
import torch
from oracles import estimates

from remax_lightning.functional import masked_mean, masked_sum, response_mask


@pytest.mark.parametrize("eos_ids", [[2], [2, 5], [0], []])
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (64, 9)])
def test_mask_is_that_of_the_oracle(shape: tuple[int, int], eos_ids: list[int]) -> None:
    ids = torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(0))
    assert response_mask(ids, eos_ids).tolist() == estimates.response_mask(ids.tolist(), eos_ids)


def test_eos_counts_once_when_it_is_the_padding() -> None:
    ids = torch.tensor([[4, 2, 2, 2], [2, 2, 2, 2], [4, 5, 6, 2], [4, 5, 6, 7]])
    assert response_mask(ids, [2]).sum(dim=1).tolist() == [2, 1, 4, 4]


def test_the_first_of_several_eos_ends() -> None:
    ids = torch.tensor([[4, 9, 2, 4], [2, 9, 4, 4]])
    assert response_mask(ids, [2, 9]).tolist() == [[True, True, False, False], [True, False, False, False]]


def test_mask_refuses_one_dimension() -> None:
    with pytest.raises(ValueError, match=r"response_ids must have shape \[M, R\] = \[any, any\], got \[3\]"):
        response_mask(torch.zeros(3, dtype=torch.long), [2])


def test_masked_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 40.0], [50.0, 60.0, 70.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(values, mask).item() == 1.5
    assert masked_mean(values, mask, dim=1).tolist() == [1.5, 0.0]
    assert masked_mean(values, mask, dim=0).tolist() == [1.0, 2.0, 0.0]
    assert masked_mean(values, mask, normalizer=6.0).item() == 0.5
    assert masked_mean(values, mask, normalizer=torch.tensor([3, 1]), dim=1).tolist() == [1.0, 0.0]
    assert masked_sum(values, mask).item() == 3.0


@pytest.mark.parametrize("normalizer", [None, 0.0, torch.tensor(0)])
def test_masked_mean_of_nothing_is_zero(normalizer: float | torch.Tensor | None) -> None:
    values = torch.full((2, 3), float("nan"), requires_grad=True)
    mean = masked_mean(values, torch.zeros(2, 3, dtype=torch.bool), normalizer)
    mean.backward()
    assert mean.item() == 0.0
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0] * 3] * 2


def test_what_is_masked_reaches_neither_mean_nor_gradient() -> None:
    values = torch.tensor([1.0, float("inf"), 3.0, float("nan")], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, False, True, False]))
    mean.backward()
    assert mean.item() == 2.0
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0, 0.5, 0.0]


def test_half_precision_is_summed_in_float32() -> None:
    # 4096 ones and a tail of small numbers: bfloat16 would stop counting at 256.
    values = torch.ones(4096, dtype=torch.bfloat16)
    mean = masked_mean(values, torch.ones(4096, dtype=torch.bool), normalizer=1.0)
    assert mean.dtype == torch.float32
    assert mean.item() == 4096.0
    assert masked_mean(values.double(), torch.ones(4096, dtype=torch.bool)).dtype == torch.float64


def test_masked_mean_refuses_other_shapes_and_integer_masks() -> None:
    with pytest.raises(ValueError, match=r"mask must have shape values.shape = \[2, 3\], got \[2, 1\]"):
        masked_mean(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be of dtype torch.bool, got torch.int64"):
        masked_mean(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.long))
