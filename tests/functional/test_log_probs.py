from __future__ import annotations

import math

import pytest
import torch
from oracles import estimates

from remax_lightning.functional import token_statistics


def make(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(3, 5, 11, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, 11, (3, 5), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_statistics_are_those_of_the_oracle(temperature: float) -> None:
    logits, ids = make()
    log_probs, entropy = token_statistics(logits, ids, temperature)
    for i in range(3):
        for t in range(5):
            row = logits[i, t].tolist()
            expected = estimates.log_softmax(row, temperature)[ids[i, t]]
            assert log_probs[i, t].item() == pytest.approx(expected, rel=1e-12)
            assert entropy[i, t].item() == pytest.approx(estimates.entropy(row, temperature), rel=1e-12)


def test_tokens_that_cannot_come_have_no_entropy() -> None:
    logits = torch.full((1, 1, 4), float("-inf"))
    logits[..., :2] = 0.0
    log_probs, entropy = token_statistics(logits, torch.zeros(1, 1, dtype=torch.int32))
    assert entropy.item() == pytest.approx(math.log(2))
    assert log_probs.item() == pytest.approx(-math.log(2))


def test_entropy_is_detached_and_log_probs_have_the_numerical_gradient() -> None:
    logits, ids = make()
    logits.requires_grad_()
    log_probs, entropy = token_statistics(logits, ids)
    assert log_probs.requires_grad
    assert not entropy.requires_grad
    assert torch.autograd.gradcheck(lambda x: token_statistics(x, ids, 0.7).log_probs, logits)


def test_the_graph_holds_one_tensor_of_the_logits_size() -> None:
    logits, ids = make(torch.float32)
    logits.requires_grad_()
    kept: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == logits.shape:
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_statistics(logits, ids, 0.7)
    assert len(kept) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, ids = make(dtype)
    half, single = token_statistics(logits, ids), token_statistics(logits.float(), ids)
    assert half.log_probs.dtype == half.entropy.dtype == torch.float32
    assert torch.equal(half.log_probs, single.log_probs)
    assert torch.equal(half.entropy, single.entropy)


def test_wrong_arguments_are_refused() -> None:
    logits, ids = make()
    with pytest.raises(ValueError, match=r"logits must have shape \[S, R, V\] = \[any, any, any\], got \[5, 11\]"):
        token_statistics(logits[0], ids)
    with pytest.raises(ValueError, match=r"ids must have shape \[S, R\] = \[3, 5\], got \[3, 4\]"):
        token_statistics(logits, ids[:, :4])
    with pytest.raises(ValueError, match=r"temperature must be above 0, got 0"):
        token_statistics(logits, ids, 0.0)
