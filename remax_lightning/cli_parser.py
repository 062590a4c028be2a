"""The parser of the command line: YAML within bounds, and all mistakes of a configuration in one message."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from remax_lightning.cli_arguments import (
    CONFIG,
    MAX_MISTAKES,
    NOT_FINITE,
    completed,
    is_consequence,
    message_of,
    nonfinite_numbers,
    raw_values,
    single,
    with_fillers,
    without_keys,
    words_of,
)
from remax_lightning.cli_checks import explain_objects, explain_values, takes_group
from remax_lightning.cli_errors import explain_message
from remax_lightning.cli_keys import KeyCheck
from remax_lightning.cli_shorthand import SUBCOMMANDS, write_out, write_out_option
from remax_lightning.cli_signatures import LiveSignatures
from remax_lightning.errors import printable
from remax_lightning.yaml_files import BoundsError, check_bounds, check_size, use_for_command_line


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
        arguments = original = completed(list(sys.argv[1:] if args is None else args))
        callbacks = {name: kind for _, parser in self.commands() for name, kind in parser.checked_callbacks.items()}
        mistakes = _unreadable_values(arguments, callbacks)
        arguments = without_keys(arguments, mistakes) or arguments
        # ---- Keys and values that the signatures refuse: they are told by their full keys, at any depth ----
        check = KeyCheck(arguments[0] if arguments else "", LiveSignatures(callbacks))
        wrong = {k: text for k, text in check.run(arguments).items() if not is_consequence(k, text, mistakes)}
        for key in reversed(wrong):  # elements of a list from the last
            # A number out of its range stays: with a default in its place, what depends on it would be judged wrongly.
            if key not in check.out_of_range:
                arguments = without_keys(arguments, [key]) or arguments
        mistakes |= wrong
        # ---- Parse; leave out what is wrong; parse the rest, until it passes or nothing changes any more ----
        tip, parsed = "", None
        if "config" not in wrong:
            tip, parsed = self._parse_in_parts(arguments, mistakes, check, *rest, **options)
        # ---- Values that the parser accepts and nothing else will ----
        lines = [f"{key}: {text}" if key else text for key, text in mistakes.items()]
        lines += self._wrong_values(original, parsed, mistakes)
        if not lines:
            return parsed
        # ---- One message for all ----
        print(f"remax: error: {printable(message_of(lines))}\n{tip}", end="", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)

    def _parse_in_parts(
        self, arguments: list[str], mistakes: dict[str, str], check: KeyCheck, *rest: Any, **options: Any
    ) -> tuple[str, Any]:
        """Parse; where something is wrong, leave it out and parse the rest.

        Args:
            arguments: of the command line.
            mistakes: texts by key; those that are found are added.
            check: has the elements of lists that keys lie in.
            *rest: for the parser.
            **options: for the parser.

        Returns:
            The first advice that the parser gave, and what was parsed in the end; None where nothing could be.
        """
        tip, tried = "", list[list[str]]()
        left_out: set[str] = set()  # groups, of which then keys are missing
        while len(mistakes) < MAX_MISTAKES and arguments not in tried:
            tried.append(arguments)
            try:
                parsed = super().parse_args(arguments, *rest, **options)
                texts = [f'Parser key "{key}": {NOT_FINITE.format(value)}' for key, value in nonfinite_numbers(parsed)]
                if not texts:
                    return tip, parsed
                self.error("\n".join(texts))
            except _ParseExit as end:
                tip = tip or end.tip
                further = {
                    key: text
                    for key, text in _located(dict(single(end.mistakes)), check.elements).items()
                    if not is_consequence(key, text, mistakes)
                    and not (text.startswith("missing") and key.partition(".")[0] in left_out)
                }
                mistakes |= further
                if not mistakes.keys().isdisjoint(("", "config")):  # all that a file sets would be missing
                    break
                groups = dict.fromkeys(key.partition(".")[0] for key in mistakes if key)
                reduced = (
                    without_keys(arguments, list(further)[:1])  # a message names one key, or several types of one
                    or with_fillers(arguments, end.mistakes)
                )
                if reduced is None:
                    reduced = without_keys(arguments, groups)
                    left_out.update(groups)
                arguments = reduced or arguments
        return tip, None

    def dump(self, *args: Any, **options: Any) -> str:
        """Return a configuration as text; it was checked when it was parsed, which takes as long as the rest."""
        return str(super().dump(*args, **{"skip_validation": True, **options}))

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
        values = raw_values(arguments) if parsed is None else parsed[subcommand]
        if parsed is None:  # a group may be a file or shorthand, and null is what a key with nothing under it is
            is_group = {key: "." not in key or takes_group(key) for key in values}
            values = {key: value for key, value in values.items() if not (isinstance(value, str) and is_group[key])}
        # ---- What is wrong with them, unless it follows from a mistake that is known ----
        wrong = explain_values(values, callbacks)
        missing = [key for key, text in single(mistakes) if text.startswith("missing")]  # a filler stands there
        lines = [
            line
            for line in lines
            if not line.startswith(tuple(f"{key}." for key in missing)) and not _is_told(line, mistakes)
        ]
        return [f"{key}: {text}" for key, text in wrong.items() if not is_consequence(key, text, mistakes)] + lines

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


class _ParseExit(SystemExit):
    """The parser refuses its arguments: the mistakes by key, and a line of advice."""

    def __init__(self, mistakes: dict[str, str], tip: str) -> None:
        super().__init__(2)
        self.mistakes, self.tip = mistakes, tip


def _located(mistakes: Mapping[str, str], elements: Mapping[str, tuple[Any, str]]) -> dict[str, str]:
    """Return mistakes with the keys of the elements that they are in.

    jsonargparse names a list or a group of classes, and not which of them is wrong, so each is parsed alone. Where a
    key may have several types, it says of each why it was not met: that of a type that was not meant is left out.

    Args:
        mistakes: by the key that jsonargparse names.
        elements: as in `KeyCheck`.
    """
    located = {}
    for key, text in mistakes.items():
        around = {name: item for name, item in elements.items() if f"{key}.".startswith(f"{name.rpartition('.')[0]}.")}
        places = [
            f"{name}{inner.removeprefix('element')}"
            for name, (value, base) in around.items()
            for inner, said in _mistakes_of_element(value, base).items()
            if said == text
        ]
        located[places[0] if places else key] = text
    return {key: text for key, text in located.items() if not any(other.startswith(f"{key}.") for other in located)}


def _is_told(line: str, mistakes: Mapping[str, str]) -> bool:
    """Whether what a class says of a number out of its range is known by its full key."""
    # "model.reward.init_args.timeout must be ..." is "model.reward.init_args.parts.b.init_args.timeout: must be ..."
    key, word, rest = line.partition(", got ")[0].partition(" must ")  # it may be -1 here, and -1.0 there
    return bool(word) and any(
        other.rpartition(".")[2] == key.rpartition(".")[2] and text.startswith(f"must {rest}, got ")
        for other, text in mistakes.items()
    )


def _mistakes_of_element(value: Any, base: str) -> dict[str, str]:
    """Return what jsonargparse says of an element of a list or group of classes, by keys that begin with `element`."""
    module, _, name = base.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--element", type=getattr(import_module(module), name))
    try:
        parser.parse_object({"element": write_out({"callbacks": [value]})["callbacks"][0]})
    except ArgumentError as error:
        return explain_message(str(error))
    except Exception:  # the parser of the command has told it in other words
        pass
    return {}


def _unreadable_values(arguments: list[str], callbacks: Collection[str]) -> dict[str, str]:
    """Return what is wrong, by key, with groups and lists that are beyond the bounds of YAML.

    They stand on the command line, or in files of their own, which jsonargparse would read to their ends.

    Args:
        arguments: of the command.
        callbacks: keys of callbacks, which are groups, too.
    """
    mistakes = {}
    for key, value in raw_values(arguments).items():
        if not isinstance(value, str) or write_out_option(key, value):  # a path in shorthand is no file of keys
            continue
        if key in callbacks or takes_group(key):
            try:
                check_size(Path(value))
            except (BoundsError, OSError, ValueError) as error:  # ValueError: a null character in a path
                mistakes[key] = str(error)
    for _, name, value in words_of(arguments):
        if name and name not in CONFIG and value is not None and value.lstrip()[:1] in ("{", "["):
            try:
                check_bounds(value)
            except BoundsError as error:
                mistakes[name] = str(error)
    return mistakes
