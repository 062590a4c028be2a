"""A step that was written down: its own numbers, from the weights as they are, whoever calls its operators."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from remax_lightning.rollout import written_down


@pytest.fixture(autouse=True, params=[True, False], ids=["interpreted", "by Python"])
def _who_calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(written_down, "_interpreted", lambda replay, _: replay)


def write(step: Any, *inputs: torch.Tensor) -> Any:
    with torch.no_grad():
        return written_down.write_down(step, inputs)


def test_what_a_step_writes_into_is_made_anew_each_time() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(3)
        sums += x  # were the zeros a constant of the recording, sums would go on
        return sums * torch.arange(3)

    replay = write(step, torch.ones(3))
    for _ in range(2):
        assert replay(torch.full((3,), 2.0)).tolist() == [0.0, 2.0, 4.0]


def test_inputs_are_written_into() -> None:
    def step(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        x.index_copy_(0, place, torch.full((1,), 7.0))
        return x[1:].sum()

    replay = write(step, torch.zeros(4), torch.tensor([1]))
    x = torch.zeros(4)
    assert replay(x, torch.tensor([2])) == 7
    assert x.tolist() == [0, 0, 7, 0]


def test_what_is_known_beforehand_is_not_computed_again() -> None:
    weight, operators = torch.randn(3, 4), []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operators.append(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    replay = write(lambda x: torch.arange(4).add(1) * (x @ weight.t().t()), torch.randn(2, 3))
    x = torch.randn(2, 3)
    with Count():
        got = replay(x)
    assert operators == ["mm", "mul"]
    torch.testing.assert_close(got, torch.arange(1, 5) * (x @ weight))
    weight *= 2
    torch.testing.assert_close(replay(x), 2 * got)


def test_nothing_is_held_when_a_recording_is_dropped() -> None:
    def memory_of_one() -> StorageWeakRef:
        model, x = torch.nn.Linear(3, 3), torch.randn(2, 3)
        replay = write(lambda x: model(x), x)
        assert torch.equal(replay(x), model(x))
        return StorageWeakRef(model.weight.untyped_storage())

    memory = memory_of_one()
    gc.collect()
    assert memory.expired()


def test_python_calls_what_the_interpreter_cannot(caplog: pytest.LogCaptureFixture) -> None:
    """Arguments that TorchScript has no type for, as oneDNN's."""
    weight = torch.randn(5, 4)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 2)

    def step(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x + 1, packed, None, "none", [], "")

    x = torch.randn(2, 4)
    with caplog.at_level("DEBUG", written_down.__name__):
        replay = write(step, x, packed)
    assert ("decoding steps are replayed by Python" in caplog.text) == (
        written_down._interpreted.__name__ != "<lambda>"
    )
    torch.testing.assert_close(replay(x, packed), (x + 1) @ weight.t())
