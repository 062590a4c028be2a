"""What makes a decoding step cheap: CUDA graphs, and 16-bit weights that are cast once per rollout.

Graphs are captured once per shape, then replayed without the Python of the model. A decoding step launches the same
kernels on the same shapes token after token, so a replay is exact: it reads the weights where they are, sees every
update of them, and returns what the model's forward pass would, bit for bit. On a CPU there are no graphs and every
step runs as it is.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from remax_lightning.sharding import is_sharded

log = logging.getLogger(__name__)


Step: TypeAlias = Callable[..., Tensor]
"""A function of tensors that returns one tensor."""
MAX_GRAPHS = 128
"""Number of graphs to keep; the least recently used one goes first."""
MAX_MOVES = 1
"""How many rollouts in a row may find the weights at new addresses before graphs count as good for one rollout only.
Loading a checkpoint moves weights once; a strategy that shards them gathers them anew for every rollout."""


class StepCache:
    """Runs decoding steps, on CUDA as graphs that are captured at the first step of each shape.

    A model that cannot be captured, since it has hooks or synchronizes with the host, runs as it is; the log says why.
    """

    def __init__(self) -> None:
        self.why_unsupported = ""
        self._graphs: OrderedDict[Hashable, Step] = OrderedDict()
        self._pool: Any = None
        self._moves = 0
        self._weights: Hashable = None

    def begin(self, model: nn.Module) -> None:
        """Start a rollout of `model`: drop graphs of other weights, or of weights at other addresses."""
        if _device_type(model) != "cuda":
            return
        weights = _weights_fingerprint(model)
        if weights == self._weights:
            self._moves = 0
        else:
            # The first rollout moves nothing. Every later change of addresses is a move.
            self._moves = 0 if self._weights is None else self._moves + 1
            self.clear()
            self._weights = weights
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            self._give_up(type(model).__name__, "it has hooks, which a graph would skip")

    @property
    def is_reusable(self) -> bool:
        """Whether the next rollout can use the graphs too, judging by the last ones."""
        return not self.why_unsupported and self._moves <= MAX_MOVES

    def clear(self) -> None:
        """Drop all graphs, and their memory with the last of them."""
        self._graphs.clear()
        self._pool = None

    def run(self, key: Hashable, step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return `step(*inputs)`, from a graph where possible.

        Args:
            key: identifies shapes, dtypes, and everything else that decides which kernels the step launches.
            step: what to run.
            inputs: everything that may change between two runs, in the same memory each time.
        """
        if inputs[0].device.type != "cuda" or self.why_unsupported:
            return step(*inputs)
        if key not in self._graphs:
            try:
                self._graphs[key], self._pool = capture(step, inputs, self._pool)
            except Exception as error:  # whatever a model does that cannot be captured
                reason = f"capture failed ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
                self._give_up("the policy", reason)
                return step(*inputs)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)  # the most recently used one stays longest
        return self._graphs[key](*inputs)

    def _give_up(self, name: str, reason: str) -> None:
        if not self.why_unsupported:
            log.info("decoding steps of %s are not captured as CUDA graphs, since %s", name, reason)
        self.why_unsupported = reason
        self.clear()


def capture(step: Step, inputs: tuple[Tensor, ...], pool: Any = None) -> tuple[Step, Any]:
    """Capture `step` as a CUDA graph that reads `inputs` and the weights where they are now.

    Args:
        step: launches the same kernels at every call. It runs once before the capture.
        inputs: tensors whose memory every replay reads.
        pool: memory of other graphs to share, which is safe because the result of a replay is read before the next
            replay; None for new memory.

    Returns:
        The replay, and the memory pool that it runs in.

    Raises:
        RuntimeError: if `step` synchronizes with the device or copies from the host. A graph can do neither, and torch
            does not recover from a failed capture, so this is checked before it.
    """
    cache_enabled, sync_debug_mode = torch.is_autocast_cache_enabled(), torch.cuda.get_sync_debug_mode()
    # Autocast frees its copies of the weights after the training step; a graph must not read them then.
    torch.set_autocast_cache_enabled(False)
    try:
        # Check for synchronization, and let libraries initialize on their first calls.
        torch.cuda.set_sync_debug_mode("error")
        step(*inputs)
        torch.cuda.set_sync_debug_mode(sync_debug_mode)
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the stream if the capture fails after all. With thread_local, other threads, such
        # as one that pins batches, may go on meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            output = step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(sync_debug_mode)
        torch.set_autocast_cache_enabled(cache_enabled)

    # A graph reads and writes fixed memory: it takes no arguments, and its output is the same tensor at every replay.
    def replay(*_: Tensor) -> Tensor:
        graph.replay()
        return output

    return replay, graph.pool()


def _weights_fingerprint(model: nn.Module) -> Hashable:
    """Return what changes if a graph no longer reads the model's weights, or would run its adapters differently."""
    # A graph reads memory, not parameters: updates in place are seen, new tensors are not.
    addresses = tuple(tensor.data_ptr() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    # PEFT decides in Python which adapters run; a graph would replay the decision of its capture.
    adapters = tuple(
        (str(module.active_adapters), module.disable_adapters, str(module.merged_adapters))
        for module in model.modules()
        if hasattr(module, "merged_adapters")
    )
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")  # decides the kernels
    return id(model), addresses, adapters, autocast


def _device_type(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


@contextmanager
def cast_linears(model: nn.Module, previous: Sequence[CastLinear] = ()) -> Iterator[list[CastLinear]]:
    """Under autocast, run the model's float32 linear layers on weights that are cast once, inside the context.

    Autocast would cast all weights at every token. The copies are made from the current weights, so they are never out
    of date. Without autocast nothing changes. Sharded weights are not copied, since they are sharded to save memory.

    Args:
        model: whose plain float32 `nn.Linear` layers to replace; all other layers stay as they are.
        previous: what an earlier call yielded. Its memory is reused where it fits, because CUDA graphs read it.

    Yields:
        What runs in place of the layers' own forward pass.
    """
    layers: list[Any] = [module for module in model.modules() if _can_cast(module)]
    device = layers[0].weight.device.type if layers else "cpu"
    casts: list[CastLinear] = []
    if layers and torch.is_autocast_enabled(device) and not is_sharded(model):
        casts = _cast(layers, torch.get_autocast_dtype(device), previous)
    for layer, cast in zip(layers, casts, strict=False):  # no casts where nothing changes
        # An attribute of the instance hides the method of its class, until it is deleted below.
        layer.forward = cast
    try:
        yield casts
    finally:
        for layer, _ in zip(layers, casts, strict=False):
            del layer.forward


def _can_cast(module: nn.Module) -> bool:
    # A subclass may compute something else, and the placeholder of a sharded weight is empty.
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and module.weight.device.type in ("cpu", "cuda")
        and module.weight.dtype == torch.float32
        and module.weight.numel() > 0
    )


def _cast(layers: Sequence[nn.Linear], dtype: torch.dtype, previous: Sequence[CastLinear]) -> list[CastLinear]:
    """Return the replacement of each layer, in the memory of `previous` if shapes, dtype and device are the same."""
    if [_kind(cast.weight, cast.weight.dtype) for cast in previous] != [_kind(layer.weight, dtype) for layer in layers]:
        return [CastLinear(layer, dtype) for layer in layers]
    for cast, layer in zip(previous, layers, strict=True):
        cast.weight.copy_(layer.weight)  # in place: graphs read this memory
        cast.bias = layer.bias
    return [*previous]


def _kind(weight: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    return weight.shape, weight.device, dtype


class CastLinear:
    """The forward pass of a linear layer under autocast, with its weight cast beforehand."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.weight, self.bias = layer.weight.detach().to(dtype), layer.bias

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return what the layer would; autocast casts inputs and bias."""
        # In two dimensions: if the weight needs no gradient, torch would copy it for every row of a larger input.
        rows = nn.functional.linear(inputs.reshape(-1, inputs.shape[-1]), self.weight, self.bias)
        return rows.view(*inputs.shape[:-1], -1)
