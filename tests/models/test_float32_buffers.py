"""What a cast must not round."""

from __future__ import annotations

import torch
from conftest import tiny_model

from remax_lightning.models.loading import Float32Buffers


def test_rotary_frequencies_survive_a_cast() -> None:
    model = tiny_model("llama")
    frequencies = model.model.rotary_emb.inv_freq.clone()
    constants = Float32Buffers(model)
    model.to(torch.bfloat16)
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), frequencies)
    constants.restore()
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_what_was_not_cast_stays_as_it_is() -> None:
    model = tiny_model("llama")
    constants, now = Float32Buffers(model), model.model.rotary_emb.inv_freq
    constants.restore()
    assert model.model.rotary_emb.inv_freq is now
