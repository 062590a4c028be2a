"""A cache of slots holds what transformers' own cache holds, at every length that is attended to."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

from remax_lightning.rollout.decode_attention import layout_of
from remax_lightning.rollout.static_cache import DecodeBuffers, bucketed_length, cache_of_slots

ROWS = torch.tensor([0, 0, 1, 1, 2, 0, 1, 2])
PROMPT = 29


def gemma() -> torch.nn.Module:
    config = Gemma2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64, vocab_size=256, sliding_window=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config).eval()


def filled(model: torch.nn.Module) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(5, 5 + 3 * PROMPT).view(3, PROMPT), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("make", [lambda: tiny_model("llama", vocab_size=256), gemma], ids=["llama", "sliding window"])
def test_decoding_on_slots_gives_the_logits_of_a_growing_cache(make) -> None:
    """Across a change of the attended length, with rows leaving in the middle."""
    model = make()
    ours, other = filled(model), filled(model)
    layout = layout_of(ours)
    buffers = DecodeBuffers.create(ours, len(ROWS), bucketed_length(PROMPT + 12))
    buffers.fill(ours, torch.ones(3, PROMPT, dtype=torch.bool), ROWS)
    other.batch_select_indices(ROWS)
    rows, count, lengths = torch.tensor([1, 4, 6]), len(ROWS), set()
    with torch.no_grad():
        for step in range(12):
            tokens = torch.arange(count)[:, None] + 10 * step
            position, length = PROMPT + step, bucketed_length(PROMPT + step + 1)
            lengths.add(length)
            cache = cache_of_slots(layout, [slot[:count] for slot in buffers.states], torch.tensor([position]), length)
            mask = (torch.arange(length) <= position).long().expand(count, -1)
            place = torch.full((count, 1), position)
            got = model(tokens, attention_mask=mask, position_ids=place, past_key_values=cache).logits
            torch.testing.assert_close(got, model(tokens, past_key_values=other).logits, atol=1e-5, rtol=1e-4)
            if step == 5:
                buffers.keep_rows(rows, position + 1)
                other.batch_select_indices(rows)
                count = len(rows)
    assert lengths == {32, 48}


def test_a_step_writes_into_the_memory_that_was_made() -> None:
    model = tiny_model("llama", vocab_size=256)
    cache = filled(model)
    buffers = DecodeBuffers.create(cache, 3, 32)
    buffers.fill(cache, torch.ones(3, PROMPT, dtype=torch.bool), torch.arange(3))
    slots = buffers.states
    before = [slot.clone() for slot in slots]
    ours = cache_of_slots(layout_of(cache), slots, torch.tensor([30]), 32)
    with torch.no_grad():
        model(torch.ones(3, 1, dtype=torch.long), attention_mask=torch.ones(3, 32).long(), past_key_values=ours)
    for slot, old in zip(slots, before, strict=True):
        changed = (slot != old).any(-1).any(0).any(0)
        assert changed.nonzero().flatten().tolist() == [30]


@pytest.mark.parametrize("filled", [1, 31, 32, 33, 64, 65, 250, 257, 300, 512, 513, 1000, 1025, 4000])
def test_attended_lengths_are_few_and_waste_little(filled: int) -> None:
    length = bucketed_length(filled)
    assert filled <= length <= max(filled + 15, 1.125 * filled)
    assert bucketed_length(length) == length
    assert len({bucketed_length(n) for n in range(1, filled + 1)}) <= 16 + 8 * max(0, filled.bit_length() - 8)


def test_a_cache_with_other_states_has_no_layout() -> None:
    from transformers import Lfm2Config

    config = Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2, hidden_size=32, vocab_size=64)
    assert layout_of(DynamicCache(config=config)) is None
    assert layout_of(filled(gemma())) == (4, None)
    assert layout_of(filled(tiny_model("llama", vocab_size=256))) == (None, None)
