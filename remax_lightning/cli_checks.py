"""Checks of a configuration's values after parsing, before any object is made; all mistakes are told together.

The classes of this package check their own arguments; `cli_rules.py` has what Lightning and torch do not check at once.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import StrategyRegistry

from remax_lightning.cli_arguments import flatten
from remax_lightning.cli_errors import close_name
from remax_lightning.cli_rules import explain_rule
from remax_lightning.errors import UserError
from remax_lightning.files import first_existing

GROUPS = ("trainer", "model", "data", "model.policy", "model.reference", "model.sampling", "model.kl",
          "model.advantage", "model.loss", "data.loading",
          "data.selection")  # fmt: skip
"""Keys that hold others: a single value, or a list, would be passed on as it is."""

CLASSES = ("*.optimizer", "*.lr_scheduler", "*.reward", "*.rollout", "*.parts.*", "*.init_args", "trainer.logger",
           "trainer.logger.[0-9]*", "trainer.strategy", "trainer.profiler", "trainer.callbacks.[0-9]*")  # fmt: skip
"""Keys of classes, which may stand in a file of their own as the groups may."""

OPTIONAL_GROUPS = ("model", "model.policy", "model.reference")
"""Groups that may be null; where one must not be, the parser says that it is missing."""

FILES = ("predictions.path",)
"""Keys of files that are written at the end of a run, when a wrong path would cost the run."""

FOLDERS = ("trainer.default_root_dir", "trainer.logger.init_args.save_dir", "trainer.callbacks.*.init_args.dirpath",
           "export.folder", "samples.folder", "evaluation.folder")  # fmt: skip
"""Keys of folders that are made while a run goes on."""


def check_config(config: Namespace | Mapping[str, Any], groups: Collection[str] = ()) -> None:
    """Refuse values that Lightning or torch would refuse late or take in silence.

    Args:
        config: the parsed configuration of a subcommand.
        groups: further keys at the top that hold others, such as those of callbacks.

    Raises:
        UserError: with one line per mistake.
    """
    mistakes = [f"{key}: {text}" for key, text in explain_values(config, groups).items()]
    if mistakes:
        raise UserError("\n  ".join(mistakes))


def explain_values(config: Namespace | Mapping[str, Any], groups: Collection[str] = ()) -> dict[str, str]:
    """Return what is wrong by key; arguments as in `check_config`."""
    mistakes = {}
    for key, value in flatten(config):
        if key in groups or (key in GROUPS and not (value is None and key in OPTIONAL_GROUPS)):
            mistakes[key] = f"expected a group of keys, got {'null' if value is None else value}"
        elif text := explain(key, value):
            mistakes[key] = text.removeprefix(f"{key}: ")
    # ---- A value that is a mapping: its names are no keys ----
    duration = dict(config.get("trainer") or {}).get("max_time") if "trainer" not in mistakes else None
    if text := explain_rule("trainer.max_time", duration):
        mistakes["trainer.max_time"] = text
    return mistakes


def explain_objects(config: Namespace, callbacks: Mapping[str, type]) -> list[str]:
    """Return what this package's groups of options, callbacks, module and data module refuse, a line each.

    They check their arguments when they are made, and do nothing else. Later they would stop at the first. If there is
    a mistake, the run will not begin, so rewards, engines and a trainer are made for what they say, too: code of the
    user's own may be called for that.

    Args:
        config: the parsed configuration of a subcommand.
        callbacks: classes by their keys.
    """
    mistakes: list[str] = []
    # ---- Callbacks; then module and data with the dataclasses among their arguments, at any depth ----
    for name, kind in callbacks.items():
        _make(kind, config.get(name), mistakes)
    for name in ("model", "data"):
        _make_class(config.get(name), mistakes, (LightningModule, LightningDataModule))
    # ---- What else there is: nothing of it will run ----
    if mistakes:
        _make_class(config.get("model"), mistakes, (object,))
        _make_trainer(config.get("trainer"), mistakes)
    return list(dict.fromkeys(mistakes))


def _make_class(value: Any, mistakes: list[str], kinds: tuple[type, ...]) -> Any:
    """Make an object of a class of this package, and the groups of options in any; None where that is not possible.

    Args:
        value: what stands at the key of a class, or a list or group of such.
        mistakes: what is refused is added to them.
        kinds: only their subclasses are made. In place of others stands what does nothing, or the default.
    """
    if isinstance(value, list):
        return [_make_class(item, mistakes, kinds) for item in value]
    if isinstance(value, dict):
        return {name: _make_class(item, mistakes, kinds) for name, item in value.items()}
    if not isinstance(value, Namespace) or "class_path" not in value:
        return value
    module, _, name = str(value.class_path).rpartition(".")
    try:
        # The types of the arguments say which of them are dataclasses.
        kind = getattr(import_module(module), name)
        hints = get_type_hints(kind.__init__)
    except (ImportError, AttributeError, NameError, TypeError, ValueError):  # the parser has said it, or will
        return None
    arguments, init_args = {}, value.get("init_args")
    for name, argument in vars(init_args).items() if isinstance(init_args, Namespace) else ():
        options = _dataclass(hints.get(name))
        if options is not None and isinstance(argument, Namespace) and "class_path" not in argument:
            arguments[name] = _make(options, argument, mistakes)
        elif (
            (made := _make_class(argument, mistakes, kinds)) is not None
            or argument is None
            or (made := _stand_in(hints.get(name))) is not None
        ):
            arguments[name] = made
    if not kind.__module__.startswith("remax_lightning.") or not issubclass(kind, kinds):
        return None
    return _call(kind, arguments, mistakes)


def _stand_in(hint: Any) -> Any:
    """Return an object of an abstract class, such as a reward, that nobody calls; None if the hint names none."""
    kind = next((item for item in (hint, *get_args(hint)) if isinstance(item, type) and isabstract(item)), None)
    if kind is None:
        return None
    methods: Any = dict.fromkeys(kind.__abstractmethods__)  # type: ignore[attr-defined]
    return object.__new__(type("StandIn", (kind,), methods))


def _make(kind: type, value: Any, mistakes: list[str]) -> Any:
    """Make an object of its options, those within first. A dataclass that refuses them holds them all the same.

    So what is around it can be checked with the values that were given.
    """
    if not isinstance(value, Namespace):
        return None
    hints = get_type_hints(getattr(kind, "__init__"))  # noqa: B009 - of a class, not of an instance
    arguments, before = {}, len(mistakes)
    for name, argument in vars(value).items():
        # An option that is a dataclass, too, is made first.
        inner = _dataclass(hints.get(name))
        arguments[name] = argument if inner is None or argument is None else _make(inner, argument, mistakes)
    made = _call(kind, arguments, mistakes) if len(mistakes) == before else None
    return _unchecked(kind, arguments) if made is None and is_dataclass(kind) else made


def _call(kind: type, arguments: dict[str, Any], mistakes: list[str]) -> Any:
    try:
        return kind(**arguments)
    except UserError as error:
        mistakes.append(str(error))
    except (Exception, SystemExit):  # of code of the user's own, or of arguments that are not whole; it is made later
        pass
    return None


def _unchecked(kind: type, arguments: Mapping[str, Any]) -> Any:
    """Return a dataclass without its checks; None if it lacks a value that has no default."""
    made: Any = object.__new__(kind)
    for field in fields(kind):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = arguments.get(field.name, default)
        if value is MISSING:
            return None
        object.__setattr__(made, field.name, value)
    return made


def _make_trainer(options: Any, mistakes: list[str]) -> None:
    """Make a trainer of its plain options, without loggers and callbacks, which would write files."""
    if not isinstance(options, Namespace):
        return
    # Strategies, loggers and callbacks of classes stay out; a name such as `ddp` comes in. What a rule refuses is told.
    plain = {
        name: value
        for name, value in vars(options).items()
        if not isinstance(value, Namespace | list | dict) and explain(f"trainer.{name}", value) is None
    }
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            Trainer(**{**plain, **quiet, "enable_model_summary": False})
    except (MisconfigurationException, ValueError) as error:
        text = str(error).strip()
        mistakes.append(text if text.startswith("trainer") else f"trainer: {text}")
    except Exception:  # it is made again, and its error told with a traceback
        pass
    finally:
        logging.disable(level)


def _dataclass(hint: Any) -> type | None:
    return next(
        # `KLConfig`, or `KLConfig | None`
        (option for option in (hint, *get_args(hint)) if isinstance(option, type) and is_dataclass(option)),
        None,
    )


def explain(key: str, value: Any) -> str | None:
    """Return what is wrong with the value of a key; None if nothing is, or no rule is about it."""
    if value is None:
        return None
    # no system takes it in a path, and the error would come late
    if isinstance(value, str) and "\0" in value:
        return f"{key}: {value[:60]!r} holds a null character"
    if text := explain_rule(key, value):
        return f"{key}: {text}"
    if key == "trainer.strategy" and isinstance(value, str):
        # The trainer would name all strategies of Lightning, and none of this package.
        names = ["auto", *StrategyRegistry.available_strategies()]
        if value not in names:
            close = close_name(value, names)
            hint = f"did you mean {close}?" if close else "give ddp, ReMaxDeepSpeedStrategy or ReMaxFSDP2Strategy"
            return f"{key}: there is no strategy {value!r}; {hint}"
    is_file = any(fnmatchcase(key, pattern) for pattern in FILES)
    if is_file or any(fnmatchcase(key, pattern) for pattern in FOLDERS):
        return _explain_path(key, str(value), is_file)
    return None


def takes_group(key: str) -> bool:
    """Whether a file may stand at a key in place of a class or a group of keys."""
    return key in GROUPS or any(fnmatchcase(key, pattern) for pattern in CLASSES)


def _explain_path(key: str, value: str, is_file: bool) -> str | None:
    if "://" in value:
        return None
    path = Path(value).expanduser().absolute()
    if any(len(os.fsencode(part)) > 255 for part in path.parts):  # the longest name that Linux file systems take
        return f"{key}: {value[:60]!r} is no path of this system"
    if is_file and path.is_dir():
        return f"{key}: {value!r} is a folder; give the path of a file in it"
    folder = path.parent if is_file else path
    # What does not exist yet will be made in the first folder above that does.
    existing = first_existing(folder)
    if not existing.is_dir():
        return f"{key}: cannot write to {value!r}: {str(existing)!r} is a file, not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{key}: cannot write to {value!r}: no right to write in {str(existing)!r}"
    return None
