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
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


Step: TypeAlias = Callable[..., Tensor]
"""A function of tensors that returns one tensor."""
MAX_GRAPHS = 128
"""Number of graphs to keep; the least recently used one goes first."""
MAX_MOVES = 1
"""How many rollouts in a row may find the weights at new addresses before graphs count as good for one rollout only.
Loading a checkpoint moves weights once; a strategy that shards them gathers them anew for every rollout."""
IDLE_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad", "output_capturing_hook")
"""Hooks of transformers and PEFT, by name, that do nothing in a rollout: gradient checkpointing and adapters let
embeddings ask for gradients, and whoever asked for hidden states once leaves hooks that collect them on demand."""
HOST_WAITS = ("synchronizing CUDA operation", "stream is capturing")
"""Parts of what torch says of a step that waits for the device or copies from the host."""


class StepCache:
    """Runs decoding steps, on CUDA as graphs that are captured at the first step of each shape.

    What cannot be captured runs as it is, and the log says why: a model with hooks for as long as it has them, one that
    waits for the host for good, and a shape whose capture failed otherwise, such as for lack of memory, until the next
    rollout.
    """

    def __init__(self) -> None:
        self._hooked, self._waits, self._logged = "", "", ""
        self._failed: set[Hashable] = set()  # shapes of this rollout
        self._graphs: OrderedDict[Hashable, Step] = OrderedDict()
        self._copies: dict[Hashable, tuple[Tensor, ...]] = {}  # inputs of graphs that others than the engine own
        # Of steps, and of what runs on copies. Sharing is safe: a result is read before the next replay.
        self._pools: dict[str, Any] = {}
        # One for all captures, also of later pools: cuBLAS keeps a workspace for every stream that it has seen.
        self._stream: torch.cuda.Stream | None = None
        self._moves = 0
        self._weights: Hashable = None

    def __len__(self) -> int:
        return len(self._graphs)

    def begin(self, model: nn.Module) -> None:
        """Start a rollout of `model`: drop graphs of other weights, or of weights at other addresses."""
        if _device_type(model) != "cuda":
            return
        self._failed.clear()
        weights = _weights_fingerprint(model)
        if weights == self._weights:
            self._moves = 0
        else:
            # The first rollout moves nothing. Every later change of addresses is a move.
            self._moves = 0 if self._weights is None else self._moves + 1
            self.clear()
            self._weights = weights
        # Looked at in every rollout: gathering layer by layer needs hooks, gathering once does not.
        hook = _active_hook(model)
        self._hooked = f"it has hooks ({hook}), which a graph would skip" if hook else ""
        if self._hooked:
            self._log(f"decoding steps of {type(model).__name__} are not captured as CUDA graphs, since {self._hooked}")
            self.clear()

    @property
    def why_unsupported(self) -> str:
        """Why no step of this rollout is captured; empty if steps are."""
        return self._waits or self._hooked

    @property
    def is_reusable(self) -> bool:
        """Whether the next rollout can use the graphs too, judging by the last ones."""
        return not self.why_unsupported and self._moves <= MAX_MOVES

    def clear(self) -> None:
        """Drop all graphs, and their memory with the last of them."""
        self._graphs.clear()
        self._copies.clear()
        self._pools.clear()

    def run(self, key: Hashable, step: Step, inputs: tuple[Tensor, ...], memory: str = "steps") -> Tensor:
        """Return `step(*inputs)`, from a graph where possible.

        Args:
            key: identifies shapes, dtypes, and everything else that decides which kernels the step launches.
            step: what to run.
            inputs: everything that may change between two runs, in the same memory each time.
            memory: what the graph shares memory with. A result is overwritten by the next replay of any of them.
        """
        if inputs[0].device.type != "cuda" or self.why_unsupported or key in self._failed:
            return step(*inputs)
        if key not in self._graphs:
            try:
                self._stream = self._stream or torch.cuda.Stream()
                self._graphs[key], self._pools[memory] = capture(step, inputs, self._stream, self._pools.get(memory))
            except Exception as error:  # whatever a model does that cannot be captured
                self._note_failure(key, error)
                return step(*inputs)
            if len(self._graphs) > MAX_GRAPHS:
                self._copies.pop(self._graphs.popitem(last=False)[0], None)
        self._graphs.move_to_end(key)  # the most recently used one stays longest
        return self._graphs[key](*inputs)

    def run_on_copies(self, key: Hashable, step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return `step(*inputs)` as `run` does, of inputs that are elsewhere each time.

        These graphs have memory of their own: the result of a decoding step is read after them, too.
        """
        if inputs[0].device.type != "cuda" or self.why_unsupported or key in self._failed:
            return step(*inputs)
        if key not in self._copies:
            self._copies[key] = tuple(torch.empty_like(tensor) for tensor in inputs)
        for copy, tensor in zip(self._copies[key], inputs, strict=True):
            copy.copy_(tensor)
        return self.run(key, step, self._copies[key], "copies")

    def _note_failure(self, key: Hashable, error: Exception) -> None:
        """Run steps of this shape as they are: for good if they wait for the host, otherwise until the next rollout."""
        self._stream = None  # nothing is known of the one that failed
        reason = f"capture failed ({type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]})"
        if any(part in str(error) for part in HOST_WAITS):
            self._waits = reason
            self.clear()
            self._log(f"decoding steps of the policy are not captured as CUDA graphs, since {reason}")
        else:
            self._failed.add(key)
            self._log(f"decoding steps of one shape run without a CUDA graph in this rollout, since {reason}")

    def _log(self, message: str) -> None:
        """Log what the last message did not say already: every rollout comes here."""
        if message != self._logged:
            log.info(message)
        self._logged = message


def capture(step: Step, inputs: tuple[Tensor, ...], stream: torch.cuda.Stream, pool: Any = None) -> tuple[Step, Any]:
    """Capture `step` as a CUDA graph that reads `inputs` and the weights where they are now.

    Args:
        step: launches the same kernels at every call. It runs once before the capture.
        inputs: tensors whose memory every replay reads.
        stream: another one than the current one. torch finds free blocks of a pool by the stream of the capture.
        pool: the memory of other graphs, to share; None for new memory.

    Returns:
        The replay, and the pool of memory that it runs in.

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
        with _capturing(graph, stream, pool):
            output = step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(sync_debug_mode)
        torch.set_autocast_cache_enabled(cache_enabled)

    # A graph reads and writes fixed memory: it takes no arguments, and its output is the same tensor at every replay.
    def replay(*_: Tensor) -> Tensor:
        graph.replay()
        return output

    return replay, graph.pool()


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> Iterator[None]:
    """Capture what runs inside, as `torch.cuda.graph` does, which waits for the device and frees caches every time.

    Here only the first graph of a pool does: a rollout of weights that were gathered for it captures a dozen graphs,
    and waiting cost it a second.
    """
    if pool is None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    # With thread_local, other threads, such as one that pins batches, may go on meanwhile.
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with suppress(Exception):  # it says less than what has ended the capture
                graph.capture_end()
            raise
        graph.capture_end()


def _active_hook(model: nn.Module) -> str:
    """Return the name of a hook that does something in a forward pass without gradients; empty if there is none."""
    hooks = (
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    )
    names = (getattr(hook, "__name__", type(hook).__name__) for hook in hooks)
    return next((name for name in names if name not in IDLE_HOOKS), "")


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
    of date. Without autocast nothing changes. Of sharded weights, those are copied that are gathered for the context.

    Args:
        model: whose plain float32 `nn.Linear` layers to replace; all other layers stay as they are.
        previous: what an earlier call yielded. Its memory is reused where it fits, because CUDA graphs read it.

    Yields:
        What runs in place of the layers' own forward pass.
    """
    layers: list[Any] = [module for module in model.modules() if _can_cast(module)]
    device = layers[0].weight.device.type if layers else "cpu"
    casts: list[CastLinear] = []
    if layers and torch.is_autocast_enabled(device):
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
    # A subclass may compute something else. A shard is no plain parameter (FSDP2), or an empty one (ZeRO-3).
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
