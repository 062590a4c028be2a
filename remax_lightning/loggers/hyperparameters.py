"""The hyper-parameters of a run for its loggers: the configuration, versions, and the state of the code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from remax_lightning.credentials import hide_credentials, is_secret
from remax_lightning.loggers.adapters import logger_adapters
from remax_lightning.version import __version__

PACKAGES = ("torch", "transformers", "lightning", "datasets", "peft", "deepspeed", "vllm")
"""Packages that decide what a run computes; those that are not installed are left out."""

TRAINER = ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")
"""What is told of the trainer where there is no configuration of the command line."""


def log_hyperparameters(trainer: Trainer, pl_module: LightningModule) -> None:
    """Log configuration, versions and git state to every logger of a run; call it on rank 0."""
    params = {"config": _without_secrets(_configuration(trainer, pl_module)), **environment()}
    for adapter in logger_adapters(trainer):
        adapter.log_hyperparameters(params)


def run_config(trainer: Trainer) -> dict[str, Any] | None:
    """Return the configuration that the command line has parsed; None without one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            return cast("dict[str, Any]", yaml.safe_load(callback.parser.dump(callback.config)))
    return None


def environment() -> dict[str, Any]:
    """Return the versions that a run depends on, and the commit of the current folder, where it is a repository."""
    versions = {"python": sys.version.split()[0], "remax_lightning": __version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    state = git_state(Path.cwd())
    return {"versions": versions, "git": state} if state else {"versions": versions}


def git_state(folder: Path) -> dict[str, Any]:
    """Return `commit`, and `dirty`: whether a tracked file differs from it; nothing outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {} if commit is None or status is None else {"commit": commit.strip(), "dirty": bool(status.strip())}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return done.stdout if done.returncode == 0 else None


def _configuration(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return what the command line has parsed, or what the objects of a script say of themselves."""
    config = run_config(trainer)
    if config is not None:
        return config
    arguments = getattr(pl_module, "hyper_parameters", lambda: pl_module.hparams)()
    name = f"{type(pl_module).__module__}.{type(pl_module).__qualname__}"
    return {
        "model": {"class_path": name, "init_args": _plain(arguments)},
        "trainer": {key: _plain(getattr(trainer, key, None)) for key in TRAINER},
    }


def _plain(value: Any) -> Any:
    """Return a value in the types of JSON; of other objects, the name of their class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    kind = value if isinstance(value, type) or hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _without_secrets(node: Any) -> Any:
    """Return a configuration in which keys, tokens, headers and passwords are stars: loggers may be public."""
    if isinstance(node, Mapping):
        return {
            key: "***" if value and is_secret(str(key)) and not isinstance(value, bool | int | float)
            else _without_secrets(value)
            for key, value in node.items()
        }  # fmt: skip
    if isinstance(node, list):
        return [_without_secrets(item) for item in node]
    return hide_credentials(node) if isinstance(node, str) else node
