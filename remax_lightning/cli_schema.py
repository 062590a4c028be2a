"""What a configuration may hold: the arguments of classes with their types, as they come with the package.

Nothing is imported for them: `signatures.json` is written by `python docs/generate_configuration.py`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from remax_lightning.cli_errors import TYPE_WORDS
from remax_lightning.errors import Range
from remax_lightning.shipped_configs import config_folder

SIGNATURES = Path(__file__).with_name("signatures.json")
"""The file; `cli_signatures` describes what is in it."""
_SIMPLE = ("str", "int", "float", "bool", "null")


class Parameter(NamedTuple):
    """An argument that a configuration sets.

    Args:
        types: what it takes: one of `_SIMPLE`, `any`, or {kind: what}: `choices` with the values, `options` with the
            path of a dataclass, `class` with that of a base class, `list` and `mapping` with the types of an item.
        required: whether it has no default.
        default: the path of the class that stands there if none is named.
        range: the numbers that it takes; None where it takes all, or none.
        number: the default, where the range of another argument names it.
    """

    types: Sequence[Any]
    required: bool = False
    default: str | None = None
    range: Range | None = None
    number: float | None = None


Parameters = Mapping[str, Parameter]


class Signatures(Protocol):
    """What is known of commands and classes."""

    @property
    def classes(self) -> Mapping[str, str]:
        """The classes of this package by their names, with their paths."""

    @property
    def names(self) -> Mapping[str, Sequence[str]]:
        """By the path of a base class: the names that can stand for its subclasses, while no others are imported."""

    def command(self, name: str) -> Parameters:
        """Return the keys at the top of a subcommand's configuration."""

    def parameters(self, path: str) -> Parameters | None:
        """Return the arguments of a class or a group of options; None if they are not known for sure."""

    def described(self, path: str) -> Parameters | None:
        """Return them for suggestions, also where they may have changed."""


class ShippedSignatures:
    """The signatures that come with the package; nothing is imported for them.

    Args:
        content: that of `signatures.json`.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.classes: Mapping[str, str] = content["classes"]
        self.names: Mapping[str, Sequence[str]] = content["names"]
        self._content = content

    def command(self, name: str) -> Parameters:
        """Return the keys at the top of a subcommand's configuration."""
        return _parameters(self._content["commands"][name])

    def parameters(self, path: str) -> Parameters | None:
        """Return the arguments of a class or a group of options; None if they are not known for sure."""
        return self.described(path) if self._is_current(path) else None

    def described(self, path: str) -> Parameters | None:
        """Return the arguments of a class as described, whichever release of its library is installed."""
        arguments = self._content["parameters"].get(self._path(path))
        return None if arguments is None else _parameters(arguments)

    def _path(self, path: str) -> str:
        # "remax_lightning.modules.ReMaxModule" is "remax_lightning.ReMaxModule"
        name = path.rpartition(".")[2]
        return self.classes.get(name, path) if path.startswith("remax_lightning.") else path

    def _is_current(self, path: str) -> bool:
        """Whether the libraries that a class takes arguments from are those that were described."""
        libraries = self._content["libraries"].get(self._path(path), ())
        return all(_release(library) == self._content["releases"][library] for library in libraries)


def _parameters(arguments: Mapping[str, Any]) -> Parameters:
    # "path": ["str"], or "kl_coef": {"types": ["float"], "range": {"low": 0}}
    return {
        name: Parameter(**value | ({"range": Range(**value["range"])} if "range" in value else {}))
        if isinstance(value, dict)
        else Parameter(value)
        for name, value in arguments.items()
    }


@cache
def _release(library: str) -> str | None:
    try:
        return version(library).partition("+")[0]
    except PackageNotFoundError:
        return None


@cache
def shipped_signatures() -> ShippedSignatures:
    """Return the signatures that come with the package."""
    return ShippedSignatures(json.loads(SIGNATURES.read_text(encoding="utf-8")))


def is_current() -> bool:
    """Whether the signatures are of this code; in a checkout someone may be adding a key, and has not written them yet.

    A clone or a copy writes all files within a minute. After a pull, what git holds counts: code and signatures are
    checked together before they get there.
    """
    package = SIGNATURES.parent
    if config_folder().parent == package:  # an installed wheel
        return True
    if max(path.stat().st_mtime for path in package.rglob("*.py")) < SIGNATURES.stat().st_mtime + 60:
        return True
    command = ["git", "status", "--porcelain", "--", "*.py"]
    try:
        done = subprocess.run(command, cwd=package, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout of it
        return False
    return not done.stdout.strip()


# ---- Simple values ----


def explain_type(value: Any, types: Sequence[Any]) -> str | None:
    """Return what is wrong with a value that is no list or group; None if it fits, or that cannot be told."""
    if (
        value is None
        or not types
        or not all(kind in _SIMPLE if isinstance(kind, str) else "choices" in kind for kind in types)
    ):
        return None
    if any(_fits(value, kind) is not False for kind in types):
        return None
    # ---- None of the types: "expected a number, or true or false, got many" ----
    words = [
        TYPE_WORDS[kind] if isinstance(kind, str) else f"one of {', '.join(map(repr, kind['choices']))}"
        for kind in types
        if kind != "null"
    ]
    return f"expected {', or '.join(words)}, got {value}"


def explain_range(value: Any, parameter: Parameter, others: Mapping[str, Any], group: str) -> str | None:
    """Return what is wrong with a number, or with one of a list; None if nothing is, or it has no range.

    Args:
        value: what an argument was given.
        parameter: the argument.
        others: those beside it, by name.
        group: the key around it.
    """
    if parameter.range is None:
        return None
    loaded = loaded_text(value) if isinstance(value, str) else value  # "[0, 1]" on the command line
    told = parameter.range.explain(loaded, "null" in parameter.types)
    return told or parameter.range.explain_beside(loaded, others, f"{group}.")


def _fits(value: Any, kind: Any) -> bool | None:
    """Whether a value is of a type; None if that cannot be told."""
    if kind == "str":
        return True if isinstance(value, str) else None
    loaded = loaded_text(value) if isinstance(value, str) else value
    if isinstance(kind, Mapping):
        return value in kind["choices"] or loaded in kind["choices"]
    if kind == "null":
        return loaded is None
    if kind == "bool":
        return isinstance(loaded, bool)
    is_number = isinstance(loaded, int | float) and not isinstance(loaded, bool)
    if kind == "int" and isinstance(loaded, float):
        return None if isinstance(value, str) else False
    return is_number


def loaded_text(text: str) -> Any:
    """Return what a text stands for where no text is expected: "3" is a number."""
    try:
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    if not isinstance(loaded, str):
        return loaded
    try:
        return float(loaded)  # YAML 1.1 takes "1e-3" for text
    except ValueError:
        return loaded
