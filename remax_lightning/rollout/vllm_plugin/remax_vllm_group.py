"""What the trainer and the workers of a vLLM server share: files of weights, memory, and a process group.

The trainer imports this module from its package; in the server's environment it is on the path of `remax serve`, and
needs torch and safetensors alone. So both sides run the same code: NCCL between CUDA devices, gloo between CPUs.
"""

from __future__ import annotations

import base64
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

SENDER = 0
"""Rank of the trainer; the workers follow."""


def read_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder by name.

    Raises:
        ValueError: if it has none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"there are no weights in {str(folder)!r}; the server has to see the trainer's transfer_dir")
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                yield name, opened.get_tensor(name)


# ---- Memory of the device that both are on ----


class SharedBuffer:
    """Memory that a worker on the same device reads: by CUDA IPC, or a file in the machine's memory on a CPU.

    Args:
        size: bytes.
        device: of the trainer.

    Raises:
        OSError: if the machine's memory has no room.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.device, self._file = device, None
        if device.type == "cuda":
            self.values = torch.empty(size, dtype=torch.uint8, device=device)  # [size]
            return
        folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self._file = tempfile.NamedTemporaryFile(prefix="remax-weights-", dir=folder)  # noqa: SIM115
        os.posix_fallocate(self._file.fileno(), 0, size)  # without room, a write to it would be a SIGBUS
        self.values = torch.from_file(self._file.name, shared=True, size=size, dtype=torch.uint8)  # [size]

    def facts(self) -> dict[str, Any]:
        """Return what `open_shared` needs, as plain values, once all that was written to it is there."""
        if self._file is not None:
            return {"path": self._file.name, "size": len(self.values)}
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.current_stream(self.device).synchronize()
        # What torch hands to `rebuild_cuda_tensor`; classes, sizes and the device are known there.
        _, arguments = reduce_tensor(self.values)
        offset, handle, size, start, counter, counter_offset, event, syncs = (
            arguments[index] for index in (3, 7, 8, 9, 11, 12, 13, 14)
        )
        names = {"handle": handle, "counter": counter, "event": event}
        encoded = {name: base64.b64encode(value).decode() for name, value in names.items()}
        numbers = {"offset": offset, "bytes": size, "start": start, "counter_offset": counter_offset, "syncs": syncs}
        return {"size": len(self.values), **encoded, **numbers}


def open_shared(facts: dict[str, Any], device: torch.device) -> Tensor:
    """Return the `[size]` bytes of a `SharedBuffer` of another process.

    Args:
        facts: of the buffer.
        device: as this process calls it.
    """
    if "path" in facts:
        return torch.from_file(facts["path"], shared=True, size=facts["size"], dtype=torch.uint8)
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    handle, counter, event = (base64.b64decode(facts[name]) for name in ("handle", "counter", "event"))
    values: Tensor = rebuild_cuda_tensor(
        Tensor, (facts["size"],), (1,), facts["offset"], torch.storage.TypedStorage, torch.uint8, device.index or 0,
        handle, facts["bytes"], facts["start"], False, counter, facts["counter_offset"], event, facts["syncs"],
    )  # fmt: skip
    return values


def read_shared(facts: dict[str, Any], places: list[list[Any]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield copies of the tensors in a `SharedBuffer`, which the trainer fills again.

    Args:
        facts: of the buffer.
        places: name, dtype, shape and first byte of each tensor.
        device: as this process calls it.
    """
    values = open_shared(facts, device)
    for name, dtype, shape, start in places:
        kind = getattr(torch, dtype)
        size = torch.Size(shape).numel() * kind.itemsize
        yield name, values[start : start + size].view(kind).view(shape).clone()
    if device.type == "cuda":  # the trainer fills it again once this is answered
        torch.cuda.synchronize(device)


# ---- A process group ----


def libraries(device: torch.device) -> dict[str, str | None]:
    """Return what both sides must have alike: the kind of device, and on CUDA the version of NCCL."""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else None
    return {"device": device.type, "nccl": nccl}  # plain strings: vLLM's answers hold nothing else


def address_towards(host: str) -> str:
    """Return the address of this machine by which another one reaches it."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # of a datagram: nothing is sent
        return str(probe.getsockname()[0])


def make_store(host: str, port: int, seconds: float, *, is_master: bool) -> Any:
    """Return the store where the processes of a group find each other: the trainer's, at a free port for 0."""
    distributed: Any = torch.distributed
    timeout = timedelta(seconds=seconds)
    return distributed.TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)


class WeightGroup:
    """The trainer and the workers of one server, apart from all groups that either has for its own work.

    Args:
        store: of `make_store`.
        name: of the group; another one for every start.
        rank: of this process, 0 for the trainer.
        size: of the group.
        device: of this process; that of the workers has to be of the same kind.
        address: of this machine, for gloo.
        seconds: that joining and one tensor may take.

    Raises:
        ConnectionError: if the others do not come.
    """

    def __init__(
        self, store: Any, name: str, rank: int, size: int, device: torch.device, address: str, seconds: float
    ) -> None:
        self.store, self.device = store, device  # the store is there as long as the group
        distributed: Any = torch.distributed
        prefix, timeout = distributed.PrefixStore(name, store), timedelta(seconds=seconds)
        options: Any
        try:
            if device.type == "cuda":
                options = distributed.ProcessGroupNCCL.Options()
                options._timeout = timeout
                group: Any = distributed.ProcessGroupNCCL(prefix, rank, size, options)
            else:
                gloo: Any = distributed.ProcessGroupGloo
                options = gloo._Options()
                options._timeout, options._devices = timeout, [gloo.create_device(hostname=address)]
                group = gloo(prefix, rank, size, options)
        except RuntimeError as error:
            raise ConnectionError(str(error)) from error
        self._group = group

    def transfer(self, tensor: Tensor) -> None:
        """Send the values of a contiguous tensor on the group's device from the trainer to the workers, and wait.

        Raises:
            ConnectionError: if another process is gone.
        """
        if self._group is None:
            raise ConnectionError("the group was left")
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = SENDER, 0
        try:
            # As bytes: gloo does not know all dtypes.
            self._group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()
            if self.device.type == "cuda":  # NCCL's `wait` only orders the stream behind it
                torch.cuda.current_stream(self.device).synchronize()
        except RuntimeError as error:
            raise ConnectionError(str(error)) from error

    def receive(self, tensors: list[list[Any]]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors by name as they arrive.

        Args:
            tensors: name, dtype and shape of all that are sent, in their order.
        """
        for name, dtype, shape in tensors:
            value = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            self.transfer(value)
            yield name, value

    def abort(self) -> None:
        """Close all connections, so that whoever waits for the others ends with an error."""
        groups, self._group = [self._group], None
        # In a thread that nobody waits for: gloo hangs where its other end closes at the same moment.
        threading.Thread(target=_end, args=(groups,), daemon=True, name="end-weight-group").start()


def _end(groups: list[Any]) -> None:
    group = groups.pop()  # gloo closes its connections when nobody holds it any more, from here on
    if group is not None:
        with suppress(RuntimeError):  # the others are gone
            group.abort()
