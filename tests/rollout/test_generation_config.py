"""What a model's own settings would have added is named, and nothing else."""

from __future__ import annotations

import pytest
from conftest import tiny_model

from remax_lightning.models.sampling import ignored_settings, log_ignored_settings
from remax_lightning.rollout import SamplingConfig


def test_the_implicit_top_k_of_transformers_is_named() -> None:
    assert ignored_settings(tiny_model("llama"), SamplingConfig()) == {"top_k": 50}
    assert ignored_settings(tiny_model("llama"), SamplingConfig(top_k=50)) == {}


def test_it_is_what_generate_really_adds() -> None:
    """Fails when transformers samples from another number of tokens by default."""
    model = tiny_model("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    import torch

    made = model.generate(
        torch.tensor([[5, 6]]), do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True
    )
    assert made.scores[0].isfinite().sum() == 50


def test_published_settings_are_named_with_their_values(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    model.generation_config.update(top_k=20, top_p=0.8, repetition_penalty=1.05, temperature=0.7)
    sampling = SamplingConfig(temperature=0.7, top_p=0.8)
    assert ignored_settings(model, sampling) == {"top_k": 20, "repetition_penalty": 1.05}
    with caplog.at_level("INFO"):
        log_ignored_settings(model, sampling)
    assert "model.generate would also have taken top_k 20, repetition_penalty 1.05" in caplog.text


def test_nothing_is_said_where_nothing_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    model.generation_config.top_k = 0
    with caplog.at_level("INFO"):
        log_ignored_settings(model, SamplingConfig())
    assert caplog.text == ""
