"""The signatures of the classes that a configuration names, as jsonargparse reads them, for `cli_schema`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import version
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse._parameter_resolvers import ParamData, get_signature_parameters
from jsonargparse._typehints import (
    ActionTypeHint,
    callable_origin_types,
    mapping_origin_types,
    sequence_origin_types,
)
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from remax_lightning.baselines import Baseline
from remax_lightning.cli_help import RUNS
from remax_lightning.cli_schema import Parameter, Parameters
from remax_lightning.cli_shorthand import our_classes
from remax_lightning.errors import Range, ranges_of
from remax_lightning.rewards import Reward

_TRAINER = "lightning.pytorch.Trainer"
_LIBRARY_CLASSES = ("torch.optim.AdamW", "torch.optim.SGD", "lightning.pytorch.loggers.TensorBoardLogger")
"""Classes of libraries that most configurations name."""
_SIMPLE = {str: "str", int: "int", float: "float", bool: "bool", NoneType: "null"}
_BASES = (LightningModule, LightningDataModule, Reward, Baseline)
"""Base classes of which this package alone has subclasses, as long as no class of a user's own is imported."""
_HOMES = tuple(f"remax_lightning.{home}" for home in ("baselines", "data", "modules", "rewards"))
"""Where they are; the tools have subclasses that no configuration names."""


class LiveSignatures:
    """The signatures of installed classes, the user's own among them, which are imported when they are asked for.

    Args:
        callbacks: classes by their keys at the top of a configuration.
    """

    def __init__(self, callbacks: Mapping[str, type]) -> None:
        self._callbacks = callbacks

    @cached_property
    def classes(self) -> Mapping[str, str]:
        """The classes of this package by their names, with their paths."""
        return our_classes()

    @cached_property
    def names(self) -> Mapping[str, Sequence[str]]:
        """The names of this package's classes by the paths of their base classes."""
        imported = [_imported(path) for path in self.classes.values()]  # some are imported when they are first used
        assert None not in imported
        return {_path(base): [base.__name__, *sorted(set(_subclasses(base)))] for base in _BASES}

    def command(self, name: str) -> Parameters:
        """Return the keys at the top of a subcommand's configuration."""
        method = get_signature_parameters(Trainer, name)
        groups = {"trainer": _TRAINER}, {key: _path(kind) for key, kind in self._callbacks.items()}
        trainer, callbacks = ({key: Parameter([{"options": path}]) for key, path in group.items()} for group in groups)
        return {
            "config": Parameter(["any"]),
            "seed_everything": Parameter(["bool", "int"]),
            **trainer,
            "model": Parameter([{"class": _path(LightningModule)}], required=True),
            "data": Parameter([{"class": _path(LightningDataModule)}], required=True),
            **callbacks,
            # "ckpt_path" and its like; Lightning's command line makes the others
            **{
                argument.name: Parameter(describe_types(argument.annotation))
                for argument in method
                if argument.name not in ("model", "datamodule", "dataloaders")
                and not argument.name.endswith("_dataloaders")
            },
        }

    def parameters(self, path: str) -> Parameters | None:
        """Return the arguments of a class or a group of options; None if they cannot be told for sure."""
        kind = _imported(path)
        return _parameters(kind) if isinstance(kind, type) else None

    def described(self, path: str) -> Parameters | None:
        """Return them, for suggestions."""
        return self.parameters(path)


@cache  # jsonargparse reads the source of a class and of its bases for this
def _parameters(kind: type) -> Parameters | None:
    try:
        arguments = get_signature_parameters(kind)
        is_open = any(item.kind is item.VAR_KEYWORD for item in inspect.signature(kind).parameters.values())
    except Exception:  # of a class of the user's own; the parser tells what is wrong with it
        return None
    # What stands for `**` in the signature comes from a base class; where none is found, anything goes.
    if is_open and all(argument.parent is kind for argument in arguments):
        return None
    parameters = {argument.name: _parameter(argument) for argument in arguments}
    # ---- Defaults that the range of another argument needs, such as that of `batch_size` ----
    ranges = [parameter.range for parameter in parameters.values() if parameter.range is not None]
    named = {name for allowed in ranges for name in (allowed.up_to, allowed.divides)}
    numbers = {argument.name: argument.default for argument in arguments if argument.name in named}
    return parameters | {name: parameters[name]._replace(number=number) for name, number in numbers.items()}


def _parameter(argument: ParamData) -> Parameter:
    types, default = describe_types(argument.annotation), argument.default
    # jsonargparse makes {"class_path": "torch.optim.AdamW", ...} of `lambda parameters: AdamW(parameters, ...)`
    path = default.get("class_path") if isinstance(default, dict) else None
    required = default is inspect.Parameter.empty and "null" not in types
    return Parameter(types, required, path, _range(argument))


def _range(argument: ParamData) -> Range | None:
    """Return the range in the annotation of an argument; jsonargparse leaves it out of the type."""
    function: Any = argument.component
    if not (inspect.isfunction(function) and function.__module__.startswith("remax_lightning.")):
        return None
    return ranges_of(function).get(argument.name, (None, None))[0]


def describe_types(hint: Any) -> list[Any]:
    """Return what an annotation takes, as in `cli_schema.Parameter`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = [kind for option in inner for kind in describe_types(option)]
        return [kind for number, kind in enumerate(kinds) if kind not in kinds[:number]]
    if origin is Literal:
        return [{"choices": list(inner)}]
    if origin in sequence_origin_types and inner:
        return [{"list": describe_types(inner[0])}]
    if origin in mapping_origin_types and len(inner) == 2:
        return [{"mapping": describe_types(inner[1])}]
    if origin in callable_origin_types and len(inner) == 2:  # such as one that makes an optimizer of parameters
        hint = next((item for item in (inner[1], *get_args(inner[1])) if isinstance(item, type)), None)
    return [_describe_type(hint)]


def _describe_type(hint: Any) -> Any:
    """Return what an annotation without arguments takes."""
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if not isinstance(hint, type) or get_args(hint) or hint is inspect.Parameter.empty:
        return "any"
    if is_dataclass(hint):
        return {"options": _path(hint)}
    action: Any = ActionTypeHint
    return {"class": _path(hint)} if action.is_subclass_typehint(hint, all_subtypes=False) else "any"


def _path(kind: type) -> str:
    path = our_classes().get(kind.__name__)
    return path if path is not None and _imported(path) is kind else f"{kind.__module__}.{kind.__qualname__}"


def _imported(path: str) -> Any:
    """Return what a dotted path names; None if it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except Exception:  # the parser tells what is wrong with it
        return None


def _subclasses(base: type) -> Iterator[str]:
    """Yield the names of this package's subclasses of a class."""
    kinds: list[type] = base.__subclasses__()
    for kind in kinds:
        if kind.__module__.startswith(_HOMES) and not kind.__name__.startswith("_"):
            yield kind.__name__
        yield from _subclasses(kind)


# ---- What comes with the package ----


def shipped_content(callbacks: Mapping[str, type]) -> dict[str, Any]:
    """Return what `signatures.json` holds: commands, this package's classes, and what they take from libraries.

    Args:
        callbacks: classes by their keys at the top of a configuration.
    """
    live = LiveSignatures(callbacks)
    commands = {name: live.command(name) for name in RUNS}
    # ---- Classes and groups of options, and those among their arguments ----
    paths = [_TRAINER, *live.classes.values(), *_LIBRARY_CLASSES]
    paths += [path for command in commands.values() for path in _options(command)]
    parameters: dict[str, Parameters] = {}
    for path in paths:  # grows on the way
        if path not in parameters and (arguments := live.parameters(path)) is not None:
            parameters[path] = arguments
            paths += _options(arguments)
    # ---- What of it depends on the release of a library ----
    libraries = {path: names for path in parameters if (names := _libraries(path))}
    releases = {
        name: version(name).partition("+")[0]
        for name in sorted({name for names in libraries.values() for name in names})
    }
    return {
        "releases": releases,
        "libraries": libraries,
        "classes": dict(live.classes),
        "names": dict(live.names),
        "commands": {name: _encoded(command) for name, command in commands.items()},
        "parameters": {path: _encoded(arguments) for path, arguments in sorted(parameters.items())},
    }


def _options(parameters: Parameters) -> Iterator[str]:
    for parameter in parameters.values():
        yield from (kind["options"] for kind in parameter.types if isinstance(kind, Mapping) and "options" in kind)


def _libraries(path: str) -> list[str]:
    """Return the libraries whose classes a class takes arguments from."""
    kind = _imported(path)
    parents = [argument.parent for argument in get_signature_parameters(kind)]
    kinds = [item for parent in parents for item in (parent if isinstance(parent, tuple) else (parent,))]
    roots = {item.__module__.partition(".")[0] for item in (kind, *kinds) if isinstance(item, type)}
    return sorted(roots - {"remax_lightning", "builtins"})


def _encoded(parameters: Parameters) -> dict[str, Any]:
    encoded: dict[str, Any] = {}
    for name, (types, required, default, allowed, number) in parameters.items():
        further: dict[str, Any] = {"required": True} if required else {}
        further |= {"default": default} if default else {}
        if allowed is not None:  # without what is false or empty
            further["range"] = {field: value for field, value in allowed._asdict().items() if value or field == "low"}
        further |= {} if number is None else {"number": number}
        encoded[name] = {"types": types, **further} if further else types
    return encoded


def as_json(content: Any, depth: int = 0) -> str:
    """Return content as JSON with an argument a line, so that changes can be read and merged."""
    if depth == 3 or not isinstance(content, dict) or not content:
        return json.dumps(content)
    indent = " " * (depth + 1)
    lines = [f"{indent}{json.dumps(name)}: {as_json(value, depth + 1)}" for name, value in content.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent[1:]}}}"
