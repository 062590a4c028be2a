"""The shaping of the distribution against transformers' own warpers, and the draw against its probabilities."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from remax_lightning.errors import UserError
from remax_lightning.models import sampling as sampling_module
from remax_lightning.models.sampling import (
    NO_TOKENS,
    SuppressedTokens,
    gather_log_probs,
    make_sampling_mask,
    next_tokens,
    sample_exponential_race,
    sample_inverse_cdf,
    truncated_logits,
)
from remax_lightning.rollout import SamplingConfig

WAYS = pytest.mark.parametrize("way", [sample_inverse_cdf, sample_exponential_race], ids=["inversion", "race"])


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
def test_truncated_logits_are_those_of_transformers_warpers(options: dict[str, float]) -> None:
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
    sampling = SamplingConfig(**options)  # type: ignore[arg-type]
    got = truncated_logits(logits, sampling)
    torch.testing.assert_close(got, expected)


WAYS_OF_TOP_P = pytest.mark.parametrize("way", [sampling_module._top_p_of_likeliest, sampling_module._top_p_by_digits])


def some_logits() -> dict[str, torch.Tensor]:
    """Rows of 1,000 tokens: those of a CPU's first look are enough for some of them, and not for others."""
    normal = torch.randn(12, 1000, generator=torch.Generator().manual_seed(0))
    return {
        "flat": normal,
        "peaked": 6 * normal,
        "both": normal * torch.tensor([[0.1], [8.0]]).repeat(6, 1),
        "of few values": (2 * normal).round(),
        "of 16 bits": (2 * normal).bfloat16().float(),
        "both zeros": torch.where(normal > 0, 0.0, torch.where(normal > -1, -0.0, normal)),
        "with suppressed tokens": normal.masked_fill(normal.roll(1, -1) > -1, -torch.inf),
        "negative": normal - 60,
        "of few tokens": 2 * normal[:, :30],
    }


@WAYS_OF_TOP_P
@pytest.mark.parametrize("top_p", [0.03, 0.517, 0.9, 0.993])
def test_top_p_keeps_what_a_sorted_vocabulary_says(way: Any, top_p: float) -> None:
    """In float64, by a stable sort: of tokens with one logit the first ones are kept."""
    for name, logits in some_logits().items():
        in_order, order = logits.double().sort(dim=-1, descending=True, stable=True)
        probs = in_order.softmax(-1)
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, probs.cumsum(-1) - probs < top_p)
        found = way(logits, top_p)
        assert torch.equal(found > -torch.inf, kept & (logits > -torch.inf)), name
        assert torch.equal(found[found > -torch.inf], logits[found > -torch.inf]), name


@WAYS_OF_TOP_P
def test_top_p_is_transformers_own_but_for_the_order_of_equal_tokens(way: Any) -> None:
    from transformers.generation import TopPLogitsWarper

    for name, logits in some_logits().items():
        for top_p in (0.517, 0.9):
            expected = TopPLogitsWarper(top_p)(torch.zeros(len(logits), 1, dtype=torch.long), logits)
            found = way(logits, top_p)
            if name in ("flat", "peaked", "both", "of few tokens"):  # whose tokens all differ
                assert torch.equal(found, expected)
            assert torch.equal(found.sort(-1).values, expected.sort(-1).values), name


@WAYS_OF_TOP_P
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_top_p_of_a_bad_row_leaves_the_others_alone(way: Any, value: float) -> None:
    logits = some_logits()["peaked"]
    spoiled = logits.clone()
    spoiled[3, 7] = value
    found, expected = way(spoiled, 0.9), way(logits, 0.9)
    others = torch.arange(len(logits)) != 3
    assert torch.equal(found[others], expected[others])
    assert not bool(found[3].softmax(-1).isfinite().all())


def test_nothing_is_truncated_by_default() -> None:
    logits = torch.randn(4, 200)
    assert torch.equal(truncated_logits(logits, SamplingConfig()), logits)
    assert not SamplingConfig().truncates


@WAYS
def test_draw_never_takes_a_dropped_token(way: Any) -> None:
    logits = torch.full((20_000, 8), -torch.inf)
    logits[:, 2], logits[:, 5] = 0.0, 1.0
    tokens = way(logits, torch.Generator().manual_seed(0))
    assert set(tokens.tolist()) == {2, 5}
    share = (tokens == 5).double().mean().item()
    assert abs(share - torch.tensor([0.0, 1.0]).softmax(0)[1].item()) < 0.01


@pytest.mark.slow
@WAYS
@pytest.mark.parametrize("vocabulary", [2, 5, 64, 100, 1000])
def test_draws_follow_the_distribution_whatever_the_vocabulary(vocabulary: int, way: Any) -> None:
    """Blocks of the vocabulary are of several sizes, and the last of them is not full."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)).double()
    logits[vocabulary // 3] = -torch.inf
    draws = 60_000
    tokens = way(logits.float().expand(draws, -1), torch.Generator().manual_seed(0))
    expected = draws * logits.softmax(-1)
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    assert counts.shape == expected.shape
    assert counts[vocabulary // 3] == 0
    likely = expected > 5
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum().item()
    assert chi_square < vocabulary + 4 * (2 * vocabulary) ** 0.5


def test_draws_invert_the_distribution_function() -> None:
    """Against a running sum over the whole vocabulary in float64."""
    logits = 4 * torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    tokens = sample_inverse_cdf(logits, torch.Generator().manual_seed(7))
    uniform = torch.rand(500, 1, generator=torch.Generator().manual_seed(7)).double()
    cumulative = logits.double().softmax(-1).cumsum(-1)
    at = torch.arange(500)
    after = cumulative[at, tokens]
    before = torch.where(tokens > 0, cumulative[at, tokens - 1], 0.0)
    assert (before - 1e-5 <= uniform[:, 0]).all()
    assert (uniform[:, 0] <= after + 1e-5).all()


def test_a_race_is_won_by_the_first_clock_to_ring() -> None:
    """Against times of rates in float64, from the same random numbers."""
    logits = 4 * torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    tokens = sample_exponential_race(logits, torch.Generator().manual_seed(7))
    clocks = torch.empty(500, 300).exponential_(generator=torch.Generator().manual_seed(7)).double()
    times = clocks / logits.double().softmax(-1)
    assert torch.equal(times.argmin(-1), tokens)


def test_greedy_rows_draw_nothing() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    tokens = next_tokens(logits, 4, SamplingConfig(), torch.Generator().manual_seed(3))
    assert torch.equal(tokens[4:], logits[4:].argmax(-1))
    assert torch.equal(tokens[:4], sample_inverse_cdf(logits[:4], torch.Generator().manual_seed(3)))


def test_the_likeliest_of_equal_tokens_is_the_first() -> None:
    logits = torch.randint(0, 3, (64, 50), generator=torch.Generator().manual_seed(0)).float()
    first = [row.index(max(row)) for row in logits.tolist()]
    assert next_tokens(logits, 0, SamplingConfig(), torch.Generator()).tolist() == first


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("truncated", [True, False])
def test_log_probs_are_of_the_distribution_that_was_asked_for(scale: bool, truncated: bool) -> None:
    """Against a loop in float64 over the tokens that sampling may draw."""
    sampling = SamplingConfig(temperature=0.6, top_k=6, top_p=0.8, scale_log_probs=scale, processed_log_probs=truncated)
    logits = 2 * torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    allowed = truncated_logits(logits, sampling, temperature=0.6) > -torch.inf
    tokens = sample_inverse_cdf(truncated_logits(logits, sampling, temperature=0.6), torch.Generator().manual_seed(1))
    got = gather_log_probs(logits, tokens, sampling)
    for row, token in enumerate(tokens.tolist()):
        values = [(value / 0.6 if scale else value) for value in logits[row].double().tolist()]
        counted = [math.exp(v) for v, may in zip(values, allowed[row].tolist(), strict=True) if may or not truncated]
        assert got[row].item() == pytest.approx(values[token] - math.log(sum(counted)), abs=1e-5)
    assert allowed.float().mean() < 0.6


def test_tokens_are_kept_by_the_sampling_temperature_whatever_that_of_the_log_probs() -> None:
    logits = 2 * torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    masks = {}
    for scale in (True, False):
        sampling = SamplingConfig(temperature=0.5, top_p=0.7, scale_log_probs=scale, processed_log_probs=True)
        mask = make_sampling_mask(sampling, NO_TOKENS, torch.arange(30))
        masks[scale] = mask(logits / 0.5 if scale else logits, slice(None))
    assert torch.equal(masks[True], masks[False])
    assert make_sampling_mask(SamplingConfig(top_p=0.7), NO_TOKENS, torch.arange(30)) is None


def test_suppressed_tokens_leave_the_distribution_where_they_cannot_be_drawn() -> None:
    """Ids 10 and 11 have no token; 2 and 5 end a response, from its third token on. Truncation sees what is left."""
    suppressed = SuppressedTokens((10, 11), (2, 5), 2)
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    logits[:, 10] = 9.0
    logits[:, 2] = 8.0
    positions = torch.tensor([0, 2, 1, 3])
    everything = make_sampling_mask(SamplingConfig(), suppressed, positions)(logits, slice(None))
    may_end = [False, True, False, True]
    for row, ends in enumerate(may_end):
        left_out = {10, 11} | (set() if ends else {2, 5})
        assert {v for v in range(12) if not everything[row, v]} == left_out
    # A part of the positions, as they come in chunks; and top-k 1, whose token is the likeliest of those left.
    top = SamplingConfig(top_k=1, processed_log_probs=True)
    part = make_sampling_mask(top, suppressed, positions)(logits[1:3], slice(1, 3))
    assert part[0].nonzero().flatten().tolist() == [2]
    assert part[1].nonzero().flatten().tolist() == [logits[2].index_fill(0, torch.tensor([2, 5, 10, 11]), -9).argmax()]
    # The reference is compared over the same tokens, but not truncated.
    assert torch.equal(make_sampling_mask(top, suppressed, positions, truncate=False)(logits, slice(None)), everything)


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
        ("stop_strings", ("end", "")),
        ("processed_log_probs", True),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model\.sampling\.{name} must be .*, got {re.escape(str(value))}"):
        SamplingConfig(**{name: value})  # type: ignore[arg-type]
