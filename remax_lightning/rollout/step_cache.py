"""Steps of a fixed shape, recorded once and replayed without the Python of the model behind them.

A decoding step runs the same operators on the same shapes token after token. On CUDA they are captured as a graph,
which the device then runs without waiting for Python (`captured.py`); on a CPU they are written down
(`written_down.py`).
Either way the weights are read where they are, so a replay sees every update of them, and its result is that of the
model's own forward pass, bit for bit.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from remax_lightning.rollout.cuda_graph import capture
from remax_lightning.rollout.written_down import Step, write_down

log = logging.getLogger(__name__)

MOST_SHAPES = 128
"""Recordings that are kept; the one that was not used for longest goes first."""
RUNS_BEFORE = 32
"""How often a shape comes on a CPU before it is recorded: that costs about as much as forty runs of the model, and
saves a third of each, or half where few rows are left. On CUDA it costs two runs and saves nearly all of each, so a
graph is captured at once."""
MOST_MOVES = 1
"""How often in a row weights may lie elsewhere before they are taken to do so always. Loading a checkpoint moves them
once, a strategy that shares them among devices gathers them anew for every rollout."""


class Recorder:
    """Runs steps, and records those whose shape comes again.

    What cannot be recorded (a model that looks at its own values, that calls hooks, on a CPU one whose weights lie
    elsewhere in every rollout) runs as it is; the log says why.
    """

    def __init__(self) -> None:
        self.obstacle = ""
        self._replays: OrderedDict[Hashable, Step] = OrderedDict()
        self._runs: Counter[Hashable] = Counter()
        self._pool: Any = None
        self._moves = 0
        self._weights: Hashable = None

    def begin(self, model: nn.Module) -> None:
        """Begin a rollout of `model`: forget recordings of other weights, or of weights that lie elsewhere now."""
        weights = _whereabouts(model)
        if weights == self._weights:
            self._moves = 0
        else:
            self._moves = 0 if self._weights is None else self._moves + 1
            self.forget()
            self._weights = weights
        if _has_hooks(model):
            self._give_up(model, "it has hooks, which a recording would pass by")
        elif self._moves > MOST_MOVES and _device_type(model) == "cpu":
            self._give_up(model, "its weights lie elsewhere in every rollout")

    @property
    def lasts(self) -> bool:
        """Whether what is recorded serves the next rollout too, as far as the last ones tell."""
        return not self.obstacle and self._moves <= MOST_MOVES

    def forget(self) -> None:
        """Drop all recordings."""
        self._replays.clear()
        self._runs.clear()
        self._pool = None  # it is gone with its last graph

    def run(self, key: Hashable, step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return `step(*inputs)`, replayed where it is recorded.

        Args:
            key: stands for shapes, dtypes and everything else that the step's operators depend on.
            step: what to run.
            inputs: everything that may change between two runs. On CUDA the same memory in each of them.
        """
        on_cuda = inputs[0].device.type == "cuda"
        if key not in self._replays and not self.obstacle and (on_cuda or self._runs[key] >= RUNS_BEFORE):
            self._record(key, step, inputs, on_cuda)
        replay = self._replays.get(key)
        if replay is None:
            self._runs[key] += 1
            return step(*inputs)
        self._replays.move_to_end(key)
        return replay(*inputs)

    def _record(self, key: Hashable, step: Step, inputs: tuple[Tensor, ...], on_cuda: bool) -> None:
        try:
            if on_cuda:
                self._replays[key], self._pool = capture(step, inputs, self._pool)
            else:
                self._replays[key] = write_down(step, inputs)
        except Exception as error:  # whatever a model does that cannot be recorded
            self._give_up(None, f"recording failed ({type(error).__name__}: {str(error).splitlines()[0][:200]})")
        if len(self._replays) > MOST_SHAPES:
            self._replays.popitem(last=False)

    def _give_up(self, model: nn.Module | None, reason: str) -> None:
        if not self.obstacle:
            name = "the policy" if model is None else type(model).__name__
            log.info("decoding steps of %s are not recorded, since %s", name, reason)
        self.obstacle = reason
        self.forget()


def _whereabouts(model: nn.Module) -> Hashable:
    """Return what tells whether a recording still reads the model's weights, and runs its adapters as they are set."""
    tensors = tuple(tensor.data_ptr() for each in (model.parameters(), model.buffers()) for tensor in each)
    adapters = tuple(
        (str(module.active_adapters), module.disable_adapters, str(module.merged_adapters))
        for module in model.modules()
        if hasattr(module, "merged_adapters")
    )
    device = _device_type(model)
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return id(model), tensors, adapters, autocast


def _device_type(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
