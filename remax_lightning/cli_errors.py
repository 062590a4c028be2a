"""Error messages of the command line: the key as in the YAML, what is wrong, and what would be right.

jsonargparse prints the whole usage and a tree of all types that did not fit, with all values of the run. This file
extracts the lines that matter.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args, get_type_hints

from remax_lightning.cli_paths import ROW_FILES
from remax_lightning.cli_shorthand import our_classes
from remax_lightning.errors import SignalExit, UserError, exception_chain, loaded_class

# 'Parser key "trainer.max_steps": Expected a <class 'int'>. Got value: many'
_KEY = re.compile(r'Parser key "([^"]+)"(?: element \d+)?:\s*(.*)')
# "Problem with given class_path 'remax_lightning.modules.ReMaxModule':"
_CLASS = re.compile(r"Problem with given class_path '(.+)':")
# Lines of the tree of types, which name no mistake.
_NOISE = re.compile(
    r"$|Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>$"
    r"|Not a valid subclass|Subclass types expect|a class path \(str\)|a dict with|Expected a path but"
)
_WRAPPING = re.compile(r"Type typing\.Callable\[.*\] expects a function or a callable class: ")
# ". Got value: Namespace(class_path='my.Module', init_args=...", pages of it
_VALUES = re.compile(r"\. Got value: Namespace\(class_path='(.+?)',.*|\. Got value: (?:Namespace|\{).*")
# "  Given value: many"
_GIVEN = re.compile(r"^ *Given value: ([\w.+-]{1,60})$", re.MULTILINE)
_UNKNOWN = (
    re.compile(r"Option '(?P<key>.+)' is not accepted"),
    re.compile(r"Group '(?P<group>.+)' does not accept option '(?P<key>.+)'"),
    re.compile(r"Subcommand '.+' does not accept option '(?P<key>.+)'"),
    re.compile(r"unrecognized arguments: --(?P<key>[^\s=]+).*"),
)
MISSING = "missing, and there is no default; set it in the YAML or on the command line"
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
# "Expected a typing.Literal['drop', 'error']. Got value: skip"
_LITERAL = re.compile(r"Expected a typing\.Literal\[(.+?)\](.*)")
# "Expected a <class 'int'>. Got value: many"
_TYPE = re.compile(r"Expected an? (?:<class '(?:.*\.)?(\w+)'>|(?:typing\.)?(\S+?))(\. .*)?")
_NOT_IMPORTED = re.compile(r"(?:Expected a dot import path string|Unexpected import path format): (\S+)")
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
    "remax_lightning.modules.schedules": "remax_lightning.training.optimization",
    "remax_lightning.rewards.deepspeed_chat": "remax_lightning.rewards.formats",
    "remax_lightning.rollout.engine": "remax_lightning.rollout.base",
    "remax_lightning.rollout.auto": "remax_lightning.rollout.engines",
    "remax_lightning.rollout.huggingface": "remax_lightning.rollout.engines",
    "remax_lightning.rollout.paired": "remax_lightning.rollout.engines",
    "remax_lightning.strategies.checkpoints": "remax_lightning.strategies.atomic_checkpoint",
    "remax_lightning.tools.addition": "remax_lightning.tasks.addition",
    "remax_lightning.tools.dialogues": "remax_lightning.tasks.dialogues",
}
"""Dotted names of earlier versions that a configuration could contain, with their new name."""

_NO_ATTRIBUTE = re.compile(r"module '(remax_lightning[\w.]*)' has no attribute '(\w+)'")
_DOTTED = re.compile(r"\bremax_lightning(?:\.\w+)+")
# "Unable to load config 'policy.yaml'; ...", of a group that is a file
_FILE_OF_A_GROUP = re.compile(r"Unable to load config '(.+?)'; ")
_WHOLE_FILES = (
    (re.compile(r"Problems parsing config: *(.+)", re.DOTALL), "config: {0}"),
    (re.compile(r"Unexpected config: *(\S.{0,60})?", re.DOTALL),
     "config: expected groups of keys, such as model: and data:, got {0!r}"),
)  # fmt: skip
"""What jsonargparse says of a file as a whole."""

_NO_KEYS = ("help", "config", "print_config", "print_shtab", "subcommand")
_MAIN_CLASSES = {
    "model": "remax_lightning.modules.ReMaxModule",
    "data": "remax_lightning.data.PromptDataModule",
    "model.optimizer.init_args": "torch.optim.AdamW",
    "model.lr_scheduler.init_args": "remax_lightning.modules.WarmupCosine",
}
"""Classes whose options a hint knows, by the key that they stand under."""

_LIBRARY_CLASSES = {
    "logger": ("remax_lightning.loggers", "lightning.pytorch.loggers"),
    "callbacks": ("remax_lightning.callbacks", "lightning.pytorch.callbacks"),
    "optimizer": ("torch.optim", "torch.optim"),
    "lr_scheduler": ("remax_lightning.modules", "torch.optim.lr_scheduler"),
    "plugins": ("lightning.pytorch.plugins", "lightning.fabric.plugins.environments"),
}
"""By key: where its classes come from, this package's and the library's."""

_SOURCES = {"model": ("policy", "Module"), "data": ("path", "DataModule")}
"""By key of a class: the argument that a path or hub name may have been meant for, and how its classes end."""

ArgumentNames: TypeAlias = Callable[[str, list[str]], list[str]]
"""Returns the argument names of a class by its path, or those of the dataclass at its nested argument."""

TYPE_WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null"}


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
    # ---- A name of an earlier version, or a file as a whole ----
    if hint := _moved_name_hint(message):
        return {"": hint}
    for pattern, text in _WHOLE_FILES:
        if match := pattern.match(message):
            return {"": text.format(*match.groups())}
    # ---- One explanation per key ----
    explanations: dict[str, list[str]] = {}
    for line in _parse_lines(message):
        key, text = _explain(line, list(known))
        explanations.setdefault(key, []).append(text)
    # ---- Several types of a union in one sentence: "expected a number, or null, got many" ----
    value = _GIVEN.search(message)
    mistakes = {}
    for key, given in explanations.items():
        # A word that was to be a class is not also a list or a switch that is wrong.
        texts = [text for text in given if text.startswith("there is no class ")] or given
        text = _FILE_OF_A_GROUP.sub(r"\1: ", "; ".join(dict.fromkeys(texts)))
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
    misconfiguration = loaded_class("lightning.fabric.utilities.exceptions", "MisconfigurationException")
    for cause in exception_chain(error):
        is_monitor = isinstance(cause, RuntimeError) and str(cause).startswith("Early stopping conditioned on metric")
        if is_monitor or isinstance(cause, (UserError, misconfiguration)):
            hint = _moved_name_hint(str(cause))
            return f"{cause}; {hint}" if hint else str(cause)
    return None


def foreign_exit_message(end: SystemExit) -> str | None:
    """Return a message about `sys.exit()` in code of a user's own; None if the command itself ends the process.

    The exit code of such a call says nothing about the run: with 0 it would look like a success.
    """
    if isinstance(end, SignalExit):
        return None
    # The innermost frame is the caller's; exit() and quit() of the interpreter are functions of a file, too, and so is
    # what stands for os._exit.
    frames = list(traceback.extract_tb(end.__traceback__))
    leaves_hard = frames[-1].name == "raise_or_leave"
    frames = frames[:-1] if leaves_hard else frames
    caller = next(frame for frame in reversed(frames) if "_sitebuiltins" not in frame.filename)
    specs = map(find_spec, ("remax_lightning", "lightning", "jsonargparse"))
    own = [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin]
    file = Path(caller.filename)
    if file == Path(argparse.__file__) or any(file.is_relative_to(folder) for folder in own):
        return None
    call = "os._exit()" if leaves_hard else "sys.exit()"
    return (
        f"{caller.filename}, line {caller.lineno}, in {caller.name}: {call} ended the run (exit code {end.code});"
        " raise an exception there that says what is wrong, or set trainer.should_stop to end a run early"
    )


def _moved_name_hint(message: str) -> str | None:
    """Return the new place of an old dotted name in a message; None if there is no such name.

    Python names a missing attribute and its module separately; they are joined here.
    """
    # "module 'remax_lightning' has no attribute 'batch'" -> "remax_lightning.batch"
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
        # ---- What the line is inside of ----
        stack = [entry for entry in stack if entry[0] < indent]
        if (match := _VALUES.search(text)) and match[1]:
            stack.append((indent, "init_args", match[1]))
        text = _WRAPPING.sub("", _VALUES.sub("", text))
        # ---- A key or a class, around the lines that follow; or a mistake ----
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
    # ---- A key that does not exist, or is missing ----
    for pattern in _UNKNOWN:
        if match := pattern.fullmatch(text):
            return _explain_unknown_key(line, match.groupdict().get("group"), match["key"], known)
    if match := _REQUIRED.fullmatch(text):
        missing = [f"{key}.{name}" if key else name for name in match[1].split(", ")]
        return ", ".join(missing), MISSING
    # ---- A value that does not fit, in plain words ----
    if match := _LITERAL.fullmatch(text):
        text = f"expected one of {match[1]}{match[2]}"
    elif match := _NOT_IMPORTED.fullmatch(text):
        text = explain_class(match[1], key=key)
    elif key in _SOURCES and class_path is not None and _may_be_path(class_path):
        text = explain_class(class_path, (), key)
    elif match := _NO_MODULE.fullmatch(text):
        file = f"{match[1].replace('.', '/')}.py"
        text = (
            f"cannot import {class_path or match[1]}: there is no module {match[1]!r}; put {file} into the current"
            " folder"
        )
    elif match := _TYPE.fullmatch(text):
        name = match[1] or match[2]
        text = f"expected {TYPE_WORDS.get(name, name)}{match[3] or ''}"
    return key, text.replace(". Got value: ", ", got ")


def _explain_unknown_key(line: _ParsedLine, group: str | None, name: str, known: list[str]) -> tuple[str, str]:
    # ---- The full key, and what exists in its place ----
    if name == "class_path" and not group:
        return line.key, "write the arguments of the class under init_args, beside class_path"
    inner = f"{group}.{name}" if group else name
    full = f"{line.key}.{inner}" if line.key else inner
    last = full.rpartition(".")[2]
    if line.class_path:
        parts = inner.split(".")
        options = _argument_names(line.class_path, parts[:-1])
        for depth in range(len(parts) - 1):  # a group around the key may be what is misspelt
            groups = _argument_names(line.class_path, parts[:depth])
            if groups and parts[depth] not in groups:
                last, options = parts[depth], groups
                break
    else:
        last, options = first_unknown(full, known)
    return full, explain_unknown(full, last, options, known)


def explain_unknown(
    full: str, last: str, options: Sequence[str], known: Iterable[str], names: ArgumentNames | None = None
) -> str:
    """Return what is wrong with a key that does not exist: it was renamed, is misspelt, in the wrong group, or unknown.

    Args:
        full: the key.
        last: the part of it that does not exist, which may be a group around the rest.
        options: what exists in its place.
        known: keys that always exist.
        names: looks up the arguments of a class by its path and the groups within; by default the class is imported.
    """
    path = plain_parts(full)
    renamed = RENAMED_KEYS.get(".".join(path[-2:]))
    if renamed is not None and (renamed in options or not options):
        return f"was renamed; write {full.removesuffix(last)}{renamed}"
    if close := difflib.get_close_matches(last, options, 1):
        hint = f"did you mean {close[0]}?"
    elif places := [place for place in _places(path[-1], known, names or _argument_names) if place != full]:
        # A key of the run itself before one of a callback.
        places = [place for place in places if place.startswith(("model.", "data.", "trainer."))] or places
        hint = f"did you mean {' or '.join(places[:3])}?"
    else:
        hint = f"the keys are {', '.join(options)}" if options else "remove it"
    return f"there is no such key; {hint}"


def explain_class(name: str, classes: Iterable[str] | None = None, key: str = "") -> str:
    """Return what is wrong with the name of a class that does not exist.

    Args:
        name: as it was given.
        classes: names of ours, by default imported.
        key: that it stands at. Where a class of a library may stand, those of Lightning or torch are meant too.
    """
    home = _LIBRARY_CLASSES.get(key.rpartition(".")[2])
    if home is not None:
        close = _class_of_library(name, *home)
    else:
        close = close_name(name) if classes is None else next(iter(difflib.get_close_matches(name, classes, 1)), None)
    elsewhere = "give a class of remax_lightning, or a path such as my_module.MyClass"
    if key in _SOURCES:
        argument, kind = _SOURCES[key]
        close = close if close and close.endswith(kind) else None
        elsewhere = f"write {key}: {{{argument}: {name}}}, or give a class such as my_module.MyClass"
    return f"there is no class {name!r}; " + (f"did you mean {close}?" if close else elsewhere)


def _may_be_path(text: str) -> bool:
    return "/" in text or ROW_FILES.search(text) is not None or Path(text).exists()


def _class_of_library(name: str, ours: str, library: str) -> str | None:
    """Return the class of two modules that a word stands for, such as `wandb`; None if none is near."""
    names: list[str] = []
    for module in map(import_module, (ours, library)):
        kinds = ((item, getattr(module, item, None)) for item in getattr(module, "__all__", vars(module)))
        names += [item for item, kind in kinds if inspect.isclass(kind) and not inspect.isabstract(kind)]
    # "adamw" is AdamW, "wandb" is in WandbLogger, and "AdamX" is near Adamax
    folded = {item.lower(): item for item in reversed(names)}  # ours count before those of the library
    word = name.rpartition(".")[2].lower()
    if word in folded:
        return folded[word]
    holding = [item for item in names if word in item.lower()] if len(word) > 2 else []
    close = holding or [folded[item] for item in difflib.get_close_matches(word, folded, 1)]
    return close[0] if close else None


def plain_parts(key: str) -> list[str]:
    """Return the parts of a key without those that a user may leave out."""
    # "model.init_args.policy.path" -> ["model", "policy", "path"]
    return [part for part in key.split(".") if part != "init_args"]


def close_name(name: str, others: Iterable[str] = ()) -> str | None:
    """Return the nearest to a name that does not exist, of the classes of this package and others; None if none is."""
    close = difflib.get_close_matches(name.rpartition(".")[2], [*our_classes(), *others], 1)
    return close[0] if close else None


def first_unknown(key: str, known: Iterable[str]) -> tuple[str, list[str]]:
    """Return the first part of a key that does not exist, which may be a group, and what exists in its place."""
    options: list[str] = []
    prefix, parts = "", key.split(".")
    for part in parts:
        # the names one level below `prefix`: "trainer." -> "max_steps", "devices", ...
        inner = dict.fromkeys(dest.removeprefix(prefix).partition(".")[0] for dest in known if dest.startswith(prefix))
        if not inner:
            break
        options, last = [option for option in inner if option not in _NO_KEYS], part
        if part not in inner:
            break
        prefix += f"{part}."
    return last, options


def _places(name: str, known: Iterable[str], names: ArgumentNames) -> list[str]:
    """Return the keys of this name elsewhere in a configuration: a user may have left out the groups around it."""
    places = [dest for dest in known if "." in dest and dest.rpartition(".")[2] == name]
    for key, class_path in _MAIN_CLASSES.items():
        options = names(class_path, [])
        places += [f"{key}.{name}"] if name in options else []
        places += [f"{key}.{group}.{name}" for group in options if name in names(class_path, [group])]
    return list(dict.fromkeys(places))


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
