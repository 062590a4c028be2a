from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_config
from helpers.reward_models import encoder_config
from torch import nn
from torch.nn import functional as F

from remax_lightning.rewards.pooling import ScoreHead, score_head, score_head_name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_weights_score_in_float32(bias: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    head = ScoreHead(64, 1, bias=bias).bfloat16()
    hidden = torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        scores = head(hidden)
    expected = F.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)
    assert not torch.equal(scores, F.linear(hidden, head.weight, head.bias).float())


def test_scores_are_normalized_and_float64_stays() -> None:
    head = ScoreHead(4, 1).double()
    hidden = torch.randn(3, 4, dtype=torch.float64)
    plain = head(hidden)
    head.mean, head.std = 0.5, 4.0
    assert head(hidden).dtype == torch.float64
    torch.testing.assert_close(head(hidden), (plain - 0.5) / 4)
    assert set(head.state_dict()) == {"weight", "bias"}


def classifier(config: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config)


def test_the_head_is_the_layer_with_one_output_outside_of_the_body() -> None:
    from transformers import Qwen2MoeConfig

    assert score_head_name(classifier(tiny_config("llama"))) == "score"
    assert score_head_name(classifier(encoder_config("bert"))) == "classifier"
    assert score_head_name(classifier(encoder_config("roberta"))) == "classifier.out_proj"
    # Its layers have gates with one output, too.
    moe = Qwen2MoeConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_experts=2,
                         num_key_value_heads=2, intermediate_size=32, moe_intermediate_size=16,
                         shared_expert_intermediate_size=16)  # fmt: skip
    model = classifier(moe)
    assert any(isinstance(module, nn.Linear) and module.out_features == 1 for module in model.model.modules())
    assert score_head_name(model) == "score"


def test_it_is_turned_into_one_in_place() -> None:
    model = classifier(tiny_config("llama"))
    weight = model.score.weight
    head = score_head(model)
    assert isinstance(head, ScoreHead)
    assert head is model.score
    assert head.weight is weight
    assert score_head(model) is head


def test_there_may_be_none() -> None:
    config = tiny_config("llama")
    config.num_labels = 3
    from transformers import AutoModelForSequenceClassification

    assert score_head(AutoModelForSequenceClassification.from_config(config)) is None
