"""Counting the bytes of the tensors that are alive while code runs, on real tensors and on shapes alone."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts, inside, the bytes of all tensors that operators made and that are still alive.

    What `torch.cuda.max_memory_allocated` tells of a CUDA device, this tells of any device, and of fake tensors that
    have a shape and no memory. Scratch space that a kernel takes and returns is not seen.

    Args:
        known: tensors and modules that were there before; they and views of them count nothing.

    Attributes:
        live: bytes now.
        peak: the most since the start or the last `reset`.
    """

    def __init__(self, known: Iterable[Tensor | nn.Module] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {}
        for item in known:
            for tensor in (*item.parameters(), *item.buffers()) if isinstance(item, nn.Module) else (item,):
                self._watch(tensor, 0)

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        return output

    def reset(self) -> None:
        """Let the peak count anew."""
        self.peak = self.live

    def _watch(self, tensor: Tensor, size: int | None = None) -> None:
        # A storage keeps its Python object as long as it lives, so the object's end is the memory's.
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if size is None else size
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@contextmanager
def shapes_only(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Make tensors inside that have shape, dtype and a place in the autograd graph, and neither memory nor values.

    Every operator runs as it would on a CPU, down to the choice of the attention kernel, but computes nothing.

    Args:
        dtype: what models are built in.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    before, log = torch.get_default_dtype(), logging.getLogger("torch._subclasses.fake_tensor")
    torch.set_default_dtype(dtype)
    log.disabled, quiet = True, log.disabled  # of what an operator cannot do without values the exception says enough
    try:
        with FakeTensorMode():
            yield
    finally:
        log.disabled = quiet
        torch.set_default_dtype(before)
