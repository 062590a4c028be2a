"""What is asked about sharded models, on one process: marks stand in for engines. Two ranks: distributed/."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from remax_lightning.sharding import (
    full_numel,
    full_shape,
    gathered,
    is_sharded,
    is_zero3_sharded,
    local_shard,
    nonfinite_name,
    unwrap_peft,
)


def zero3_linear() -> Any:
    """A layer whose weight bears the marks of ZeRO-3: an empty shard of 2 x 3 numbers."""
    layer: Any = nn.Linear(3, 2)
    layer.weight.data = torch.empty(0)
    layer.weight.ds_id, layer.weight.ds_shape, layer.weight.ds_numel = 0, torch.Size([2, 3]), 6
    return layer


def test_a_plain_model_is_not_sharded() -> None:
    layer = nn.Linear(3, 2)
    assert not is_sharded(layer)
    assert not is_sharded(layer.weight)
    assert (full_shape(layer.weight), full_numel(layer.weight)) == (layer.weight.shape, 6)


def test_the_marks_of_zero3_are_read() -> None:
    layer = zero3_linear()
    assert is_sharded(layer)
    assert is_zero3_sharded(layer.weight)
    assert not is_zero3_sharded(layer.bias)
    assert (full_shape(layer.weight), full_numel(layer.weight)) == ((2, 3), 6)


@pytest.mark.parametrize(("rank", "held"), [(0, [0.0, 1.0]), (1, [2.0, 3.0]), (2, [4.0]), (3, [])])
def test_padding_is_no_part_of_a_shard(rank: int, held: list[float]) -> None:
    """Five numbers on four ranks: two each, of which the last three places are nobody's."""
    weight: Any = nn.Parameter(torch.empty(0))
    weight.ds_id, weight.ds_numel, weight.ds_zero_partition_rank = 0, 5, rank
    weight.ds_tensor = torch.tensor([*held, torch.nan, torch.nan][:2])
    weight.ds_tensor.ds_numel = 2
    assert local_shard(weight).tolist() == held
    assert nonfinite_name([("weight", weight)]) is None


def test_full_parameters_need_no_engine_to_be_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)  # an import would fail
    layer = nn.Linear(3, 2)
    with gathered([layer.weight], writer_rank=0):
        assert layer.weight.numel() == 6
    with pytest.raises(ImportError), gathered(zero3_linear().parameters()):
        pass


def test_only_a_wrapper_is_unwrapped() -> None:
    inner = nn.Linear(3, 2)
    wrapper = nn.Module()
    wrapper.get_base_model = lambda: inner  # type: ignore[assignment]
    assert unwrap_peft(wrapper) is inner
    assert unwrap_peft(inner) is inner
