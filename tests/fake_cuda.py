"""A CUDA device that is really the CPU, for what the code does on a device that this machine lacks.

Tensors of the device are marked by their storage, and two modes of torch stand between Python and the operators. So
the code sees `device.type == "cuda"`, and what CUDA refuses is refused: operands on two devices, a CPU generator for
numbers of the device, arrays of NumPy, and in the capture of a graph whatever waits for the device or copies from the
host. A graph runs its operators again on the memory that they were captured with, and its capture computes nothing.
Numbers are a CPU's; kernels, streams and their order are not imitated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
READS = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "_unique2",
}
"""Operators whose result, or its shape, is told to the host."""
ACROSS = {"copy_", "index", "index_put_", "_index_put_impl_"}
"""Operators that take operands on two devices: copies, and indices of the host, which are copied."""
GIBIBYTE = 2**30


def is_there(tensor: Tensor) -> bool:
    """Whether a tensor is on the device."""
    with torch._C.DisableTorchFunction():
        return getattr(tensor.untyped_storage(), "is_on_pretended_cuda", False)


def _put(value: Any, there: bool) -> Any:
    with torch._C.DisableTorchFunction():
        for tensor in _tensors(value):
            tensor.untyped_storage().is_on_pretended_cuda = there
    return value


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for each in values for tensor in _tensors(each)]


class Graph:
    """A captured graph."""

    def __init__(self, device: FakeCuda) -> None:
        self.device, self.invalid = device, False
        self.operators: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0
        self.pool_given: Any = None

    def pool(self) -> tuple[int, int]:
        return self.pool_given or (0, id(self))

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert self.device.stream != "default", "CUDA graphs must be captured on a non-default stream"
        self.pool_given, self.device.capturing = pool, self

    def capture_end(self) -> None:
        self.device.capturing = None
        if self.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.device.graphs.append(self)
        self.poison()

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operators again, on what their memory holds now."""
        self.replays += 1
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            for operator, arguments, options, results in self.operators:
                again = operator(*arguments, **options)
                for result, new in zip(results, _tensors(again) if results else (), strict=True):
                    result.copy_(new)

    def poison(self) -> None:
        """Forget what the capture computed, since on CUDA it computes nothing."""
        for *_, results in self.operators:
            for each in results:
                each.fill_(float("nan") if each.is_floating_point() else 0)


class FakeCuda(TorchDispatchMode):
    """The device: `reads` counts what waited for it, by operator, `calls` those of some functions of `torch.cuda`;
    `graphs` are the ones captured."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.graphs: list[Graph] = []
        self.capturing: Graph | None = None
        self.sync_debug_mode: int | str = 0
        self.stream = "default"

    def read(self, name: str) -> None:
        """Note that the host waits for the device, which it must not in a capture."""
        if self.capturing is not None:
            self.capturing.invalid = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")
        if self.sync_debug_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation ({name})")
        self.reads[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        operands = _tensors((args, options))
        there = [is_there(each) for each in operands]
        if any(there):
            self._check(func.overloadpacket.__name__, args, operands, there)
        result = func(*args, **options)
        changes = func._schema.is_mutable
        if any(there) and not changes:
            _put(result, True)
        if self.capturing is not None:
            # Not by the schema: `to` may give its operand or a copy.
            given = {each.untyped_storage()._cdata for each in operands}
            made = [] if changes else [each for each in _tensors(result) if each.untyped_storage()._cdata not in given]
            if changes or made:
                self.capturing.operators.append((func, args, options, [each.detach() for each in made]))
        return result

    def _check(self, name: str, args: Any, operands: list[Tensor], there: list[bool]) -> None:
        if name == "_has_compatible_shallow_copy_type":  # a question about operands, wherever they are
            return
        strangers = [each for each, on in zip(operands, there, strict=True) if not on and each.dim() > 0]
        if strangers and name not in ACROSS:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name})")
        # torch sorts where there are many values to look for, and asks how many are unique.
        sorts = name == "isin" and operands[1].numel() >= 10 * operands[0].numel() ** 0.145
        by_mask = name in ("index", "index_put_") and any(each.dtype == torch.bool for each in _tensors(args[1]))
        if name in READS or strangers or by_mask or sorts:
            self.read(name)


class _Python(TorchFunctionMode):
    """What Python asks of tensors: where they are, and to be made or moved there."""

    def __init__(self, device: FakeCuda) -> None:
        super().__init__()
        self.device = device
        groups = {
            self._asked: ("device", "is_cuda", "is_cpu"),
            self._pinned: ("pin_memory", "is_pinned"),
            self._read: ("numpy", "__array__", "tolist", "__repr__", "__format__"),
            self._histogram: ("histc",),
        }
        self._answers = {name: answer for answer, names in groups.items() for name in names}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if args and isinstance(args[0], Tensor):
            if name in ("to", "cpu", "cuda") or (name in ("as_tensor", "asarray") and "device" in options):
                return self._moved(args[0], name, args, options)
            if name == "__deepcopy__":
                return _put(func(*args, **options), is_there(args[0]))
            if name in self._answers:
                return self._answers[name](name, func, args, options)
        return self._made(func, args, options)

    def _asked(self, name: str, func: Any, args: Any, options: Any) -> Any:
        if not is_there(args[0]):
            return func(*args, **options)
        return CUDA if name == "device" else name == "is_cuda"

    def _pinned(self, name: str, func: Any, args: Any, options: Any) -> Any:
        assert not is_there(args[0]), "cannot pin memory of the device"
        return _put(args[0].clone(), False) if name == "pin_memory" else False

    def _read(self, name: str, func: Any, args: Any, options: Any) -> Any:
        if is_there(args[0]):
            if name in ("numpy", "__array__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")
            self.device.read(name)
        with _disable_current_modes():
            return func(*args, **options)

    def _histogram(self, name: str, func: Any, args: Any, options: Any) -> Any:
        """The CPU has no kernel for integers."""
        return func(args[0].float(), *args[1:], **options).to(args[0].dtype)

    def _made(self, func: Any, args: Any, options: dict[str, Any]) -> Any:
        generator = options.get("generator")
        asked = options.get("device")
        if asked is None:
            if generator is not None and any(map(is_there, _tensors(args))) and generator.device.type != "cuda":
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            return func(*args, **options)
        there = torch.device(asked).type == "cuda"
        made = func(*args, **(options | {"device": CPU if torch.device(asked).type != "meta" else asked}))
        if there and getattr(func, "__name__", "") == "tensor" and made.numel():
            self.device.read("from the host")
        return _put(made, there)

    def _moved(self, owner: Tensor, name: str, args: Any, options: dict[str, Any]) -> Any:
        was = is_there(owner)
        target, rest, options = name == "cuda" or (was and name != "cpu"), [], dict(options)
        for each in [*args[1:], options.pop("device", None)]:
            place = each
            if isinstance(each, str | torch.device):
                target, place = torch.device(each).type == "cuda", None
            elif isinstance(each, Tensor):
                target, place = is_there(each), each.dtype
            rest += [] if place is None or isinstance(place, bool) else [place]  # `non_blocking` is a bool
        options.pop("non_blocking", None)
        moved = owner.to(*rest, **options) if rest or options else owner
        if target == was:
            return moved
        self.device.read("to the host" if was else "from the host")
        with _disable_current_modes():
            return _put(moved.clone(), target)


class _Generator(torch.Generator):
    """Random numbers of either device."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls)
        made.place = CUDA if torch.device(device).type == "cuda" else CPU
        return made

    device: Any = property(lambda self: self.place)


@contextmanager
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Have one device of this kind inside."""
    import peft  # noqa: F401 (brings bitsandbytes, which looks for a real device when it is imported)
    import torch._dynamo

    device, default = FakeCuda(), _Generator(CUDA)

    @contextmanager
    def stream(chosen: str) -> Iterator[None]:
        before, device.stream = device.stream, chosen
        try:
            yield
        finally:
            device.stream = before

    @contextmanager
    def graph(captured: Graph) -> Iterator[None]:
        with stream("another"):
            captured.capture_begin()
            try:
                yield
            except RuntimeError:
                device.capturing = None
                raise
            captured.capture_end()

    properties = SimpleNamespace(
        total_memory=80 * GIBIBYTE, name="pretended", major=9, minor=0, multi_processor_count=1
    )
    numbers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "synchronize": None,
        "set_device": None, "empty_cache": None, "reset_peak_memory_stats": None, "memory_allocated": GIBIBYTE,
        "memory_reserved": GIBIBYTE, "max_memory_allocated": GIBIBYTE, "mem_get_info": (70 * GIBIBYTE, 80 * GIBIBYTE),
        "get_device_name": "pretended", "get_device_capability": (9, 0), "get_device_properties": properties,
        "is_bf16_supported": True, "memory_stats": {}, "_lazy_init": None,
    }  # fmt: skip
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, partial(_answer, device, name, value))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device.capturing is not None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: device.sync_debug_mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(device, "sync_debug_mode", mode))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: default.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, *_: default.set_state(state))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", partial(Graph, device))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "another")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: device.stream)
    monkeypatch.setattr(torch, "Generator", _Generator)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # modes are of one thread
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        monkeypatch.setattr(torch, name, _for_cpu(getattr(torch, name)))
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    with device, _Python(device):
        yield device
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def _answer(device: FakeCuda, name: str, value: Any, *_: Any, **__: Any) -> Any:
    device.calls[name] += 1
    return value


def _for_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast looks at where the numbers are, which is the CPU."""
    return lambda *args: function(*("cpu" if each == "cuda" else each for each in args))
