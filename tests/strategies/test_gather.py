"""How a policy in shards is gathered for a rollout: what is chosen, and what a layer is. Two ranks: distributed/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import nn

from remax_lightning.errors import UserError
from remax_lightning.rollout import AutoEngine, GenerationRequest, SamplingConfig
from remax_lightning.sharding import decoder_layers
from remax_lightning.strategies import (
    ReMaxDeepSpeedStrategy,
    ReMaxFSDP2Strategy,
    gather_mode,
    rollout_parameters,
    shard_policy,
)
from remax_lightning.strategies.gather_mode import lockstep


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def sums(group: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What this process has announced to the others."""
    announced: list[int] = []
    reduce = torch.distributed.all_reduce

    def keeping(tensor: torch.Tensor, *arguments: Any) -> Any:
        announced.append(int(tensor))
        return reduce(tensor, *arguments)

    monkeypatch.setattr(torch.distributed, "all_reduce", keeping)
    return announced


def wrapped(policy: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"]))


def sharded(policy: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    shard_policy(policy, init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel")))
    return policy


@pytest.mark.parametrize("strategy", [ReMaxDeepSpeedStrategy, ReMaxFSDP2Strategy])
def test_an_unknown_way_is_refused(strategy: Any) -> None:
    with pytest.raises(UserError, match=r"init_args\.gather must be auto, once or layerwise, got 'often'"):
        strategy(gather="often")


def test_layer_by_layer_is_refused_where_no_layer_is_missing() -> None:
    with pytest.raises(UserError, match=r"init_args\.gather must be auto or once below stage 3"):
        ReMaxDeepSpeedStrategy(stage=2, gather="layerwise").setup_environment()


@pytest.mark.parametrize("change", [lambda policy: policy, wrapped, sharded, lambda policy: sharded(wrapped(policy))])
def test_layers_are_found_whatever_is_put_around_them(group: None, change: Any) -> None:
    policy = tiny_model("llama")
    layers = list(policy.model.layers)
    assert decoder_layers(change(policy)) == layers


def test_layers_within_layers_are_part_of_them() -> None:
    policy = tiny_model("llama")
    policy._no_split_modules = ["LlamaDecoderLayer", "LlamaMLP"]
    assert decoder_layers(policy) == list(policy.model.layers)
    policy._no_split_modules = None
    assert decoder_layers(policy) == []


def test_auto_is_once_where_there_is_room(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_model("llama")
    size = 4 * sum(each.numel() for each in policy.parameters())
    assert not gather_mode.uses_layerwise_gather(policy)  # on a CPU
    for free, expected in (
        (size / gather_mode.MAX_MEMORY_SHARE + 1, False),
        (size / gather_mode.MAX_MEMORY_SHARE - 1, True),
    ):
        monkeypatch.setattr(gather_mode, "free_bytes", lambda device, free=free: free)
        assert gather_mode.uses_layerwise_gather(policy) is expected
    with torch.autocast("cpu", torch.bfloat16):  # a 16-bit copy of the linear layers' weights lies beside them
        linears = [module.weight.numel() for module in policy.modules() if type(module) is nn.Linear]
        for more, expected in ((1, False), (-1, True)):
            free = (size + 2 * sum(linears)) / gather_mode.MAX_MEMORY_SHARE + more
            monkeypatch.setattr(gather_mode, "free_bytes", lambda device, free=free: free)
            assert gather_mode.uses_layerwise_gather(policy) is expected
    policy._no_split_modules = None
    assert not gather_mode.uses_layerwise_gather(policy)


def test_what_was_asked_for_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_model("llama")
    monkeypatch.setattr(gather_mode, "free_bytes", lambda device: 0)
    for gather, expected in (("once", False), ("layerwise", True)):
        gather_mode.register_gather_mode(nn.ModuleList([policy]), gather)  # type: ignore[arg-type]
        assert gather_mode.uses_layerwise_gather(policy) is expected
    policy._no_split_modules = None
    with pytest.raises(UserError, match=r"init_args\.gather must be once for a LlamaForCausalLM, got layerwise"):
        gather_mode.uses_layerwise_gather(policy)


def test_blocks_that_the_allocator_keeps_unused_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert gather_mode.free_bytes(torch.device("cuda")) == 1300


def test_a_rank_announces_every_layer_and_then_that_it_is_done(sums: list[int]) -> None:
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with lockstep(layers, lambda layer: None):
        for number in (0, 1, 1):
            layers[number](torch.ones(2))
    assert sums == [1, 2, 2, 0]
    layers[0](torch.ones(2))
    assert len(sums) == 4


def test_a_rank_that_fails_says_that_it_is_done_too(sums: list[int]) -> None:
    layers = [nn.Linear(2, 2)]
    with pytest.raises(RuntimeError, match="shapes"), lockstep(layers, lambda layer: None):
        layers[0](torch.ones(3))
    assert sums == [1, 0]


def test_a_rank_that_is_interrupted_does_not(sums: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt), lockstep([nn.Linear(2, 2)], lambda layer: None):
        raise KeyboardInterrupt
    assert sums == []


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("gather", ["once", "layerwise"])
def test_an_engine_may_run_the_model_inside_of_a_lora_wrapper(group: None, gather: Any) -> None:
    """It does so before the wrapper itself, which FSDP2 has to know for the root, has run."""
    policy = sharded(wrapped(tiny_model("llama")))
    gather_mode.register_gather_mode(policy, gather)
    ids = torch.tensor([[1, 5, 6]])
    sampling = SamplingConfig(max_response_length=2)
    with torch.no_grad(), rollout_parameters(policy.eval()):
        AutoEngine().generate(policy, GenerationRequest(ids, ids > 0, sampling, [2], 3, torch.Generator()))
    policy(ids).logits.sum().backward()
