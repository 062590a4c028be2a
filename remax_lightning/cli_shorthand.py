"""What a configuration may leave out: names that stand for a group, and defaults that depend on another key.

`model.policy: Qwen/Qwen2.5-0.5B-Instruct` stands for its `path`, and `model.reward: my_rewards.politeness` for a
`FunctionReward`; `model.rollout` knows its engines by their names. All are written out before jsonargparse sees the
configuration, so that types, messages and the saved `config.yaml` know one form only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

SUBCOMMANDS = ("fit", "validate", "test", "predict")
_MODELS = ("policy", "reference", "reward_model")
_RATES = {"ReMaxModule": (1e-6, 1e-5), "SFTModule": (1e-5, 1e-4), "RewardModelModule": (1e-5, 1e-4)}
"""Default learning rates of all weights, as in the modules' signatures, and of an adapter, which starts from zero.

jsonargparse keeps the values of `configs/base.yaml`'s module, those of its optimizer too, where another one is chosen.
"""
_ENGINES = ("AutoEngine", "HuggingFaceEngine", "PairedEngine", "VLLMEngine")
"""Engines by their short names, which jsonargparse finds for classes with a common base only."""
_FILES = (".yaml", ".yml", ".json")


def write_out(config: Any) -> Any:
    """Return a configuration, as read from a file, with its shorthand written out; other values as they are."""
    for model in _models(config):
        # The arguments stand under `init_args`, or directly.
        for arguments in (model, model.get("init_args") if isinstance(model, dict) else None):
            if isinstance(arguments, dict):
                _write_out_model(arguments)
    return config


def _write_out_model(arguments: dict[str, Any]) -> None:
    for name in _MODELS:
        if isinstance(arguments.get(name), str):
            arguments[name] = {"path": arguments[name]}
    if is_function(reward := arguments.get("reward")):
        arguments["reward"] = {"class_path": "FunctionReward", "init_args": {"function": reward}}
    engine = arguments.get("rollout")
    if isinstance(engine, str) and engine in _ENGINES:
        arguments["rollout"] = {"class_path": f"remax_lightning.rollout.{engine}"}
    elif isinstance(engine, dict) and engine.get("class_path") in _ENGINES:
        engine["class_path"] = f"remax_lightning.rollout.{engine['class_path']}"


def write_out_option(name: str, value: str | None) -> list[str] | None:
    """Return the options of the command line that an option in shorthand stands for; None if it is none.

    Args:
        name: as in `model.policy`, without dashes.
        value: what it is set to; a YAML file or a group in braces is no shorthand.
    """
    # "model.init_args.policy" -> head "model", key "policy"
    head, _, key = name.replace(".init_args.", ".").rpartition(".")
    if head != "model" or not value or value[0] in "{[" or value.endswith(_FILES):
        return None
    if key in _MODELS and value != "null":
        return [f"--{name}.path={value}"]
    if key == "rollout" and value in _ENGINES:
        return [f"--{name}=remax_lightning.rollout.{value}"]
    if key == "reward" and is_function(value):
        return [f"--{name}=FunctionReward", f"--{name}.init_args.function={value}"]
    return None


def is_function(path: Any) -> bool:
    """Whether a text is the dotted path of a function, or of something that cannot be imported, and not of a class."""
    if not isinstance(path, str) or "." not in path:
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
