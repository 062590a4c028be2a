"""Wrong keys and values of a configuration, found by the signatures of the classes that it names.

The signatures come with the package, in `signatures.json`, so a misspelt key is told before torch and Lightning are
imported, which takes seconds. So are files that are missing or cannot be read, and numbers that are out of their range.
What needs more is left to the parser: values that depend on others, classes of a user's own, files in place of groups.
Nothing is refused here that the parser accepts, except files and folders that a run would look for in vain.

The parser uses the same check with live signatures (`cli_signatures.py`), which know the user's classes too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from remax_lightning.cli_arguments import (
    CONFIG,
    NOT_FINITE,
    flatten,
    is_consequence,
    message_of,
    nested,
    nonfinite_numbers,
    raw_values,
    read_config,
    unreadable_configs,
    words_of,
    yaml_key,
)
from remax_lightning.cli_errors import MISSING, explain_class, explain_unknown
from remax_lightning.cli_paths import missing_paths
from remax_lightning.cli_rules import explain_rule
from remax_lightning.cli_schema import (
    Parameter,
    Parameters,
    Signatures,
    explain_range,
    explain_type,
    is_current,
    loaded_text,
    shipped_signatures,
)
from remax_lightning.cli_shorthand import SUBCOMMANDS, named_parts
from remax_lightning.errors import UserError
from remax_lightning.shipped_configs import CONFIG_SUFFIXES, config_folder, config_names, config_path

NO_CONFIG = "expected a file behind --config, or a name of `remax configs list`, got nothing"
_ALONE = ("help", "h", "help-all", "version", "print_config", "print_shtab")
"""Options that need no value; a switch needs true or false."""
_PLACES = {
    **dict.fromkeys(("policy", "reference", "reward_model", "tokenizer"), "a folder or a hub name"),
    **dict.fromkeys(("path", "val_path"), "a file, a folder or a hub name"),
    "ckpt_path": "the path of a checkpoint, or last",
    "reward": "a class, or the dotted path of a function",
    **dict.fromkeys(("folder", "default_root_dir"), "a folder"),
}
"""Keys, by their last part, at which an empty text is what an unset variable has left."""
_LIBRARIES = ("remax_lightning", "lightning", "torch", "transformers")
"""Packages whose import brings no class of a user's own, which a configuration could then call by its name alone."""


def refuse_wrong_keys(arguments: list[str], name: str | None = None) -> None:
    """Refuse a command whose configuration has wrong keys or values, before anything large is imported.

    Args:
        arguments: those after `remax`, of one of Lightning's subcommands.
        name: of the tool that reads them, where it is not this subcommand.

    Raises:
        UserError: with a line for each mistake; without any look at the keys if a file cannot be read.
    """
    if _asks_for_help(arguments):
        return
    if len(arguments) == 1:
        run = name or arguments[0]
        raise UserError(f"{run}: there is no configuration; give --config FILE_OR_NAME, or see remax {run} --help")
    if lines := list(unreadable_configs(arguments)):
        raise UserError(message_of(lines))
    check = KeyCheck(arguments[0], shipped_signatures())
    mistakes = list(check.run(arguments).items())
    if name is None:  # a tool may need less than all: `plan` reads no data
        mistakes += check.missing_paths()
    if mistakes and is_current():
        raise UserError(message_of(f"{key}: {text}" for key, text in mistakes))


def run_options(arguments: list[str]) -> list[str]:
    """Return the arguments of a tool that are those of `remax fit`."""
    arguments = arguments[: arguments.index("--")] if "--" in arguments else arguments
    # a tool's own options have no groups
    return [word for words, name, _ in words_of(arguments) if name in CONFIG or "." in name for word in words]


def wrong_keys(arguments: list[str], signatures: Signatures) -> dict[str, str]:
    """Return what is wrong by key, in the order of the arguments; empty where nothing is, or nothing can be told.

    Args:
        arguments: those after `remax`.
        signatures: of what the configuration names.

    Raises:
        UserError: if `--config` names nothing that there is.
    """
    check = KeyCheck(arguments[0] if arguments else "", signatures)
    return check.run(arguments)


def _asks_for_help(arguments: list[str]) -> bool:
    """Whether a command prints something about its options, or its configuration, and runs nothing."""
    names = (name for _, name, _ in words_of(arguments))
    return any(name.endswith(("help", "help-all")) or name.startswith("print_") for name in names)


def _values(arguments: list[str]) -> dict[str, Any]:
    """Return the values that count in the end, by key as in the YAML."""
    return {yaml_key(key): value for key, value in raw_values(arguments).items()}


def _class_paths(value: Any, key: str = "") -> Iterator[str]:
    """Yield the texts of a configuration that may name a class or a function."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _class_paths(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _class_paths(item, key)
    elif isinstance(value, str) and key not in ("path", "val_path"):
        yield value


def _is_foreign(text: str) -> bool:
    """Whether a text may be a dotted path of a user's own."""
    parts = text.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts) and parts[0] not in _LIBRARIES


class KeyCheck:
    """Goes through the sources of a configuration, and notes what is wrong.

    Args:
        command: the subcommand.
        signatures: of what the configuration names.

    Attributes:
        mistakes: what is wrong by key.
        elements: by key, the elements of lists and groups of classes, with the path of their base class.
        out_of_range: keys among the mistakes whose numbers are of the right type, so that they can be parsed.
    """

    def __init__(self, command: str, signatures: Signatures) -> None:
        self.signatures, self.command = signatures, command
        self.mistakes: dict[str, str] = {}
        self.elements: dict[str, tuple[Any, str]] = {}
        self.out_of_range: set[str] = set()
        self._lacks_config = False  # a file that was meant as one stands alone, and may have what is missing
        self._names_are_known = True  # no class of a user's own is imported, which could be called by its name alone
        self._classes: dict[str, str | None] = {}  # by key, as the sources so far set them; None is not known
        self._set: dict[str, Any] = {}  # the last value of each key; text that stands for a number is one
        self._parameters: dict[str, Parameter] = {}  # of these keys
        self._groups: dict[str, Parameters] = {}  # by the key around them
        self._opaque: set[str] = set()  # keys of what cannot be looked into, such as a file in place of a group

    @cached_property
    def _known(self) -> list[str]:
        """The keys that always exist, for suggestions."""
        known: dict[str, None] = {}
        for command in SUBCOMMANDS:
            for name, parameter in self.signatures.command(command).items():
                path = _inner(parameter.types, "options")
                inner = (self.signatures.described(path) or {}) if path else {}
                known |= dict.fromkeys([name, *(f"{name}.{key}" for key in inner)])
        return list(known)

    def run(self, arguments: list[str]) -> dict[str, str]:
        """Return what is wrong by key, in the order of the arguments (`wrong_keys`)."""
        words = list(words_of(arguments[1:]))
        if self.command not in SUBCOMMANDS or _asks_for_help(arguments):
            return {}
        # ---- The defaults, then files and options as they override each other ----
        sources: list[Any] = [read_config(str(config_folder() / "base.yaml"))]
        for option, name, value in words:
            if not name:  # no argument of a run stands alone
                is_config = Path(option[0]).suffix in CONFIG_SUFFIXES or option[0] in config_names()
                hint = f"did you mean --config {option[0]}?" if is_config else "options begin with --"
                self._lacks_config |= is_config
                self.mistakes.setdefault(option[0], f"is no option; {hint}")
            elif name in CONFIG and value:
                sources.append(read_config(config_path(value)))
            elif value is None or name in CONFIG:
                self._without_value(name)
            else:
                if not value.strip():  # YAML, which it is read as, has null there
                    self._empty(yaml_key(name), value)
                # "--trainer.callbacks+=..." adds an element: which one it is follows from the others
                sources.append({} if option[0].partition("=")[0].endswith("+") else nested(name, value))
        if not all(isinstance(source, Mapping) for source in sources):  # a file that cannot be read, or holds no keys
            return {}
        self._names_are_known = not any(_is_foreign(path) for source in sources for path in _class_paths(source))
        top = self.signatures.command(self.command)
        for source in sources:
            self._group("", source, top)
        self.mistakes |= self._wrong_in_the_end(_values(arguments))
        return self.mistakes

    def missing_paths(self) -> list[tuple[str, str]]:
        """Return the keys that name a file or folder which is not there, with what is wrong, after `run`."""
        # a class of a user's own may mean something else by its path
        known = [key for key in ("model", "data") if key not in self._opaque and self._is_described(key)]
        known.append("ckpt_path")
        return list(missing_paths({key: value for key, value in self._set.items() if key.partition(".")[0] in known}))

    def _is_described(self, key: str) -> bool:
        path = self._classes.get(key, "")  # without one, the default of this package
        return path is not None and (not path or self.signatures.parameters(path) is not None)

    def _group(self, key: str, values: Mapping[str, Any], parameters: Parameters) -> None:
        self._groups[key] = parameters
        for name, value in values.items():
            full = f"{key}.{name}" if key else str(name)
            if name not in parameters:
                # "modle: {kl_coef: 0.1}" is told as modle.kl_coef; a group without keys counts as nothing
                for leaf, _ in flatten(value, full):
                    text = explain_unknown(leaf, str(name), list(parameters), self._known, self._argument_names)
                    self.mistakes.setdefault(leaf, text)
            else:
                self._value(full, value, parameters[name])

    def _without_value(self, name: str) -> None:
        """Note an option behind which nothing stands, as after an unset variable."""
        if name in CONFIG:
            self._lacks_config = True
            self.mistakes["config"] = NO_CONFIG
        elif name not in _ALONE and not name.endswith(".help"):
            self.mistakes.setdefault(yaml_key(name), "expected a value behind the option, got nothing; give one")

    def _empty(self, key: str, value: str) -> None:
        if expected := _PLACES.get(key.rpartition(".")[2]):
            self.mistakes.setdefault(key, f"expected {expected}, got {value!r}; an unset variable leaves it empty")

    def _argument_names(self, path: str, groups: list[str]) -> list[str]:
        parameters = self.signatures.described(path)
        for group in groups:
            inner = _inner(parameters[group].types, "options") if parameters and group in parameters else None
            parameters = self.signatures.described(inner) if inner else None
        return list(parameters or ())

    def _value(self, key: str, value: Any, parameter: Parameter) -> None:
        types = parameter.types
        self._set.pop(key, None)  # in the order of the arguments
        self._set[key] = _number_of(value, types) if isinstance(value, str) else value
        self._parameters[key] = parameter
        if isinstance(value, str) and not value.strip():
            self._empty(key, value)
        elif isinstance(value, Mapping):
            self._mapping(key, value, parameter)
        elif isinstance(value, list):
            self._list(key, value, parameter)
        elif base := _inner(types, "class"):
            self._class_name(key, value, parameter, base)
        elif _inner(types, "options"):
            self._opaque.add(key)  # a path of a model in place of its group, or a file
        elif (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
            pass  # the last value counts: see `_wrong_in_the_end`
        elif text := explain_type(value, types):
            self.mistakes.setdefault(key, text)

    def _mapping(self, key: str, value: Mapping[str, Any], parameter: Parameter) -> None:
        types = parameter.types
        if "any" in types:
            return
        options, base, item = (_inner(types, kind) for kind in ("options", "class", "mapping"))
        if base and (not (options or item) or not {"class_path", "init_args"}.isdisjoint(value)):
            self._class(key, value, parameter)
        elif options:
            parameters = None if "class_path" in value else self.signatures.parameters(options)
            if parameters is None:
                self._opaque.add(key)
            else:
                self._group(key, value, parameters)
        elif item:
            for name, element in value.items():
                self._element(f"{key}.{name}", element, Parameter(item))

    def _element(self, key: str, value: Any, parameter: Parameter) -> None:
        if base := _inner(parameter.types, "class"):
            self.elements[key] = value, base
        self._value(key, value, parameter)

    def _list(self, key: str, value: list[Any], parameter: Parameter) -> None:
        types = parameter.types
        self._forget(key)  # a list takes the place of an earlier one
        if item := _inner(types, "list"):
            for number, element in enumerate(value):
                self._element(f"{key}.{number}", element, Parameter(item))
        elif key == "model.reward":  # stands for their sum
            for name, element in named_parts(value).items():
                self._element(f"{key}.init_args.parts.{name}", element, parameter)

    def _class(self, key: str, value: Mapping[str, Any], parameter: Parameter) -> None:
        """Check the arguments of a class, which stand under `init_args`, or directly where the class is known."""
        # ---- The class: named here, by an earlier source, or the default ----
        path: Any = self._classes.get(key, parameter.default)
        if "class_path" in value:
            path = value["class_path"]
            if not isinstance(path, str):
                return
            base = _inner(parameter.types, "class")
            if not self._choose(key, path, base) or len(value.keys() - {"class_path", "init_args", "dict_kwargs"}):
                return
            path = self._classes[key]
            names = self.signatures.names.get(base)
            if path and names and path.startswith("remax_lightning.") and path.rpartition(".")[2] not in names:
                return  # of another kind
        parameters = self.signatures.parameters(path) if path else None
        if parameters is None:
            self._opaque.add(key)
            return
        # ---- Its arguments; those of the module and of the data module are named without init_args ----
        inner = value.get("init_args")
        arguments = {name: item for name, item in value.items() if name not in ("class_path", "init_args")}
        arguments.pop("dict_kwargs", None)
        arguments |= inner if isinstance(inner, Mapping) else {}
        self._group(key if key in ("model", "data") else f"{key}.init_args", arguments, parameters)

    def _class_name(self, key: str, value: Any, parameter: Parameter, base: str) -> None:
        """Take a text in place of a class: its name or path, one of the choices beside it, a file, or a function."""
        if isinstance(value, str) and explain_type(value, [kind for kind in parameter.types if not _is_class(kind)]):
            self._choose(key, value, base, parameter.types)
        else:
            self._classes[key] = None

    def _choose(self, key: str, path: str, base: str, types: Sequence[Any] = ()) -> bool:
        """Remember the class at a key, and say whether there is one of this name."""
        is_name = path.isidentifier()
        full = self.signatures.classes.get(path) if is_name else path
        names = self.signatures.names.get(base)
        if is_name and full is None and names is not None and path not in names and self._names_are_known:
            choices = explain_type(path, [kind for kind in types if not _is_class(kind)]) if types else None
            text = choices or explain_class(path, self.signatures.classes, key if key in ("model", "data") else "")
            if not Path(path).exists():
                self.mistakes.setdefault(key, text)
            return False
        self._forget(key)  # what another class was given
        self._classes[key] = full
        return True

    def _forget(self, key: str) -> None:
        """Drop what earlier sources set within a key."""
        self._classes = {name: kind for name, kind in self._classes.items() if not name.startswith(f"{key}.")}
        if key not in ("model", "data"):  # their required keys may be those of the class before
            self._set = {name: value for name, value in self._set.items() if not name.startswith(f"{key}.")}

    def _wrong_in_the_end(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Return what is wrong with the configuration as a whole: values out of range, keys without a value."""
        mistakes: dict[str, str] = {}
        for key, number in (item for name, value in values.items() for item in nonfinite_numbers(value, name)):
            if ".init_args." not in key:
                mistakes[key] = NOT_FINITE.format(number)
        mistakes |= self._refused_values(mistakes)
        for key in () if self._lacks_config else ("model", "data"):
            path = self._classes.get(key)
            if key in self._opaque or not path:
                continue
            for name in self._required(key, self.signatures.parameters(path) or {}):
                if not is_consequence(name, MISSING, self.mistakes):
                    mistakes[name] = MISSING
        return mistakes

    def _refused_values(self, told: Collection[str]) -> dict[str, str]:
        """Return what the rules of libraries and the ranges of this package say of the last value of each key."""
        refused = {}
        for key, value in self._set.items():
            if key in told or key in self.mistakes or any(nonfinite_numbers(value)):
                continue
            if text := explain_rule(key, value):
                refused[key] = text
                continue
            group = key.rpartition(".")[0]
            others = {
                name: self._set.get(f"{group}.{name}", parameter.number)
                for name, parameter in self._groups.get(group, {}).items()
            }
            if text := explain_range(value, self._parameters[key], others, group):
                refused[key] = text
                self.out_of_range.add(key)
        return refused

    def _required(self, key: str, parameters: Parameters) -> Iterator[str]:
        for name, parameter in parameters.items():
            full, path = f"{key}.{name}", _inner(parameter.types, "options")
            if full == "data.tokenizer":  # follows from the model
                continue
            inner = (self.signatures.parameters(path) or {}) if path else {}
            if full not in self._set and parameter.required:
                # "model.policy.path" where nothing stands under model.policy
                yield from (f"{full}.{part}" for part, value in inner.items() if value.required) if path else [full]
            elif full in self._set and full not in self._opaque and inner:
                yield from (name for name in self._required(full, inner) if name not in self._set)


def _inner(types: Sequence[Any], kind: str) -> Any:
    """Return what a kind of type holds; None if it is not among the types."""
    return next((item[kind] for item in types if isinstance(item, Mapping) and kind in item), None)


def _number_of(text: str, types: Sequence[Any]) -> Any:
    """Return the number that a text stands for where one is expected; other texts as they are."""
    if "str" in types or not {"int", "float"} & {kind for kind in types if isinstance(kind, str)}:
        return text
    number = loaded_text(text)
    return int(number) if isinstance(number, float) and "float" not in types and number.is_integer() else number


def _is_class(kind: Any) -> bool:
    return isinstance(kind, Mapping) and "class" in kind
