"""A step's kernels, captured once as a CUDA graph and launched again without the Python of the model around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remax_lightning.rollout.written_down import Step


def capture(step: Step, inputs: tuple[Tensor, ...], pool: Any = None) -> tuple[Step, Any]:
    """Return a replay of `step` that reads `inputs` and the weights where they are now, and the memory it runs in.

    Args:
        step: queues the same kernels at every call. It runs once meanwhile, and is captured.
        inputs: in memory that every replay reads.
        pool: the memory of other graphs, which this one may use too, since a replay's result is read before the next
            replay; None for memory of its own.

    Raises:
        RuntimeError: if `step` waits for the device or copies from the host, which a graph cannot. That is looked for
            before the capture: torch does not recover from one that fails.
    """
    cached, synchronizing = torch.is_autocast_cache_enabled(), torch.cuda.get_sync_debug_mode()
    # Autocast's copies of the weights end with the training step; a graph must not read them then.
    torch.set_autocast_cache_enabled(False)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(*inputs)  # also because libraries set themselves up on first calls
        torch.cuda.set_sync_debug_mode(synchronizing)
        graph = torch.cuda.CUDAGraph()
        # A capture that fails all the same would leave its own stream behind. Other threads, such as one that pins
        # batches, may go on meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            output = step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(synchronizing)
        torch.set_autocast_cache_enabled(cached)

    def replay(*_: Tensor) -> Tensor:
        graph.replay()
        return output

    return replay, graph.pool()
