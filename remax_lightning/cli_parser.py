"""The parser of the command line: YAML within bounds, and all mistakes of a configuration in one message."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from remax_lightning.cli_checks import explain_objects, explain_values, flatten, takes_group
from remax_lightning.cli_errors import explain_message
from remax_lightning.cli_shorthand import SUBCOMMANDS, dependent_defaults, write_out, write_out_option
from remax_lightning.errors import printable
from remax_lightning.shipped_configs import config_path
from remax_lightning.yaml_files import (
    BoundsError,
    check_bounds,
    check_size,
    load_yaml,
    read_yaml,
    use_for_command_line,
)

_CONFIG = ("config", "c")
MAX_MISTAKES = 10
"""How many wrong keys or values are told at once."""
_NOT_FINITE = 'Parser key "{}": must be a finite number, got {}; null means "none" where a key may be unset'
_FILLERS = {
    "model.policy.path": "missing",
    "model.reward_model.path": "missing",
    "model.reward": '{"class_path": "remax_lightning.rewards.FunctionReward", "init_args": {"function": "missing.it"}}',
    "data.path": "missing",
}
"""Values in place of keys without a default, with which the rest of a configuration is checked."""
MAX_LENGTH = 600
"""Characters of one mistake; values may be long."""


class RemaxParser(LightningArgumentParser):
    """Exits with one message that names the key, instead of pages of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # With abbreviations --trainer.max_step would mean --trainer.max_steps, and a typo could mean another key.
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.checked_callbacks: Mapping[str, type] = {}  # by key; their options are checked with the other values
        use_for_command_line(write_out)

    def parse_path(self, cfg_path: Any, *rest: Any, **options: Any) -> Any:
        """Parse a configuration file, unless it is too large to be one, or no text."""
        try:
            check_size(Path(str(cfg_path)))
            return super().parse_path(cfg_path, *rest, **options)
        except yaml.YAMLError as error:
            self.error(str(error))
        except UnicodeDecodeError as error:
            self.error(f"{cfg_path}: no text in UTF-8 ({error}); save it as UTF-8, or give a YAML file")

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Parse, and check the values; of several wrong keys or values, tell all at once.

        jsonargparse stops at the first, so what it names is left out and the rest is parsed again. Then come the
        values that it lets pass, of what could be parsed in the end.
        """
        if self.checked_callbacks:  # the parser of a subcommand; the one around it tells the mistakes
            return super().parse_args(args, *rest, **options)
        # ---- Groups and lists on the command line that are beyond the bounds of YAML ----
        arguments = original = _completed(list(sys.argv[1:] if args is None else args))
        callbacks = {name for _, parser in self.commands() for name in parser.checked_callbacks}
        mistakes = _unreadable_values(arguments, callbacks)
        tip, parsed = "", None
        arguments = _without_keys(arguments, mistakes) or arguments
        # ---- Parse; leave out what is wrong; parse the rest, until it passes or nothing changes any more ----
        tried: list[list[str]] = []
        left_out: set[str] = set()  # groups, of which then keys are missing
        while parsed is None and len(mistakes) < MAX_MISTAKES and arguments not in tried:
            tried.append(arguments)
            try:
                parsed = super().parse_args(arguments, *rest, **options)
                if lines := [_NOT_FINITE.format(key, value) for key, value in _nonfinite_numbers(parsed)]:
                    parsed = None
                    self.error("\n".join(lines))
            except _ParseExit as end:
                tip = tip or end.tip
                further = {
                    key: text
                    for key, text in _single(end.mistakes)
                    if not _is_consequence(key, text, mistakes)
                    and not (text.startswith("missing") and key.partition(".")[0] in left_out)
                }
                mistakes |= further
                if not mistakes.keys().isdisjoint(("", "config")):  # all that a file sets would be missing
                    break
                groups = dict.fromkeys(key.partition(".")[0] for key in mistakes if key)
                reduced = (
                    _without_keys(arguments, list(further)[:1])  # a message names one key, or several types of one
                    or _with_fillers(arguments, end.mistakes)
                )
                if reduced is None:
                    reduced = _without_keys(arguments, groups)
                    left_out.update(groups)
                arguments = reduced or arguments
        # ---- Values that the parser accepts and nothing else will ----
        lines = [f"{key}: {text}" if key else text for key, text in mistakes.items()]
        lines += self._wrong_values(original, parsed, mistakes)
        if not lines:
            return parsed
        # ---- One message for all ----
        lines = [line if len(line) <= MAX_LENGTH else f"{line[:MAX_LENGTH]}..." for line in lines[:MAX_MISTAKES]]
        print("remax: error: {}\n{}".format(printable("\n  ".join(lines)), tip), end="", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)

    def _wrong_values(self, arguments: list[str], parsed: Any, mistakes: Mapping[str, str]) -> list[str]:
        """Return what is wrong with values that jsonargparse accepts, a line each.

        Of arguments that cannot be parsed even without the mistakes, the values count as they stand in them.
        """
        # ---- The values: as parsed, or as they are written ----
        subcommand = next((argument for argument in arguments if argument in SUBCOMMANDS), None)
        if subcommand is None:
            return []
        callbacks = next((p.checked_callbacks for name, p in self.commands() if name == subcommand), {})
        lines = [] if parsed is None else explain_objects(parsed[subcommand], callbacks)
        values = _raw_values(arguments) if parsed is None else parsed[subcommand]
        if parsed is None:  # a group may be a file, and null is what a key with nothing under it is
            values = {key: value for key, value in values.items() if not isinstance(value, str) or "." in key}
        # ---- What is wrong with them, unless it follows from a mistake that is known ----
        wrong = explain_values(values, callbacks)
        return [f"{key}: {text}" for key, text in wrong.items() if not _is_consequence(key, text, mistakes)] + lines

    def commands(self) -> Iterator[tuple[str, RemaxParser]]:
        """Yield the subcommands with their parsers."""
        for action in self._actions:
            if isinstance(action.choices, dict):
                yield from action.choices.items()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with code 2; `parse_args` prints what is wrong."""
        if not self.exit_on_error:
            super().error(message, ex)
        parsers = [self, *(parser for _, parser in self.commands())]
        known = dict.fromkeys(action.dest for parser in parsers for action in parser._actions)
        tip = "remax --help lists the subcommands\n" if "subcommand" in message else ""
        raise _ParseExit(explain_message(message, known), tip)


def _completed(arguments: list[str]) -> list[str]:
    """Return the arguments of the command with shorthand written out, and defaults that depend on them."""
    completed: list[str] = []
    for words, name, value in _words(arguments):
        if name in _CONFIG and value is not None:
            completed += ["--config", config_path(value)]
        else:
            completed += write_out_option(name, value) or words
    asks_for_help = any(name.endswith(".help") for _, name, _ in _words(arguments))  # must be the last option
    if any(argument in SUBCOMMANDS for argument in arguments) and not asks_for_help:
        for key, default in dependent_defaults(list(_configs(completed))).items():
            completed.append(f"--{key}={default}")
    return completed


def _configs(arguments: list[str]) -> Iterator[Any]:
    """Yield what each option sets in the form of a YAML file; what cannot be read counts as nothing."""
    for _, name, value in _words(arguments):
        if name in _CONFIG and value is not None:
            yield _read_config(value)
        elif name.startswith(("model", "trainer")) and value is not None:
            try:
                config = load_yaml(value)
            except yaml.YAMLError:
                config = value
            for key in reversed(_plain(name).split(".")):
                config = {key: config}
            yield config


class _ParseExit(SystemExit):
    """The parser refuses its arguments: the mistakes by key, and a line of advice."""

    def __init__(self, mistakes: dict[str, str], tip: str) -> None:
        super().__init__(2)
        self.mistakes, self.tip = mistakes, tip


def _single(mistakes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield mistakes by single keys; jsonargparse names all that is missing together."""
    for keys, text in mistakes.items():
        yield from ((key, text) for key in keys.split(", "))


def _is_consequence(key: str, text: str, mistakes: Mapping[str, str]) -> bool:
    """Whether a key is wrong only because another one was left out: it, or a group around it, is missing now."""
    plain = _plain(key)
    if any(plain == _plain(other) or _plain(other).startswith(f"{plain}.") for other in mistakes):
        return True
    return text.startswith("missing") and any(
        f"did you mean {plain.rpartition('.')[2]}?" in said or plain.startswith(f"{_plain(other)}.")
        for other, said in mistakes.items()
    )


def _with_fillers(arguments: list[str], mistakes: Mapping[str, str]) -> list[str] | None:
    """Return the arguments with values for keys that are missing, so that the rest is checked; None if it has them."""
    names = {name for _, name, _ in _words(arguments)}
    missing = [key for key, text in _single(mistakes) if text.startswith("missing")]
    fillers = [f"--{key}={_FILLERS[key]}" for key in missing if key in _FILLERS and key not in names]
    return [*arguments, *fillers] if fillers else None


def _plain(key: str) -> str:
    # "model.init_args.policy.path" -> "model.policy.path"
    return ".".join(part for part in key.split(".") if part != "init_args")


def _words(arguments: list[str]) -> Iterator[tuple[list[str], str, str | None]]:
    """Yield the words of each option of the command with its name and its value; other words with an empty name."""
    index = 0
    while index < len(arguments):
        # "--trainer.max_steps=5" is one word, "--trainer.max_steps" "5" are two, "--trainer.callbacks+=..." appends.
        name, equals, value = arguments[index].partition("=")
        if not name.startswith("--") and name != "-c":
            yield arguments[index : index + 1], "", None
            index += 1
            continue
        separate = not equals and index + 1 < len(arguments) and not arguments[index + 1].startswith("--")
        words = arguments[index : index + 1 + separate]
        yield words, name.lstrip("-").rstrip("+"), value if equals else words[1] if separate else None
        index += len(words)


def _without_keys(arguments: list[str], keys: Iterable[str]) -> list[str] | None:
    """Return the arguments of the command without keys, on the command line and in YAML files; None if none has them.

    A YAML file with the key is replaced by its text without it. The key of a group takes its keys along.
    """
    changed = False
    for path in [_plain(key).split(".") for key in keys if key]:
        kept: list[str] = []
        for words, name, value in _words(arguments):
            if name and _plain(name).split(".")[: len(path)] == path:
                changed = True
            elif name in _CONFIG and value is not None and (text := _yaml_without_key(value, path)) is not None:
                changed = True
                # jsonargparse takes the text of a YAML file in place of its path
                kept += ["--config", text]
            else:
                kept += words
        arguments = kept
    return arguments if changed else None


def _read_config(config: str) -> Any:
    """Return the value of a configuration, a file or a text; None if it cannot be read."""
    try:
        return load_yaml(config) if "\n" in config or config.startswith("{") else read_yaml(Path(config))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _yaml_without_key(config: str, path: list[str]) -> str | None:
    """Return the YAML text of a configuration, a file or a text, without a key; None if it does not have it."""
    values = _read_config(config)
    return yaml.safe_dump(values) if _remove(values, path) else None


def _raw_values(arguments: list[str]) -> dict[str, Any]:
    """Return the values of the arguments by key as in the YAML; later ones come before earlier ones."""
    values: dict[str, Any] = {}
    for _, name, value in _words(arguments):
        if name in _CONFIG and value is not None:
            values |= dict(flatten(_read_config(value) or {}))
        elif name and value is not None:
            try:
                values |= dict(flatten(load_yaml(value), _yaml_key(name)))
            except yaml.YAMLError:
                values[_yaml_key(name)] = value
    return values


def _yaml_key(name: str) -> str:
    """Return the key as in the YAML, where arguments of the module and of the data module stand without init_args."""
    # "model.init_args.policy.path" -> "model.policy.path"; "trainer.logger.init_args.name" stays
    group, _, rest = name.partition(".init_args.")
    return f"{group}.{rest}" if rest and group in ("model", "data") else name


def _unreadable_values(arguments: list[str], callbacks: Collection[str]) -> dict[str, str]:
    """Return what is wrong, by key, with groups and lists that are beyond the bounds of YAML.

    They stand on the command line, or in files of their own, which jsonargparse would read to their ends.

    Args:
        arguments: of the command.
        callbacks: keys of callbacks, which are groups, too.
    """
    mistakes = {}
    for key, value in _raw_values(arguments).items():
        if not isinstance(value, str) or write_out_option(key, value):  # a path in shorthand is no file of keys
            continue
        if key in callbacks or takes_group(key):
            try:
                check_size(Path(value))
            except (BoundsError, OSError, ValueError) as error:  # ValueError: a null character in a path
                mistakes[key] = str(error)
    for _, name, value in _words(arguments):
        if name and name not in _CONFIG and value is not None and value.lstrip()[:1] in ("{", "["):
            try:
                check_bounds(value)
            except BoundsError as error:
                mistakes[name] = str(error)
    return mistakes


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
            inner = key if not key and name in SUBCOMMANDS else f"{key}.{name}" if key else str(name)
            yield from _nonfinite_numbers(part, key if key in ("model", "data") and name == "init_args" else inner)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _nonfinite_numbers(part, f"{key}[{number}]")
