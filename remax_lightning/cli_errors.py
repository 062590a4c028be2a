"""Error messages of the command line: the key as in the YAML, what is wrong, and what would be right.

jsonargparse prints the whole usage and a tree of all types that did not fit, with all values of the run. This file
extracts the lines that matter.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args, get_type_hints

import jsonargparse
import lightning
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

import remax_lightning
from remax_lightning.errors import SignalExit, UserError, exception_chain

_KEY = re.compile(r'Parser key "([^"]+)"(?: element \d+)?:\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '(.+)':")
_NOISE = re.compile(
    r"$|Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>$"
    r"|Not a valid subclass|Subclass types expect|a class path \(str\)|a dict with|Expected a path but"
)
_WRAPPING = re.compile(r"Type typing\.Callable\[.*\] expects a function or a callable class: ")
_VALUES = re.compile(r"\. Got value: Namespace\(class_path='(.+?)',.*|\. Got value: (?:Namespace|\{).*")
_GIVEN = re.compile(r"^ *Given value: ([\w.+-]{1,60})$", re.MULTILINE)
_UNKNOWN = (
    re.compile(r"Option '(?P<key>.+)' is not accepted"),
    re.compile(r"Group '(?P<group>.+)' does not accept option '(?P<key>.+)'"),
    re.compile(r"Subcommand '.+' does not accept option '(?P<key>.+)'"),
    re.compile(r"unrecognized arguments: --(?P<key>[^\s=]+).*"),
)
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_LITERAL = re.compile(r"Expected a typing\.Literal\[(.+?)\](.*)")
_TYPE = re.compile(r"Expected an? (?:<class '(?:.*\.)?(\w+)'>|(?:typing\.)?(\S+?))(\. .*)?")
_NOT_IMPORTED = re.compile(r"Expected a dot import path string: (\S+)")
_NO_MODULE = re.compile(r"No module named '(.+)'")
RENAMED_KEYS = {
    "sampling.truncate_log_probs": "processed_log_probs",
    "advantage.truncated": "overlong",
    "loss.normaliser": "normalizer",
    "rollout.record": "cuda_graphs",
    "rollout.keep_slots": "keep_cache",
    "loading.bad_pairs": "on_bad_row",
}
"""Keys of version 0.1, as `group.key` without `init_args`, with their new name."""

MOVED_NAMES = {
    "remax_lightning.PretrainedModel": "remax_lightning.ModelConfig",
    "remax_lightning.models.PretrainedModel": "remax_lightning.models.ModelConfig",
    "remax_lightning.batch": "remax_lightning.types",
    "remax_lightning.frozen": "remax_lightning.models.frozen",
    "remax_lightning.modules.options": "remax_lightning.config",
    "remax_lightning.modules.schedules": "remax_lightning.training.schedules",
    "remax_lightning.rewards.deepspeed_chat": "remax_lightning.rewards.formats.deepspeed_chat",
    "remax_lightning.rollout.engine": "remax_lightning.rollout.base",
    "remax_lightning.rollout.huggingface": "remax_lightning.rollout.auto",
    "remax_lightning.strategies.checkpoints": "remax_lightning.strategies.atomic_checkpoint",
    "remax_lightning.tools.addition": "remax_lightning.tasks.addition",
    "remax_lightning.tools.dialogues": "remax_lightning.tasks.dialogues",
}
"""Dotted names of version 0.1 that a configuration could contain, with their new name."""

_NO_ATTRIBUTE = re.compile(r"module '(remax_lightning[\w.]*)' has no attribute '(\w+)'")
_DOTTED = re.compile(r"\bremax_lightning(?:\.\w+)+")
_SUBCOMMANDS = ("fit", "validate", "test", "predict")
MAX_MISTAKES = 10
"""How many wrong keys or values are told at once."""

_TYPES = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null"}


class RemaxParser(LightningArgumentParser):
    """Exits with one message that names the key, instead of pages of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # With abbreviations --trainer.max_step would mean --trainer.max_steps, and a typo could mean another key.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Parse, and refuse numbers that are not finite; of several wrong keys or values, tell all at once.

        jsonargparse stops at the first, so what it names is left out and the rest is parsed again.
        """
        arguments = list(sys.argv[1:] if args is None else args)
        mistakes: dict[str, str] = {}
        tip = ""
        while True:
            try:
                parsed = super().parse_args(arguments, *rest, **options)
                lines = [
                    f'Parser key "{key}": must be a finite number, got {value}; null means "none" where a key may be'
                    " unset"
                    for key, value in _nonfinite_numbers(parsed)
                ]
                if lines:
                    self.error("\n".join(lines))
                if not mistakes:
                    return parsed
                break
            except _ParseExit as end:
                tip = tip or end.tip
                further = {key: text for key, text in end.mistakes.items() if not _is_consequence(key, mistakes)}
                mistakes |= further
                reduced = [without_key(arguments, key) for key in further if key]
                if not reduced or reduced[0] is None or len(mistakes) >= MAX_MISTAKES:
                    break
                arguments = reduced[0]  # a message names one key, or several types of one
        lines = [f"{key}: {text}" if key else text for key, text in mistakes.items()]
        print("remax: error: {}\n{}".format("\n  ".join(lines), tip), end="", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with code 2; `parse_args` prints what is wrong."""
        if not self.exit_on_error:
            super().error(message, ex)
        subcommands = [action.choices.values() for action in self._actions if isinstance(action.choices, dict)]
        parsers = [self, *(parser for choices in subcommands for parser in choices)]
        known = dict.fromkeys(action.dest for parser in parsers for action in parser._actions)
        tip = "remax --help lists the subcommands\n" if "subcommand" in message else ""
        raise _ParseExit(explain_message(message, known), tip)


class _ParseExit(SystemExit):
    """The parser refuses its arguments: the mistakes by key, and a line of advice."""

    def __init__(self, mistakes: dict[str, str], tip: str) -> None:
        super().__init__(2)
        self.mistakes, self.tip = mistakes, tip


def _is_consequence(key: str, mistakes: Iterable[str]) -> bool:
    """Whether a key is wrong only because another one was left out: it, or a group around it, is missing now."""
    plain = _plain(key)
    return any(plain == _plain(other) or _plain(other).startswith(f"{plain}.") for other in mistakes)


def _plain(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "init_args")


def without_key(arguments: list[str], key: str) -> list[str] | None:
    """Return the arguments of the command without a key, on the command line and in YAML files; None if it is nowhere.

    A YAML file with the key is replaced by its text without it.
    """
    kept, changed, index = [], False, 0
    while index < len(arguments):
        name, equals, value = arguments[index].partition("=")
        separate = not equals and index + 1 < len(arguments) and not arguments[index + 1].startswith("--")
        words = arguments[index : index + 1 + separate]
        index += len(words)
        if name.startswith("--") and _plain(name[2:].rstrip("+")) == _plain(key):
            changed = True
        elif name in ("--config", "-c") and (equals or separate):
            text = _yaml_without_key(value if equals else words[1], _plain(key).split("."))
            changed = changed or text is not None
            kept += words if text is None else ["--config", text]
        else:
            kept += words
    return kept if changed else None


def _yaml_without_key(config: str, path: list[str]) -> str | None:
    """Return the YAML text of a configuration, a file or a text, without a key; None if it does not have it."""
    try:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8") if "\n" not in config else config)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return yaml.safe_dump(values) if _remove(values, path) else None


def _remove(values: Any, path: list[str]) -> bool:
    if not isinstance(values, dict):
        return False
    if len(path) == 1 and path[0] in values:
        del values[path[0]]
        return True
    inner = values.get(path[0])
    return (isinstance(inner, dict) and _remove(inner, path[1:])) or _remove(values.get("init_args"), path)


def _nonfinite_numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield the key, as a user writes it, and the value of every number of a configuration that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    elif isinstance(value, dict | jsonargparse.Namespace):
        for name, part in (value if isinstance(value, dict) else vars(value)).items():
            # The subcommand is no part of a key, nor are the init_args of the module and the data.
            inner = key if not key and name in _SUBCOMMANDS else f"{key}.{name}" if key else str(name)
            yield from _nonfinite_numbers(part, key if key in ("model", "data") and name == "init_args" else inner)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _nonfinite_numbers(part, f"{key}[{number}]")


def shorten_message(message: str, known: Iterable[str] = ()) -> str:
    """Return the essential lines of a message of jsonargparse.

    Args:
        message: the message of jsonargparse.
        known: keys that always exist, for suggestions.
    """
    mistakes = explain_message(message, known)
    return "\n  ".join(f"{key}: {text}" if key else text for key, text in mistakes.items())


def explain_message(message: str, known: Iterable[str] = ()) -> dict[str, str]:
    """Return what is wrong by key; the key is empty where the message names none.

    Args:
        message: the message of jsonargparse.
        known: keys that always exist, for suggestions.
    """
    if hint := _moved_name_hint(message):
        return {"": hint}
    # ---- One explanation per key ----
    explanations: dict[str, list[str]] = {}
    for line in _parse_lines(message):
        key, text = _explain(line, list(known))
        explanations.setdefault(key, []).append(text)
    value = _GIVEN.search(message)
    mistakes = {}
    for key, texts in explanations.items():
        text = "; ".join(dict.fromkeys(texts))
        if all(part.startswith("expected ") for part in texts):  # the types of a union, none of which fits
            text = text.replace("; expected ", ", or ")
            text += f", got {value[1]}" if value and ", got " not in text else ""
        mistakes[key] = text
    if not mistakes and (match := _KEY.match(message)):  # only lines about what a class may be given as
        got = f", got {value[1]}" if value else ""
        mistakes[match[1]] = f"expected a class with class_path and init_args, or a group of keys{got}"
    return mistakes or {"": message}


def user_error_message(error: BaseException | None) -> str | None:
    """Return the message of a user's mistake in an exception or its causes; None if there is none.

    jsonargparse wraps the exceptions of constructors.
    """
    for cause in exception_chain(error):
        if isinstance(cause, UserError | MisconfigurationException):
            hint = _moved_name_hint(str(cause))
            return f"{cause}; {hint}" if hint else str(cause)
    return None


def foreign_exit_message(end: SystemExit) -> str | None:
    """Return a message about `sys.exit()` in code of a user's own; None if the command itself ends the process.

    The exit code of such a call says nothing about the run: with 0 it would look like a success.
    """
    if isinstance(end, SignalExit):
        return None
    # The innermost frame is the caller's; exit() and quit() of the interpreter are functions of a file, too.
    frames = traceback.extract_tb(end.__traceback__)
    caller = next(frame for frame in reversed(frames) if "_sitebuiltins" not in frame.filename)
    own = [Path(inspect.getfile(module)).parent for module in (remax_lightning, lightning, jsonargparse)]
    file = Path(caller.filename)
    if file == Path(argparse.__file__) or any(file.is_relative_to(folder) for folder in own):
        return None
    return (
        f"{caller.filename}, line {caller.lineno}, in {caller.name}: sys.exit() ended the run (exit code {end.code});"
        " raise an exception there that says what is wrong, or set trainer.should_stop to end a run early"
    )


def _moved_name_hint(message: str) -> str | None:
    """Return the new place of an old dotted name in a message; None if there is no such name.

    Python names a missing attribute and its module separately; they are joined here.
    """
    message = _NO_ATTRIBUTE.sub(r"\1.\2", message)
    for dotted in _DOTTED.findall(message):
        for old, new in MOVED_NAMES.items():
            if f"{dotted}.".startswith(f"{old}."):
                return f"{dotted} was moved; write {new}{dotted[len(old) :]}"
    return None


class _ParsedLine(NamedTuple):
    """A line of a message with its key and the class around it."""

    key: str
    class_path: str | None
    text: str


def _parse_lines(message: str) -> list[_ParsedLine]:
    # The indentation of a line says which key and class it belongs to: (indent, key, class_path).
    stack: list[tuple[int, str, str | None]] = []
    parsed = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip())
        if _NOISE.match(text):
            continue
        stack = [entry for entry in stack if entry[0] < indent]
        if (match := _VALUES.search(text)) and match[1]:
            stack.append((indent, "init_args", match[1]))
        text = _WRAPPING.sub("", _VALUES.sub("", text))
        if match := _KEY.fullmatch(text):
            stack.append((indent, match[1], None))
            text = match[2]
        if match := _CLASS.fullmatch(text):
            # The outermost class (module or data) may be written without init_args, so its arguments are named without.
            nested = any(class_path for _, _, class_path in stack)
            stack.append((indent, "init_args" if nested else "", match[1]))
        elif text and not _NOISE.match(text):
            classes = [class_path for _, _, class_path in stack if class_path]
            parsed.append(
                _ParsedLine(".".join(key for _, key, _ in stack if key), classes[-1] if classes else None, text)
            )
    return parsed


def _explain(line: _ParsedLine, known: list[str]) -> tuple[str, str]:
    """Return the key of a line and what is wrong with it."""
    key, class_path, text = line
    for pattern in _UNKNOWN:
        if match := pattern.fullmatch(text):
            return _explain_unknown_key(line, match.groupdict().get("group"), match["key"], known)
    if match := _REQUIRED.fullmatch(text):
        missing = [f"{key}.{name}" if key else name for name in match[1].split(", ")]
        return ", ".join(missing), "missing, and there is no default; set it in the YAML or on the command line"
    if match := _LITERAL.fullmatch(text):
        text = f"expected one of {match[1]}{match[2]}"
    elif match := _NOT_IMPORTED.fullmatch(text):
        text = f"there is no class {match[1]!r}; give a class of remax_lightning, or a path such as my_module.MyClass"
    elif match := _NO_MODULE.fullmatch(text):
        file = f"{match[1].replace('.', '/')}.py"
        text = (
            f"cannot import {class_path or match[1]}: there is no module {match[1]!r}; put {file} into the current"
            " folder"
        )
    elif match := _TYPE.fullmatch(text):
        name = match[1] or match[2]
        text = f"expected {_TYPES.get(name, name)}{match[3] or ''}"
    return key, text.replace(". Got value: ", ", got ")


def _explain_unknown_key(line: _ParsedLine, group: str | None, name: str, known: list[str]) -> tuple[str, str]:
    if name == "class_path":
        return line.key, "write the arguments of the class under init_args, beside class_path"
    inner = f"{group}.{name}" if group else name
    full = f"{line.key}.{inner}" if line.key else inner
    parent, _, last = full.rpartition(".")
    if line.class_path:
        parts = inner.split(".")
        options = _argument_names(line.class_path, parts[:-1])
        for depth in range(len(parts) - 1):  # a group around the key may be what is misspelt
            groups = _argument_names(line.class_path, parts[:depth])
            if groups and parts[depth] not in groups:
                last, options = parts[depth], groups
                break
    elif options := [dest.removeprefix(f"{parent}.") for dest in known if dest.startswith(f"{parent}.")]:
        pass
    else:
        last, options = full.partition(".")[0], list(dict.fromkeys(dest.partition(".")[0] for dest in known))
    path = [part for part in full.split(".") if part != "init_args"]
    renamed = RENAMED_KEYS.get(".".join(path[-2:]))
    if renamed is not None and (renamed in options or not options):
        return full, f"was renamed; write {full.removesuffix(last)}{renamed}"
    close = difflib.get_close_matches(last, options, 1)
    hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(options)}" if options else "remove it"
    return full, f"there is no such key; {hint}"


def _argument_names(class_path: str, groups: list[str]) -> list[str]:
    """Return the argument names of a class, or the fields of the dataclass at its nested argument `groups`."""
    module, _, name = class_path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
        for group in groups:
            hint = get_type_hints(kind.__init__)[group]
            kind = next(option for option in (hint, *get_args(hint)) if is_dataclass(option))
        return [field.name for field in fields(kind)] if groups else list(_parameter_names(kind))
    except (ImportError, AttributeError, KeyError, NameError, StopIteration, TypeError, ValueError):
        return []


def _parameter_names(kind: Any) -> Iterator[str]:
    """Yield the argument names of a class or function, including those that it passes to its base as `**`."""
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            yield name
        elif inspect.isclass(kind):
            yield from _parameter_names(kind.__base__)
