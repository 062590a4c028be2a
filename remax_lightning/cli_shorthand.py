"""What a configuration may leave out: names that stand for a group, and defaults that depend on another key.

`model.policy: Qwen/Qwen2.5-0.5B-Instruct` stands for its `path`, `model.reward: my_rewards.politeness` for a
`FunctionReward`, a list of rewards for a `WeightedReward`, and `model.rollout: PairedEngine` for the class of this
package. All are written out before jsonargparse sees the configuration, so that types, messages and the saved
`config.yaml` know one form only.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from typing import Any

from remax_lightning.errors import UserError

SUBCOMMANDS = ("fit", "validate", "test", "predict")
_MODELS = ("policy", "reference", "reward_model")
_RATES = {"ReMaxModule": (1e-6, 1e-5), "SFTModule": (1e-5, 1e-4), "RewardModelModule": (1e-5, 1e-4)}
"""Default learning rates of all weights, as in the modules' signatures, and of an adapter, which starts from zero.

jsonargparse keeps the values of `configs/base.yaml`'s module, those of its optimizer too, where another one is chosen.
"""
_FILES = (".yaml", ".yml", ".json")
_HOMES = ("baselines", "callbacks", "data", "loggers", "modules", "rewards", "rollout", "strategies")
"""Packages whose classes a configuration may name."""
CLASS_KEYS = ("model", "data", "optimizer", "lr_scheduler", "reward", "baseline", "rollout", "logger", "strategy",
              "callbacks")  # fmt: skip
"""Keys of classes, at any depth, which may be a name alone; in `callbacks` and `logger` also each of a list."""


@cache
def our_classes() -> dict[str, str]:
    """Return the classes of this package that a configuration may name, with the paths that jsonargparse saves."""
    top = import_module("remax_lightning")
    classes: dict[str, str] = {}
    for home in _HOMES:
        package = import_module(f"remax_lightning.{home}")
        for name in package.__all__:
            kind = getattr(package, name)
            # Groups of options have keys of their own, and an abstract class or a protocol makes no object.
            if not inspect.isclass(kind) or is_dataclass(kind) or issubclass(kind, tuple):
                continue
            if home == "baselines" and not issubclass(kind, package.Baseline):  # what they compute with
                continue
            if not inspect.isabstract(kind) and not getattr(kind, "_is_protocol", False):
                classes[name] = f"{top.__name__ if name in top.__all__ else package.__name__}.{name}"
    return classes


def write_out(config: Any) -> Any:
    """Return a configuration, as read from a file, with its shorthand written out; other values as they are."""
    if isinstance(config, dict):
        config = _write_out_names(config)
    for model in _models(config):
        # The arguments stand under `init_args`, or directly.
        for arguments in (model, model.get("init_args") if isinstance(model, dict) else None):
            if isinstance(arguments, dict):
                _write_out_model(arguments)
    return config


def _write_out_names(value: Any, key: str = "") -> Any:
    """Return a value with the names of our classes written out as paths.

    Args:
        value: of a configuration, at any depth.
        key: that it stands under, or that its list stands under.
    """
    if isinstance(value, dict):
        # "parts" of a reward are rewards by names of their own
        inner = {name: "reward" if key == "parts" else str(name) for name in value}
        return {name: _write_out_names(item, inner[name]) for name, item in value.items()}
    if isinstance(value, list):
        return [_write_out_names(item, key) for item in value]
    if not isinstance(value, str) or key not in (*CLASS_KEYS, "class_path"):
        return value
    path = our_classes().get(value)
    if path is None or key == "class_path":
        return value if path is None else path
    return {"class_path": path}


def _write_out_model(arguments: dict[str, Any]) -> None:
    for name in _MODELS:
        if isinstance(arguments.get(name), str):
            arguments[name] = {"path": arguments[name]}
    if "reward" in arguments:
        arguments["reward"] = _write_out_reward(arguments["reward"], "model.reward")


def _write_out_reward(reward: Any, key: str) -> Any:
    """Return a reward with its functions and lists written out as classes, those of its parts too.

    Raises:
        UserError: if an argument stands beside the class, where it would not be read.
    """
    # "my_rewards.politeness", or a list of these and of classes, whose sum counts
    if is_function(reward):
        return {"class_path": "FunctionReward", "init_args": {"function": reward}}
    if isinstance(reward, list) and reward:
        reward = {"class_path": "WeightedReward", "init_args": {"parts": named_parts(reward)}}
    if not isinstance(reward, dict) or "class_path" not in reward:
        return reward
    for name in reward:
        if name not in ("class_path", "init_args", "dict_kwargs"):
            raise UserError(f"{key}.{name}: arguments of a class stand under init_args; write {key}.init_args.{name}")
    # ---- Rewards among the arguments: the parts of a sum, and what has a deadline ----
    arguments = reward.get("init_args")
    if isinstance(arguments, dict):
        arguments = dict(arguments)
        if isinstance(arguments.get("parts"), dict):
            parts = arguments["parts"]
            arguments["parts"] = {
                name: _write_out_reward(part, f"{key}.init_args.parts.{name}") for name, part in parts.items()
            }
        if "reward" in arguments:
            arguments["reward"] = _write_out_reward(arguments["reward"], f"{key}.init_args.reward")
        reward = {**reward, "init_args": arguments}
    return reward


def named_parts(rewards: Sequence[Any]) -> dict[str, Any]:
    """Return a list of rewards as parts, by the names of their functions and classes."""
    # [f, g, f] -> "f", "g", "f_2"
    parts: dict[str, Any] = {}
    for number, item in enumerate(rewards):
        source = item.get("class_path") if isinstance(item, dict) else item
        name = str(source).rpartition(".")[2]
        parts[name if name not in parts else f"{name}_{number}"] = item
    return parts


def write_out_option(name: str, value: str | None) -> list[str] | None:
    """Return the options of the command line that an option in shorthand stands for; None if it is none.

    Args:
        name: as in `model.policy`, without dashes.
        value: what it is set to; a YAML file or a group in braces is no shorthand.
    """
    # "model.init_args.policy" -> head "model", key "policy"
    head, _, key = name.replace(".init_args.", ".").rpartition(".")
    if value in our_classes() and key in ("class_path", "help", "rollout", "strategy"):
        path = our_classes()[value]
        # A strategy may also be text, which a path would be taken for.
        return [f"--{name}={json.dumps({'class_path': path}) if key == 'strategy' else path}"]
    if head != "model" or not value or value[0] in "{[" or value.endswith(_FILES):
        return None
    if key in _MODELS and value != "null":
        return [f"--{name}.path={value}"]
    if key == "reward" and is_function(value):
        return [f"--{name}=FunctionReward", f"--{name}.init_args.function={value}"]
    return None


def is_function(path: Any) -> bool:
    """Whether a text is the dotted path of a function, or of something that cannot be imported, and not of a class."""
    if not isinstance(path, str) or not any(mark in path for mark in ".:/"):  # "rewards:score" is told what to write
        return False
    module, _, name = path.rpartition(".")
    try:
        return not inspect.isclass(getattr(import_module(module), name))
    except Exception:  # FunctionReward says what is wrong with it
        return True


def dependent_defaults(configs: Sequence[Any]) -> dict[str, Any]:
    """Return the values of keys that are not set, and whose default depends on others.

    Args:
        configs: what each file or option sets, in the form of a file.
    """
    defaults: dict[str, Any] = {}
    if (rate := default_rate(configs)) is not None:
        defaults["model.optimizer.init_args.lr"] = rate
    # ---- max_epochs: base.yaml's one epoch, unless the run has another end ----
    trainer: dict[str, Any] = {}
    for group in (group for config in configs for group in _groups(config)):
        trainer |= group["trainer"] if isinstance(group.get("trainer"), Mapping) else {}
    limits = (trainer.get("max_steps", -1) not in (-1, None), trainer.get("max_time") is not None)
    if any(limits) and "max_epochs" not in trainer:
        defaults["trainer.max_epochs"] = -1  # another length was asked for; one epoch would cut it short
    return defaults


def default_rate(configs: Iterable[Any]) -> float | None:
    """Return the learning rate that the module and an adapter call for; None where the configurations set one.

    Args:
        configs: what each file or option sets, in the form of a file.
    """
    module, has_adapter = "ReMaxModule", False
    # ---- Module, optimizer and adapter, as the last configuration sets them ----
    for model in (model for config in configs for model in _models(config)):
        if isinstance(model, str):
            module = model
            continue
        module = str(model.get("class_path", module))
        inner = model.get("init_args")
        arguments = {**model, **inner} if isinstance(inner, Mapping) else model
        optimizer = arguments.get("optimizer")
        if isinstance(optimizer, Mapping) and ("lr" in optimizer or "lr" in (optimizer.get("init_args") or {})):
            return None
        for name in _MODELS:
            source = arguments.get(name)
            if name != "reference" and isinstance(source, Mapping) and "lora" in source:
                has_adapter = source["lora"] is not None  # the last one counts
    # ---- The module's rate; none for a class of the user's own ----
    rates = _RATES.get(module.rpartition(".")[2])
    return None if rates is None else rates[has_adapter]


def _models(config: Any) -> Iterator[Any]:
    """Yield what a configuration sets under `model`."""
    for group in _groups(config):
        if isinstance(model := group.get("model"), Mapping | str):
            yield model


def _groups(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the keys of a configuration for all subcommands, and those for each."""
    if isinstance(config, Mapping):
        yield config
        yield from (config[name] for name in SUBCOMMANDS if isinstance(config.get(name), Mapping))
