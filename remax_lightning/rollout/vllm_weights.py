"""Weights of the policy on vLLM servers: a version made of the weights themselves, files, and loading.

The version of weights is a digest of them. Trainer and servers so agree on what a version holds: a server that
restarted, missed an update or belongs to another run has another version, whichever rank looks. The files of the
current version stay until the next one is written, so that any rank can bring a server up to date that came back.
"""

from __future__ import annotations

import hashlib
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from remax_lightning.distributed import agree_on_errors, gather_objects, num_ranks, rank
from remax_lightning.errors import UserError
from remax_lightning.models.lora import has_adapter
from remax_lightning.rollout.vllm_broadcast import FileTransfer, held_version
from remax_lightning.rollout.vllm_client import KEY, MissingError, ServerGoneError, ServerInfo, VLLMServer
from remax_lightning.rollout.vllm_files import WeightFiles
from remax_lightning.rollout.vllm_requests import Flight
from remax_lightning.sharding import full_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKEND = "remax"
"""Name of the transfer engine that `remax serve` registers with vLLM."""
_UNFINISHED = "unfinished"
"""Version of a server whose weights are of no version."""
_LOOKS_EVERY = 0.5
"""Seconds between two looks at the version of a server that somebody else updates."""


def adapter_name(version: str) -> str:
    """Return the name that the adapter of a version has on a server."""
    return f"remax-{version}"


def weight_version(model: PreTrainedModel) -> str:
    """Return a digest of the weights that are trained: the adapter's, or all of a policy without one.

    A tensor is hashed where it lies (`torch.hash_tensor`), which reads each weight once. All ranks have to call this
    where the policy is sharded, and get the same.
    """
    only_adapter = has_adapter(model)
    digest = hashlib.sha256()
    for name, tensor in full_tensors(model):
        if only_adapter and ".lora_" not in name:
            continue
        # A tensor alone would not notice that two of the same shape have changed places; its name is hashed with it.
        value = int(torch.hash_tensor(tensor.detach()).view(torch.int64))
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {value}".encode())
    return digest.hexdigest()[:16]


# ---- Loading ----


def has_version(server: VLLMServer, version: str, *, is_adapter: bool) -> bool:
    """Whether a server holds a version."""
    if is_adapter:
        return adapter_name(version) in _model_names(server)
    return held_version(server) == version


def _model_names(server: VLLMServer) -> list[str]:
    cards = server.value("/v1/models", "data")
    return [str(server.read("/v1/models", card, "id")) for card in cards]


def load_version(
    server: VLLMServer, files: WeightFiles, version: str, transfer: FileTransfer, *, is_adapter: bool
) -> None:
    """Let a server load a version, and check that it says so.

    Args:
        server: that loads it.
        files: where it is.
        version: of the weights.
        transfer: how it gets to the server; adapters are files always.
        is_adapter: whether it is an adapter.

    Raises:
        UserError: if it cannot load it, or still has another one.
        ServerGoneError: if it does not answer.
    """
    folder = files.folder(version)
    try:
        if is_adapter:
            _load_adapter(server, version, str(folder))
        else:
            _load_weights(server, version, folder, transfer)
    except MissingError as error:
        what = (
            "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" if is_adapter else f"the transfer engine {BACKEND}"
        )
        raise UserError(
            f"{server!r} cannot load weights ({error}); start it with `remax serve`, or with {what}"
        ) from None
    if not has_version(server, version, is_adapter=is_adapter):
        raise UserError(f"{server!r} was never updated: it took the weights of version {version} and has others still")


def _load_weights(server: VLLMServer, version: str, folder: Path, transfer: FileTransfer) -> None:
    """Send the server through vLLM's phases of a weight update."""
    # Nothing may be generated while weights change; what is under way belongs to weights that are replaced. The cache
    # of prefixes goes, too: its keys and values are those of the old weights.
    server.post("/pause?mode=abort&clear_cache=true")
    timeout = server.options.transfer_timeout
    try:
        transfer.connect(server)
        _begin_update(server, timeout)
        transfer.deliver(server, folder)
        server.post("/finish_weight_update", {"weight_version": version}, timeout)
        transfer.delivered(server, version)
    finally:
        # A server that fails here tells less than the error that brought us here.
        with suppress(UserError, MissingError, ServerGoneError):
            server.post("/resume")


def end_open_update(server: VLLMServer) -> None:
    """Let a server answer again that a trainer has left paused, which was killed in an update of its weights.

    Its weights are then of no version, and the next rollout sends all of them.

    Raises:
        ServerGoneError: if it does not answer.
    """
    with suppress(MissingError):  # a server whose weights nobody updates
        if not server.value("/is_paused", "is_paused"):
            return
        with suppress(ServerGoneError):  # where it was paused, and no update begun
            server.post("/finish_weight_update", {"weight_version": _UNFINISHED}, server.options.transfer_timeout)
        server.post("/resume")


def _begin_update(server: VLLMServer, timeout: float) -> None:
    try:
        server.post("/start_weight_update", None, timeout)
    except ServerGoneError as error:
        if error.status != 500:
            raise
        # A trainer that was killed in an update has left it open, and vLLM begins no other until it is finished.
        with suppress(ServerGoneError):
            server.post("/finish_weight_update", {"weight_version": _UNFINISHED}, timeout)
        server.post("/start_weight_update", None, timeout)


def _load_adapter(server: VLLMServer, version: str, folder: str) -> None:
    name = adapter_name(version)
    body = {"lora_name": name, "lora_path": folder}
    server.post("/v1/load_lora_adapter", body, server.options.transfer_timeout)
    # Those of earlier versions; an adapter of somebody else has another name.
    for other in _model_names(server):
        if other.startswith("remax-") and other != name:
            with suppress(MissingError):
                server.post("/v1/unload_lora_adapter", {"lora_name": other})


def same_dtype(model: PreTrainedModel, info: Mapping[str, ServerInfo]) -> torch.dtype | None:
    """Return the dtype that all servers have, for files of no more bytes than they keep; None for the weights' own."""
    names = {item.dtype for item in info.values()}
    if len(names) != 1 or None in names:
        return None
    dtype: Any = getattr(torch, str(names.pop()), None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return None
    widest = max((parameter.element_size() for parameter in model.parameters()), default=0)
    return dtype if dtype.itemsize < widest else None


class WeightSync:
    """Brings servers to the weights of the policy, and knows which version that is.

    Args:
        servers: all of them; ranks share them.
        files: where the weights of a version are.
        transfer: how they get from there to the servers.
        timeout: seconds that loading them may take.
        on_each_node: whether the first rank of every machine writes files, for servers that see only those of theirs;
            otherwise rank 0 alone does.
        inspect: is called with a server that has weights of which this object knows nothing, because it restarted or
            somebody else has changed them, before it loads some.
        check: is called with a server that has loaded weights, to compare them with the files; None compares nothing.
    """

    def __init__(
        self,
        servers: Sequence[VLLMServer],
        files: WeightFiles,
        transfer: FileTransfer,
        timeout: float,
        on_each_node: bool,
        inspect: Callable[[VLLMServer], None],
        check: Callable[[VLLMServer, WeightFiles, str], None] | None,
    ) -> None:
        self.servers, self.files, self._transfer, self._timeout = servers, files, transfer, timeout
        self._on_each_node, self._inspect, self._check = on_each_node, inspect, check
        self._is_writer: bool | None = None  # until the first update
        self._needs_files = True
        self.version, self.num_versions, self.num_bytes = "", 0, 0
        self.num_restarts = 0
        """Of servers, as far as this rank has noticed; the reader sets it back."""
        self._seen: dict[str, str] = {}  # the version that a server had when it was looked at last, by URL
        self._writing = threading.Lock()
        self._watcher: threading.Thread | None = None

    def update(self, model: PreTrainedModel, dtype: torch.dtype | None, drain: Callable[[], None]) -> bool:
        """Bring all servers to the weights of the policy, and return whether those are new; all ranks call it.

        Args:
            model: the policy.
            dtype: of the files; None writes weights as they are.
            drain: waits for the responses that this rank has under way. An update would abort them, and no server
                could get their weights anew.

        Raises:
            UserError: on every rank, if one cannot write the weights or bring a server up to date.
        """
        version, is_adapter = weight_version(model), has_adapter(model)
        self._transfer.device = model.device
        is_new = version != self.version
        if is_new:
            with agree_on_errors():
                drain()
            if self._is_writer is None:
                hosts = gather_objects(socket.gethostname()) if self._on_each_node else [""] * num_ranks()
                self._is_writer = hosts.index(hosts[rank()]) == rank()
            with agree_on_errors(), self._writing:  # in place of waiting for files that rank 0 will never write
                dtype = None if is_adapter else dtype
                held = self._transfer.hold(model, dtype)
                self._needs_files = held is None
                self.num_bytes = held or self.files.write(model, version, dtype, is_writer=self._is_writer)
                self.version, self.num_versions = version, self.num_versions + 1

        def load(server: VLLMServer, stop: threading.Event) -> None:
            server.insist(lambda: self.bring_up_to_date(server, is_adapter=is_adapter), "loading weights", stop)

        # What rank 0 alone can do, the others do not wait for where it fails.
        with agree_on_errors() if self._transfer.sends else nullcontext():
            if rank() == 0 or not self._transfer.sends:
                Flight(self.servers, load, self.servers, len(self.servers)).wait("servers that load weights")
        if self._transfer.sends and rank() == 0 and num_ranks() > 1 and self._watcher is None:
            self._watcher = threading.Thread(target=watch, args=(weakref.ref(self),), daemon=True, name="vllm-watcher")
            self._watcher.start()
        return is_new

    def bring_up_to_date(self, server: VLLMServer, *, is_adapter: bool) -> None:
        """Let one server load the current weights unless it has them; any rank may find that it has not.

        Raises:
            UserError: if it cannot load them.
            ServerGoneError: if it does not answer.
        """
        version = self.version
        if self._has(server, is_adapter=is_adapter) or not self._waits_for_turn(server, is_adapter=is_adapter):
            return
        # One rank at a time; the next one finds the server up to date.
        with self.files.locked(server.url.partition("://")[2]):
            if self._has(server, is_adapter=is_adapter):
                return
            if not self._is_known(server, is_adapter=is_adapter):
                self.num_restarts += server.url in self._seen
                self._inspect(server)
            load_version(server, self.files, version, self._transfer, is_adapter=is_adapter)
            self._seen[server.url] = version
            if self._check is not None and not is_adapter:
                self._check(server, self.files, version)

    def _has(self, server: VLLMServer, *, is_adapter: bool) -> bool:
        """Whether a server has the current weights."""
        is_there = has_version(server, self.version, is_adapter=is_adapter)
        if is_there:
            self._seen[server.url] = self.version
        return is_there

    def _is_known(self, server: VLLMServer, *, is_adapter: bool) -> bool:
        """Whether a server has the weights that it had when it was looked at last."""
        seen = self._seen.get(server.url)
        return seen is not None and has_version(server, seen, is_adapter=is_adapter)

    def _waits_for_turn(self, server: VLLMServer, *, is_adapter: bool) -> bool:
        """Wait until this rank can bring a server up to date, and return True, or another one has.

        Where rank 0 sends the weights, no other rank can; and a rank that does not see the files yet waits for them.
        """
        sender_only = self._transfer.sends and rank() != 0
        end = time.monotonic() + self._timeout
        while sender_only or (self._needs_files and not self.files.is_complete(self.version)):
            if time.monotonic() >= end:
                break
            time.sleep(_LOOKS_EVERY)
            if self._has(server, is_adapter=is_adapter):
                return False
        else:
            return True
        if sender_only:
            raise UserError(
                f"{server!r} has other weights than version {self.version}, and rank 0 has not sent them to it within"
                f" {self._timeout:g} s ({KEY}.transfer_timeout)"
            )
        raise UserError(
            f"{KEY}.transfer_dir: no rank has written the weights of version {self.version} to"
            f" {str(self.files.root)!r} within {self._timeout:g} s; every rank and server has to see this folder, and"
            " all ranks the same weights"
        )

    def look_after_servers(self) -> None:
        """Bring servers up to date that restarted, as far as they are there."""
        for server in self.servers:
            # One that is gone is looked at again; what cannot be loaded is told by the ranks that wait for it.
            with self._writing, suppress(UserError, MissingError, ServerGoneError, OSError):
                self.bring_up_to_date(server, is_adapter=False)


def watch(reference: weakref.ref[WeightSync]) -> None:
    """Send weights to servers that restarted: other ranks notice, and rank 0 may have all of its responses."""
    while True:
        time.sleep(_LOOKS_EVERY)
        sync = reference()
        if sync is None:  # its run has ended
            return
        sync.look_after_servers()
        del sync
