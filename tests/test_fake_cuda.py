"""The pretended CUDA device does what CUDA does, and the commands run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, FakeCuda, is_there
from helpers.cli import changed, in_folder, remax, small_config, write_config
from helpers.doctor import doctor, healthy, statuses, with_reward_model

from remax_lightning.rollout.cuda_graph import capture

pytestmark = pytest.mark.slow


def test_tensors_are_where_they_were_put(fake_cuda: FakeCuda) -> None:
    layer = torch.nn.Linear(3, 2).to("cuda")
    inputs = torch.ones(4, 3).cuda()
    output = layer(inputs)
    output.sum().backward()
    made = (output, output[1:].view(-1), layer.weight.grad, torch.zeros(2, device="cuda"), output.new_zeros(2))
    assert all(each.device == CUDA for each in (*made, torch.as_tensor(torch.ones(2), device=CUDA)))
    for each in (output.cpu(), torch.ones(2), torch.ones_like(output, device="cpu"), inputs.to("cpu").to(torch.int8)):
        assert each.device.type == "cpu"
        assert not is_there(each)
    assert torch.ones(2).to(output).device == CUDA
    with torch.inference_mode():
        assert inputs.to(torch.float64).device == CUDA


def test_what_cuda_refuses_is_refused(fake_cuda: FakeCuda) -> None:
    inputs = torch.ones(3, device="cuda")
    for refused in (inputs.__add__, inputs.dot, lambda host: torch.cat([inputs, host])):
        with pytest.raises(RuntimeError, match="same device"):
            refused(torch.ones(3))
    with pytest.raises(RuntimeError, match="generator"):
        inputs.exponential_(generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        inputs.numpy()
    assert inputs.add(torch.tensor(2.0)).tolist() == [3.0, 3.0, 3.0]  # a number of the host is fine
    assert inputs[torch.tensor([0])].device == CUDA


def test_what_the_host_reads_is_counted(fake_cuda: FakeCuda) -> None:
    inputs = torch.ones(3, device="cuda")
    assert fake_cuda.reads == {}
    for read in (inputs.sum().item, inputs.nonzero, lambda: inputs[inputs > 0], lambda: bool(inputs.any()), inputs.cpu):
        before = sum(fake_cuda.reads.values())
        read()
        assert sum(fake_cuda.reads.values()) == before + 1


@pytest.mark.parametrize("inference", [True, False])
def test_a_capture_computes_nothing_and_a_replay_reads_the_memory_it_captured(
    inference: bool, fake_cuda: FakeCuda
) -> None:
    inputs, state, seen = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), []

    def step(values: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_cache_enabled())
        state.copy_(values.to(torch.float64))
        return values[1:].double() * 2 + 1

    with torch.inference_mode(inference):
        replay, pool = capture(step, (inputs,), torch.cuda.Stream())
        assert seen == 2 * [False]
        assert pool == fake_cuda.graphs[0].pool()
        inputs.fill_(5.0)
        assert replay(inputs).tolist() == [11.0, 11.0]
    assert state.tolist() == [5.0, 5.0, 5.0]
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        nothing = inputs + 1
    assert nothing.isnan().all()


@pytest.mark.parametrize(
    "step", [lambda x: x[: int(x[0])], lambda x: x + torch.tensor(1.0, device="cuda"), lambda x: x.cpu()]
)
def test_a_step_that_waits_is_not_captured(step: Any, fake_cuda: FakeCuda) -> None:
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        capture(step, (torch.ones(3, device="cuda"),), torch.cuda.Stream())
    assert fake_cuda.graphs == []
    assert (fake_cuda.sync_debug_mode, torch.is_autocast_cache_enabled()) == (0, True)
    with pytest.raises(RuntimeError, match="stream is capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step(torch.ones(3, device="cuda"))


def test_a_capture_that_fails_leaves_the_stream_as_it_was(fake_cuda: FakeCuda) -> None:
    calls: list[str] = []

    def step(values: torch.Tensor) -> torch.Tensor:
        calls.append(fake_cuda.stream)
        if len(calls) == 2:
            raise RuntimeError("what only a capture refuses")
        return values + 1

    with pytest.raises(RuntimeError, match="only a capture"):
        capture(step, (torch.ones(3, device="cuda"),), torch.cuda.Stream())
    assert calls == ["default", "another"]
    assert fake_cuda.stream == "default"


# Commands


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fit_takes_the_device_that_is_there(
    precision: str, policy_path: Path, tmp_path: Path, capsys: Any, fake_cuda: FakeCuda
) -> None:
    config = small_config(tmp_path, policy_path)
    config = changed(config, trainer__accelerator="auto", trainer__precision=precision)
    with in_folder(tmp_path):
        outcome = remax(capsys, "fit", "--config", write_config(tmp_path / "run.yaml", config))
    assert outcome.code == 0, outcome.err
    assert len(fake_cuda.graphs) == 2  # of the check before the first step, and of rollouts
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert list(tmp_path.glob("runs/**/policy/last/model.safetensors"))


def test_doctor_finds_a_healthy_run_healthy_there(tmp_path: Path, capsys: Any, fake_cuda: FakeCuda) -> None:
    config = changed(with_reward_model(healthy(tmp_path), tmp_path), trainer__accelerator="gpu")
    outcome, results = doctor(capsys, tmp_path, config)
    assert statuses(results) == {}, outcome.out
