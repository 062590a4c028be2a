"""A vLLM server in a child process, which shares the device of the trainer: `VLLMEngine` with `mode: colocate`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import torch

from remax_lightning.distributed import rank
from remax_lightning.errors import UserError
from remax_lightning.rollout.vllm_client import KEY, VLLMServer
from remax_lightning.rollout.vllm_server import ServedPolicy, server_arguments, server_environment

MEMORY_SHARE = 0.4
"""Of the device for a server that shares it: its weights and keys while it is awake, beside those of training."""
_LOG_PREFIX = re.compile(r"^(\([^)]*\) *)?((ERROR|INFO|WARNING) [\d-]+ [\d:]+ \[[^\]]*\] *)?")
_SECONDS_TO_END = 10.0
"""For a server to end by itself before it is killed."""


def free_port() -> int:
    """Return a port of this machine that nothing listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_server(
    server: VLLMServer, policy: ServedPolicy, python: str, extra: Sequence[str], device: torch.device
) -> ServerProcess:
    """Let a server of this process listen at the URL of `server`, which starts it and waits for it.

    Args:
        server: the client.
        policy: that it serves.
        python: of the environment with vLLM.
        extra: further arguments of `vllm serve`, which come last and count.
        device: of the policy, which it shares.
    """
    on_cuda, options = device.type == "cuda", server.options
    shared = ["--enable-sleep-mode", "--gpu-memory-utilization", str(MEMORY_SHARE)] if on_cuda else []
    port = urlsplit(server.url).port or 0
    command = server_arguments(python, policy, "127.0.0.1", port, [*shared, *extra])
    process = ServerProcess(command, options.api_key_env, options.retries, (device.index or 0) if on_cuda else None)
    server.revive = process.start
    return process


def memory_share(extra: Sequence[str]) -> float:
    """Return the share of the device's memory that a server takes which the engine starts with these arguments.

    Raises:
        UserError: if it is none.
    """
    share = str(MEMORY_SHARE)
    for index, argument in enumerate(extra):
        name, _, value = argument.replace("_", "-").partition("=")
        if name == "--gpu-memory-utilization":
            share = value or next(iter(extra[index + 1 :]), "")
    try:
        number = float(share)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise UserError(
            f"{KEY}.server_args: --gpu-memory-utilization must be above 0 and at most 1 (a share of the device's"
            f" memory), got {share!r}"
        )
    return number


class ServerProcess:
    """A server in a child process, started again when it dies, and ended with this process, however that ends.

    Args:
        arguments: the command, see `server_arguments`.
        api_key_env: environment variable with the server's key.
        restarts: how often it may die.
        device: number of the CUDA device that it shares with this process; None on a CPU.

    Raises:
        UserError: if there is no such program.
    """

    def __init__(self, arguments: Sequence[str], api_key_env: str | None, restarts: int, device: int | None) -> None:
        if shutil.which(arguments[0]) is None:
            raise UserError(
                f"model.rollout.init_args.python: there is no {arguments[0]!r}; install vLLM in an environment of its"
                " own (python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm==0.32.0), or name one's Python"
            )
        self.arguments, self._left = list(arguments), restarts
        self._environment = {**os.environ, **server_environment(api_key_env), "REMAX_VLLM_PARENT": str(os.getpid())}
        # Of the ranks of a launcher it must not take the process group for its own.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
            self._environment.pop(name, None)
        if device is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            self._environment["CUDA_VISIBLE_DEVICES"] = (
                visible[device] if device < len(visible) and visible[0] else str(device)
            )
        descriptor, name = tempfile.mkstemp(prefix=f"remax-vllm-rank{rank()}-", suffix=".log")
        os.close(descriptor)
        self.log, self._log_start = Path(name), 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The number of its process, once it is started."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it unless it runs.

        Raises:
            UserError: if it has died as often as it may, with its last words.
        """
        if self._process is not None and self._process.poll() is None:
            return
        if self._process is not None:
            if self._left == 0:
                raise UserError(
                    f"model.rollout: the vLLM server of this process ended with code {self._process.returncode}:"
                    f" {self.last_words()}; its log is {str(self.log)!r}"
                )
            self._left -= 1
            self._end_group()  # workers that outlived it hold the device's memory
        self._log_start = self.log.stat().st_size
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.arguments, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C is for the trainer
            )  # fmt: skip

    def stop(self) -> None:
        """End it and its workers; the log stays only where it tells of an error."""
        process, self._process = self._process, None
        if process is None:
            return
        is_dead = process.poll() is not None
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
        self._end_group(process)
        process.wait()
        if not is_dead:
            self.log.unlink(missing_ok=True)

    def _end_group(self, process: subprocess.Popen[bytes] | None = None) -> None:
        process = process or self._process
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[union-attr]

    def last_words(self) -> str:
        """Return the last line of its log that tells of an error and not of another one above, or its last line."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            text = log.read().decode(errors="replace")
        # "(EngineCore pid=7) ERROR 11-28 00:10:01 [core.py:12] ValueError: ..." without what stands before it
        lines = [re.sub(_LOG_PREFIX, "", line).strip() for line in text.splitlines()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b(?!.*root cause above)", line)]
        return next(reversed(errors or [line for line in lines if line]), "it said nothing")[:300]
