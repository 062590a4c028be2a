"""The shaping of the distribution against transformers' own warpers, and the draw against its probabilities."""

from __future__ import annotations

import pytest
import torch

from remax_lightning.errors import UserError
from remax_lightning.rollout import SamplingConfig
from remax_lightning.rollout.sampling import draw, next_tokens, shape_logits


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 1000},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.8},
    ],
)
def test_shape_logits_equals_transformers_warpers(options: dict[str, float]) -> None:
    from transformers.generation import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = 3 * torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    expected = logits
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    for name, warper in warpers.items():
        if name in options:
            expected = warper(options[name])(torch.zeros(16, 1, dtype=torch.long), expected)
    got = shape_logits(logits, SamplingConfig(**options))  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected)


def test_nothing_is_truncated_by_default() -> None:
    logits = torch.randn(4, 200)
    assert torch.equal(shape_logits(logits, SamplingConfig()), logits)
    assert not SamplingConfig().truncates


def test_draw_never_takes_a_dropped_token() -> None:
    logits = torch.full((20_000, 8), -torch.inf)
    logits[:, 2], logits[:, 5] = 0.0, 1.0
    tokens = draw(logits, torch.Generator().manual_seed(0))
    assert set(tokens.tolist()) == {2, 5}
    share = (tokens == 5).double().mean().item()
    assert abs(share - torch.tensor([0.0, 1.0]).softmax(0)[1].item()) < 0.01


def test_greedy_rows_draw_nothing() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    is_greedy = torch.tensor([False, True, False, True, True, False])
    tokens = next_tokens(logits, is_greedy, SamplingConfig(), torch.Generator().manual_seed(3))
    assert torch.equal(tokens[is_greedy], logits[is_greedy].argmax(-1))
    assert torch.equal(tokens[~is_greedy], draw(logits[~is_greedy], torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_response_length", 0),
        ("min_response_length", 999),
        ("num_samples", 0),
        ("temperature", 0.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 1.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model\.sampling\.{name} must be .*, got {value}"):
        SamplingConfig(**{name: value})  # type: ignore[arg-type]
