"""`remax serve`: start a vLLM server for the policy of a configuration, with all that `VLLMEngine` needs of it."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from remax_lightning.cli_run import computes_in_bfloat16, run
from remax_lightning.errors import UserError
from remax_lightning.modules import ReMaxModule
from remax_lightning.rollout import VLLMEngine
from remax_lightning.rollout.vllm_server import served_policy, server_arguments, server_environment
from remax_lightning.tools.parsers import serve_parser
from remax_lightning.tools.plan.run_config import OLD_PRECISIONS, PlanCLI

_DTYPES = {"16": "float16", "bf16": "bfloat16"}
"""Dtype of a server by `trainer.precision`, without its mode."""


class ServeCommand(NamedTuple):
    """A command with its environment.

    Args:
        arguments: the program first.
        environment: variables that are set for it, beside those of this process.
    """

    arguments: list[str]
    environment: dict[str, str]

    def __str__(self) -> str:
        """As it is typed in a shell, without the key."""
        shown = {name: value for name, value in self.environment.items() if name != "VLLM_API_KEY"}
        return " ".join(
            [*(f"{name}={shlex.quote(value)}" for name, value in shown.items()), shlex.join(self.arguments)]
        )


def main(args: Sequence[str]) -> None:
    """Start a vLLM server for the policy of a configuration.

    All other arguments are those of `remax fit`; what follows `--` goes to vLLM, such as `-- --tensor-parallel-size 2`.

    Args:
        args: the arguments after `remax serve`.
    """
    args, _, extra = _split(args)
    options, rest = serve_parser().parse_known_args(args)
    command = serve_command(rest, options.python, options.host, options.port, extra)
    print(command, flush=True)
    if options.only_print:
        return
    program = shutil.which(command.arguments[0])
    if program is None:
        raise UserError(
            f"remax serve: there is no {options.python!r}; install vLLM in an environment of its own (python -m venv"
            " .venv-vllm && .venv-vllm/bin/pip install vllm==0.32.0), or give --python of one that is there"
        )
    # In place of this process, so that signals and logs are the server's own.
    os.execvpe(program, command.arguments, {**os.environ, **command.environment})


def _split(args: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Return the arguments before and after `--`."""
    args = list(args)
    index = args.index("--") if "--" in args else len(args)
    return args[:index], "--", args[index + 1 :]


def serve_command(
    config: Sequence[str], python: str, host: str | None, port: int | None, extra: Sequence[str]
) -> ServeCommand:
    """Return the command that serves the policy of a configuration.

    Args:
        config: arguments of `remax fit`.
        python: of the environment with vLLM.
        host: address; None takes that of the engine's first URL on this machine, or else of its first one.
        port: None takes that of the same URL.
        extra: further arguments for vLLM.

    Raises:
        UserError: if the configuration trains no policy with ReMax.
    """
    cli = run(["fit", *config], PlanCLI)
    module, trainer = cli.model, cli.config_init["fit"]["trainer"]
    if not isinstance(module, ReMaxModule):
        raise UserError(f"model: remax serve is for ReMaxModule, got {type(module).__name__}")
    engine = module.engine if isinstance(module.engine, VLLMEngine) else None
    url = None if engine is None else _url_here([server.url for server in engine.servers])
    if engine is not None and engine.mode == "colocate":
        raise UserError("model.rollout.init_args.mode colocate starts its servers itself; leave `remax serve` out")
    source = module.policy_source
    length = getattr(cli.datamodule, "max_prompt_length", None)
    policy = served_policy(source, _dtype(trainer, source.dtype), module.sampling, length, module.tokenizer_path)
    host, port = host or ((url and url.hostname) or "127.0.0.1"), port or (url and url.port) or 8000
    environment = server_environment(None if engine is None else engine.options.api_key_env)
    return ServeCommand(server_arguments(python, policy, host, port, extra), environment)


def _url_here(urls: Sequence[str]) -> SplitResult:
    """Return the first URL whose host is this machine; the first one where none is."""
    parts = [urlsplit(url) for url in urls]
    if len(parts) == 1:  # it is no mistake to start it elsewhere, behind a forwarded port
        return parts[0]
    return next((part for part in parts if _is_here(part.hostname or "")), parts[0])


def _is_here(host: str) -> bool:
    """Whether an address of a host is one of this machine, at which a program can listen."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, address in addresses:
        with suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(address)
            return True
    return False


def _dtype(trainer: Mapping[str, Any], weights: str | None) -> str:
    """Return the dtype that the trainer computes in."""
    precision = trainer["precision"]
    if precision is None:
        return "bfloat16" if computes_in_bfloat16(trainer["accelerator"]) else weights or "float32"
    number, _, mode = OLD_PRECISIONS.get(str(precision), str(precision)).partition("-")
    return _DTYPES.get(number, "float32") if mode == "mixed" or weights is None else weights
