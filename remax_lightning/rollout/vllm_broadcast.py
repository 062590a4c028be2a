"""How weights get into a vLLM server: it reads files or memory of the trainer, or the trainer sends them to it.

All go through vLLM's phases of an update, in `vllm_weights`; here is what differs. What is sent travels in a process
group of rank 0 of the trainer and the workers of one server. There is one for each server, so that one that dies takes
no other with it.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import torch

from remax_lightning.errors import UserError
from remax_lightning.models.hf_export import published_weights
from remax_lightning.models.lora import has_adapter
from remax_lightning.rollout.vllm_client import KEY, ServerGoneError, VLLMServer
from remax_lightning.rollout.vllm_plugin.remax_vllm_group import (
    SENDER,
    SharedBuffer,
    WeightGroup,
    address_towards,
    libraries,
    make_store,
    read_folder,
)
from remax_lightning.strategies import forward_is_collective

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_BUFFER = 256 * 2**20
"""Bytes of memory that trainer and worker share; a larger tensor gets as many as it has."""
_ALIGNED = 512
"""Bytes of which the place of a tensor in it is a multiple."""
_SECONDS_TO_END = 5.0
"""For a thread whose connections are closed to end."""


class FileTransfer:
    """The servers read the files of the trainer, in a folder that all of them see."""

    sends = False
    """Whether rank 0 has to send the weights, and no other rank can."""
    device = torch.device("cpu")
    """Of the policy."""

    def hold(self, model: PreTrainedModel, dtype: torch.dtype | None) -> int | None:  # noqa: ARG002
        """Take the weights of a policy from itself, and return their bytes; None where files have to hold them."""
        return None

    def weights(self) -> dict[str, Tensor] | None:
        """Return the weights that are taken from the policy itself; None for those in files."""
        return None

    def connect(self, server: VLLMServer) -> None:
        """Prepare a server for `deliver`."""
        server.post("/init_weight_transfer_engine", {"init_info": {}}, server.options.transfer_timeout)

    def deliver(self, server: VLLMServer, folder: Path) -> None:
        """Let a server load the weights in a folder, once an update of its weights has begun.

        Raises:
            UserError: if its workers cannot load them.
            ServerGoneError: if it does not answer.
        """
        self.update(server, {"folder": str(folder)}, f"the weights in {str(folder)!r}")

    def delivered(self, server: VLLMServer, version: str) -> None:
        """Note that a server has a version now."""

    def update(self, server: VLLMServer, info: dict[str, Any], what: str) -> None:
        """Let the workers of a server load what `info` says; raises as `deliver`."""
        try:
            server.post("/update_weights", {"update_info": info}, server.options.transfer_timeout)
        except ServerGoneError as error:
            if error.status != 500:
                raise
            # The server is there, and its workers cannot load them.
            raise UserError(f"{server!r} cannot load {what}: {error}; its own log says why") from None


def _together(server_side: Callable[[], None], own_side: Callable[[], None], on_error: Callable[[], None]) -> None:
    """Do two things at once that wait for each other: what a server is asked for, and the trainer's part of it.

    Args:
        server_side: asks the server.
        own_side: is done beside.
        on_error: is called when one of them has failed, and lets the other one fail, too.

    Raises:
        ServerGoneError: if the connection to the workers has ended, and the server says nothing.
    """
    errors: list[BaseException | None] = [None, None]
    ends: queue.Queue[int] = queue.Queue()

    def run(index: int, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:  # raised below
            errors[index] = error
        ends.put(index)

    for index, action in enumerate((server_side, own_side)):
        threading.Thread(target=run, args=(index, action), daemon=True, name=f"vllm-weights-{index}").start()
    first = ends.get()
    if errors[first] is not None:
        on_error()
        with suppress(queue.Empty):
            ends.get(timeout=_SECONDS_TO_END)
    else:
        last = ends.get()
        if errors[last] is not None:
            on_error()
    said, own = errors
    # That the connection broke is a result of what the server tells.
    if own is not None and (said is None or not isinstance(own, ConnectionError)):
        raise ServerGoneError(f"its workers are gone: {own}") if isinstance(own, ConnectionError) else own
    if said is not None:
        raise said


class Broadcast(FileTransfer):
    """Rank 0 reads its files and sends them to the workers: over NCCL between GPUs, over gloo between CPUs.

    NCCL was not run on a GPU yet.
    """

    sends = True

    def __init__(self) -> None:
        self._groups: dict[str, WeightGroup] = {}  # by URL
        self._versions: dict[str, str] = {}  # that they have sent last, by URL

    def connect(self, server: VLLMServer) -> None:
        """Make a group with the workers of a server, unless there is one with these processes.

        Raises:
            UserError: if they cannot join.
            ServerGoneError: if the server does not answer.
        """
        # A server that restarted has no version, or another one.
        if server.url in self._groups and self._versions.get(server.url) == held_version(server):
            return
        self._drop(server)
        seconds = server.options.transfer_timeout
        size = 1 + int(server.value("/get_world_size?include_dp=true", "world_size"))
        try:
            address = address_towards(urlsplit(server.url).hostname or "")
            store = make_store(address, 0, seconds, is_master=True)
        except (OSError, RuntimeError) as error:  # a name that only a proxy knows, or no port
            raise UserError(
                f"{KEY}.transfer broadcast: this machine cannot listen for the workers of {server.url} ({error}); set"
                " it to files"
            ) from None
        name = uuid.uuid4().hex
        info = {"host": address, "port": store.port, "name": name, "size": size, "seconds": seconds}

        def ask() -> None:
            try:
                server.post("/init_weight_transfer_engine", {"init_info": info}, seconds)
            except ServerGoneError as error:
                if error.status != 500:
                    raise
                raise UserError(
                    f"{server!r} cannot join the trainer at {address}:{store.port} to get weights ({error}); its own"
                    f" log says why, and {KEY}.transfer: files does without"
                ) from None

        def join() -> None:
            self._groups[server.url] = WeightGroup(store, name, SENDER, size, self.device, address, seconds)

        _together(ask, join, lambda: self._drop(server))

    def deliver(self, server: VLLMServer, folder: Path) -> None:
        """Send the weights in a folder to a server that `connect` was called with; raises as `FileTransfer.deliver`."""
        group = self._groups[server.url]
        tensors = [
            [name, str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in read_folder(folder)
        ]

        def send() -> None:
            for _, value in read_folder(folder):  # one tensor of them is on the device at a time
                group.transfer(value.to(self.device).contiguous())

        def ask() -> None:
            self.update(server, {"tensors": tensors}, "the weights that are sent to it")

        _together(ask, send, lambda: self._drop(server))

    def delivered(self, server: VLLMServer, version: str) -> None:
        """Note that a server has a version now."""
        self._versions[server.url] = version

    def _drop(self, server: VLLMServer) -> None:
        group = self._groups.pop(server.url, None)
        if group is not None:
            group.abort()


class SharedMemory(FileTransfer):
    """Lets the server on the trainer's own device read whole weights there, a few tensors at a time: by CUDA IPC.

    On a CPU the memory is a file that both map. An adapter, and a policy that a strategy shards, travel in files. CUDA
    IPC was not run on a GPU yet.
    """

    def __init__(self) -> None:
        self._held: tuple[PreTrainedModel, torch.dtype | None] | None = None

    def hold(self, model: PreTrainedModel, dtype: torch.dtype | None) -> int | None:
        """Return the bytes of the weights; see `FileTransfer.hold`."""
        if has_adapter(model) or forward_is_collective(model):
            self._held = None
            return None
        self._held = model, dtype
        return sum(value.numel() * (dtype or value.dtype).itemsize for value in model.parameters())

    def weights(self) -> dict[str, Tensor] | None:
        """Return the weights by the names of published checkpoints."""
        return None if self._held is None else published_weights(self._held[0])

    def deliver(self, server: VLLMServer, folder: Path) -> None:
        """Show the server the weights, a bufferful at a time; raises as `FileTransfer.deliver`."""
        weights = self.weights()
        if weights is None:
            super().deliver(server, folder)
            return
        assert self._held is not None
        parts = _bufferfuls(weights, self._held[1])
        try:
            buffer = SharedBuffer(max(part[-1].stop for part in parts), self.device)
        except OSError as error:
            raise UserError(
                f"{KEY}.transfer ipc: the memory of this machine has no room for a part of the weights ({error}); set"
                " it to files, and transfer_dir to a folder on a disk"
            ) from error
        for number, part in enumerate(parts, 1):
            for name, dtype, start, stop in part:
                buffer.values[start:stop].view(dtype).view(weights[name].shape).copy_(weights[name])  # which casts
            places = [[name, str(dtype).removeprefix("torch."), list(weights[name].shape), start]
                      for name, dtype, start, _ in part]  # fmt: skip
            info = {"shared": buffer.facts(), "places": places, "is_last": number == len(parts)}
            self.update(server, info, "the weights in shared memory")


class _Place(NamedTuple):
    """Where a tensor is in the shared memory.

    Args:
        name: of the tensor.
        dtype: that it has there.
        start: its first byte.
        stop: the byte behind it.
    """

    name: str
    dtype: torch.dtype
    start: int
    stop: int


def _bufferfuls(weights: dict[str, Tensor], dtype: torch.dtype | None) -> list[list[_Place]]:
    """Return places of weights in parts of at most `_BUFFER` bytes, or of one tensor.

    Args:
        weights: by name.
        dtype: that the server computes in; None leaves the weights as they are.
    """
    parts: list[list[_Place]] = [[]]
    for name, value in weights.items():
        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
        size = value.numel() * kind.itemsize
        start = -(-parts[-1][-1].stop // _ALIGNED) * _ALIGNED if parts[-1] else 0
        if start and start + size > _BUFFER:
            start = 0
            parts.append([])
        parts[-1].append(_Place(name, kind, start, start + size))
    return parts


def check_workers(server: VLLMServer, device: torch.device) -> None:
    """Refuse a server whose workers cannot be in a group with the trainer.

    Args:
        server: that is asked.
        device: of the policy.

    Raises:
        UserError: naming what differs.
        ServerGoneError: if it does not answer.
    """
    path, ours = "/collective_rpc", libraries(device)
    workers = server.read(path, server.post(path, {"method": "remax_libraries"}), "results")
    for theirs in workers:
        if theirs["device"] != ours["device"]:
            raise UserError(
                f"{server!r} computes on {theirs['device']} and the trainer on {ours['device']}; {KEY}.transfer"
                " broadcast is between devices of one kind: set it to files"
            )
        if theirs["nccl"] != ours["nccl"]:
            raise UserError(
                f"{server!r} has NCCL {theirs['nccl']} and the trainer {ours['nccl']}, which do not talk to each other;"
                f" install the same nvidia-nccl package in both environments, or set {KEY}.transfer to files"
            )


def held_version(server: VLLMServer) -> str:
    """Return the version of the weights that a server says it has."""
    return str(server.value("/weight_info", "weight_version"))
