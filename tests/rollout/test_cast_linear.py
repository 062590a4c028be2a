"""Packed layers compute what plain ones do, from the weights as they are, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import nn

from remax_lightning.rollout import cast_linear as packed
from remax_lightning.rollout.cast_linear import packed_linears


@pytest.fixture(autouse=True, params=[1, 10**9], ids=["onednn", "transposed"])
def _kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_FOR_ONEDNN", request.param)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25)[None].expand(3, -1)).logits


def test_packed_layers_give_the_same_logits_and_the_old_forward_comes_back() -> None:
    model = tiny_model("llama")
    plain = outputs(model)
    with packed_linears(model, 3):
        assert "forward" in vars(model.lm_head)
        torch.testing.assert_close(outputs(model), plain, atol=1e-5, rtol=1e-5)
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(outputs(model), plain)


def test_weights_are_read_anew_each_time() -> None:
    model = tiny_model("llama")
    with packed_linears(model, 3):
        before = outputs(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    with packed_linears(model, 3):
        after = outputs(model)
    torch.testing.assert_close(after, 2 * before, atol=1e-5, rtol=1e-5)


def test_an_exception_inside_restores_the_layers() -> None:
    model = tiny_model("opt")
    with pytest.raises(RuntimeError, match="inside"), packed_linears(model, 3):
        raise RuntimeError("inside")
    assert not any("forward" in vars(module) for module in model.modules())


def test_other_number_formats_subclasses_and_large_models_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(inputs)

    for module in (nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4).double(), Doubled(4, 4)):
        with packed_linears(nn.Sequential(module), 2):
            assert "forward" not in vars(module)
    layer = nn.Linear(4, 4)
    monkeypatch.setattr(packed, "MOST_BYTES", 8)
    with packed_linears(nn.Sequential(layer), 2) as weights:
        assert "forward" not in vars(layer)
        assert weights == []


def test_large_layers_take_the_format_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_FOR_ONEDNN", 20)
    with packed_linears(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)), 2) as weights:
        assert [each.is_onednn for each in weights] == [False, True]


def test_a_bias_is_added_and_leading_dimensions_are_kept() -> None:
    layer = nn.Linear(8, 6)
    inputs = torch.randn(2, 3, 8)
    with torch.no_grad(), packed_linears(nn.Sequential(layer), 6):
        got = layer(inputs)
    torch.testing.assert_close(got, torch.nn.functional.linear(inputs, layer.weight, layer.bias))


def test_mixed_precision_multiplies_with_weights_that_were_cast_before() -> None:
    model = tiny_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = outputs(model)
        with packed_linears(model, 3) as weights:
            assert {each.weight.dtype for each in weights} == {torch.bfloat16}
            assert torch.equal(outputs(model), plain)


def test_in_mixed_precision_memory_is_used_again_for_the_weights_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    inputs = torch.randn(2, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with packed_linears(model, 2) as first:
            places = [each.weight.data_ptr() for each in first]
        for parameter in model.parameters():
            parameter.data = 2 * parameter.data
        plain = model(inputs)
        with packed_linears(model, 2, first) as second:
            assert [each.weight.data_ptr() for each in second] == places
            assert torch.equal(model(inputs), plain)
        with packed_linears(model[:1], 2, second) as third:
            assert third[0].weight.data_ptr() not in places


def test_in_mixed_precision_weights_that_fsdp2_has_gathered_are_not_copied(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model: Any = fully_shard(tiny_model("llama"), mesh=init_device_mesh("cpu", (1,)))
        model.unshard()
        with packed_linears(model, 3) as weights:
            assert weights  # they are whole
        with torch.autocast("cpu", dtype=torch.bfloat16), packed_linears(model, 3) as weights:
            assert weights == []
    finally:
        dist.destroy_process_group()
