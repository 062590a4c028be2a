"""The cache with room for the response holds what transformers' own cache holds."""

from __future__ import annotations

import torch
from conftest import tiny_model
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

from remax_lightning.rollout.kv_slots import repeat_into_slots

ROWS = torch.tensor([0, 0, 1, 1, 2, 0, 1, 2])


def filled(model: torch.nn.Module, length: int = 6) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(5, 5 + 3 * length).view(3, length), past_key_values=cache, use_cache=True)
    return cache


def test_decoding_on_slots_gives_the_logits_of_a_growing_cache() -> None:
    model = tiny_model("llama")
    own, other = filled(model), filled(model)
    repeat_into_slots(own, ROWS, room=4)
    other.batch_select_indices(ROWS)
    kept = torch.tensor([1, 4, 6])
    with torch.no_grad():
        for step in range(4):
            tokens = torch.arange(len(ROWS) if step < 2 else len(kept))[:, None] + 10
            logits = [model(tokens, past_key_values=cache, use_cache=True).logits for cache in (own, other)]
            torch.testing.assert_close(logits[0], logits[1])
            assert own.get_seq_length() == other.get_seq_length() == 7 + step
            if step == 1:
                own.batch_select_indices(kept)
                other.batch_select_indices(kept)


def test_a_step_writes_into_the_room_that_was_made() -> None:
    model = tiny_model("llama")
    cache = filled(model)
    repeat_into_slots(cache, ROWS, room=2)
    place = cache.layers[0].keys.data_ptr()
    with torch.no_grad():
        for _ in range(2):
            model(torch.ones(len(ROWS), 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.data_ptr() == place
    assert cache.layers[0].keys.shape[-2] == 8


def test_sliding_windows_keep_their_own_layers() -> None:
    config = Gemma2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64, vocab_size=64, sliding_window=4,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    cache = filled(model)
    kinds = [type(layer).__name__ for layer in cache.layers]
    repeat_into_slots(cache, ROWS, room=2)
    assert "DynamicSlidingWindowLayer" in kinds
    for before, layer in zip(kinds, cache.layers, strict=True):
        assert type(layer).__name__ == ("SlotLayer" if before == "DynamicLayer" else before)
        assert layer.keys.shape[0] == len(ROWS)
