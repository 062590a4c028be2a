"""YAML and JSON of configurations, read within bounds: size, depth, what aliases expand to, and keys that stand twice.

A few lines of YAML can stand for billions of values, because an alias repeats all that its anchor names. PyYAML shares
the repeated object, but whoever walks over it, as jsonargparse does with every configuration, meets each copy. And of
two equal keys PyYAML takes the last one without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_CHARACTERS = 2_000_000
"""Length of a text. The largest configuration of this package has 6,000 characters."""
MAX_DEPTH = 64
"""How deep lists and groups may be nested. Configurations reach 10; Python's own limit is near 300 here."""
MAX_VALUES = 100_000
"""How many values a text may stand for, aliases written out. jsonargparse takes some 20 seconds for so many."""
MAX_DUPLICATES = 10
"""How many keys that stand twice are told at once."""

_STRUCTURE = frozenset(":[{&*\n?")
"""Without any of these characters a text is a single value."""
# the loader in C, where PyYAML was built with it: far faster
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class BoundsError(yaml.YAMLError):
    """A text is no YAML that is read: it has a mistake, is beyond the bounds, or has a key that stands twice."""


@dataclass
class _Group:
    """A list or a group of keys while its events pass."""

    is_mapping: bool
    anchor: str | None
    values: int = 1  # in it, aliases written out
    at_key: bool = True  # whether a key is next
    keys: set[str] = field(default_factory=set)
    lines: dict[str, int] = field(default_factory=dict)  # where each key stands first, from 1


def load_yaml(text: str, source: str = "") -> Any:
    """Return the value of a YAML or JSON text.

    Args:
        text: what a file holds.
        source: what messages call the file; empty for a value on the command line.

    Raises:
        yaml.YAMLError: if it is no YAML, is beyond the bounds, or has two equal keys in a group. The message names
            file and lines.
    """
    return _load_checked(yaml.safe_load, text, source)


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file (`load_yaml`), which is read only if it is small enough.

    Raises:
        OSError, UnicodeDecodeError: if the file cannot be read, or is no text in UTF-8.
        yaml.YAMLError: as in `load_yaml`.
    """
    check_size(path)
    return load_yaml(path.read_text(encoding="utf-8"), str(path))


def check_size(path: Path) -> None:
    """Refuse a file that is too large for a configuration, before it is read.

    Raises:
        BoundsError: if it has more than `MAX_CHARACTERS` bytes.
    """
    if path.is_file() and (size := path.stat().st_size) > MAX_CHARACTERS:
        raise BoundsError(
            f"{path}: {size:,} bytes are too many for a configuration (at most {MAX_CHARACTERS:,}); give a YAML file"
        )


def use_for_command_line(write_out: Callable[[Any], Any]) -> None:
    """Let jsonargparse read all YAML within the bounds: files, overlays, files of groups, values on the command line.

    jsonargparse asks one loader for everything. Its own goes on reading what has passed; calling this again is safe.

    Args:
        write_out: gets each value that was read, and returns what it stands for.
    """
    from jsonargparse import get_loader, set_loader  # who only reads YAML needs no parser

    load = get_loader("yaml")
    # once: a loader around a checked loader would check everything twice
    if not getattr(load, "checks_bounds", False):
        set_loader("yaml", _CheckedLoader(load, write_out), (yaml.YAMLError,))


class _CheckedLoader:
    """A loader of jsonargparse, which passes `path` where a text is that of a file."""

    checks_bounds = True

    def __init__(self, load: Callable[[str], Any], write_out: Callable[[Any], Any]) -> None:
        self.load, self.write_out = load, write_out

    def __call__(self, text: str, path: Any = "") -> Any:
        return self.write_out(_load_checked(self.load, text, str(path or "")))


def _load_checked(load: Callable[[str], Any], text: str, source: str) -> Any:
    check_bounds(text, source)
    try:
        return load(text)
    except yaml.MarkedYAMLError as error:
        if not source:
            raise
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        hint = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
        raise BoundsError(f"{source}{place}: not valid YAML ({error.problem}){hint}") from error
    except yaml.reader.ReaderError as error:
        raise BoundsError(f"{source or 'YAML'}: {str(error).splitlines()[0]}; save it as text in UTF-8") from error
    except (ValueError, OverflowError, RecursionError) as error:  # of PyYAML's constructors, such as int of 5000 digits
        raise BoundsError(f"{source}: {error}" if source else str(error)) from error


def check_bounds(text: str, source: str = "") -> None:
    """Refuse a text that stands for too much, or in which a key stands twice.

    The events of the parser pass one by one, so nothing is built of a text that is refused. Texts that are no YAML
    pass up to their mistake, which the loader tells.

    Args:
        text: YAML or JSON.
        source: what messages call the file.

    Raises:
        BoundsError: naming file and lines; all keys that stand twice are told together.
    """
    front = f"{source}, " if source else ""
    if len(text) > MAX_CHARACTERS:
        raise BoundsError(f"{front}{len(text):,} characters are too many for a configuration ({MAX_CHARACTERS:,})")
    if _STRUCTURE.isdisjoint(text):  # such as "5" or "runs/sft/last"
        return
    # ---- Count, event by event ----
    bounds = _Bounds(front)
    try:
        for event in yaml.parse(text, Loader=_Loader):
            bounds.pass_event(event)
    except BoundsError:
        raise
    except yaml.MarkedYAMLError as error:
        if "nesting" in str(
            error.problem
        ):  # the parser in C has a limit of its own, and meets it before the first event
            raise bounds.too_deep(1 + (error.problem_mark.line if error.problem_mark else 0)) from None
        return  # the loader will say it
    except yaml.YAMLError:
        return
    # ---- Keys that stand twice ----
    if lines := bounds.duplicates:
        more = [f"and {len(lines) - MAX_DUPLICATES} more"] if len(lines) > MAX_DUPLICATES else []
        raise BoundsError(front + "; ".join([*lines[:MAX_DUPLICATES], *more]) + "; remove one of them")


class _Bounds:
    """Follows the events of a parser, and counts what they stand for.

    Args:
        front: what messages begin with.
    """

    def __init__(self, front: str) -> None:
        self.front = front
        self.duplicates: list[str] = []
        self._stack = [_Group(is_mapping=False, anchor=None)]
        self._sizes: dict[str, int | None] = {}  # by anchor; None until its group has ended

    def pass_event(self, event: yaml.Event) -> None:
        """Take in the next event; raises `BoundsError` where the text goes beyond the bounds."""
        line = 1 + (event.start_mark.line if event.start_mark else 0)
        if isinstance(event, yaml.CollectionStartEvent):
            if len(self._stack) > MAX_DEPTH:
                raise self.too_deep(line)
            self._name(event.anchor, None)
            self._stack.append(_Group(isinstance(event, yaml.MappingStartEvent), event.anchor))
        elif isinstance(event, yaml.CollectionEndEvent):
            # "&a [1, 1, 1]" is 4 values, the list and what is in it; "*a" counts as many
            ended = self._stack.pop()
            self._name(ended.anchor, ended.values)
            self._add(ended.values, line)
        elif isinstance(event, yaml.ScalarEvent):
            self._name(event.anchor, 1)
            self._note_key(event.value, line)
            self._add(1, line)
        elif isinstance(event, yaml.AliasEvent):
            size = self._sizes.get(str(event.anchor), 1)  # an unknown anchor is the loader's to tell
            if size is None:
                raise BoundsError(f"{self.front}line {line}: the alias *{event.anchor} holds itself; write it out")
            self._add(size, line)

    def too_deep(self, line: int) -> BoundsError:
        """Return what is raised where lists and groups are nested too deeply."""
        return BoundsError(
            f"{self.front}line {line}: nested too deeply, more than {MAX_DEPTH} lists and groups; write it out"
        )

    def _name(self, anchor: str | None, values: int | None) -> None:
        if anchor:
            self._sizes[anchor] = values

    def _add(self, values: int, line: int) -> None:
        """Count values into the group around them, and turn from key to value or back."""
        group = self._stack[-1]
        group.values += values
        group.at_key = not group.at_key
        if group.values > MAX_VALUES:
            raise BoundsError(
                f"{self.front}line {line}: it stands for more than {MAX_VALUES:,} values, with its aliases written out;"
                " write less, or put data into a file of its own"
            )

    def _note_key(self, key: str, line: int) -> None:
        """Remember where a key stands, or that it has stood in this group before."""
        group = self._stack[-1]
        if not group.is_mapping or not group.at_key:  # a value, or an item of a list
            return
        first = group.lines.setdefault(key, line)
        if key in group.keys:
            self.duplicates.append(f"the key {key!r} stands twice, in {_lines(first, line)}")
        group.keys.add(key)


def _lines(first: int, second: int) -> str:
    return f"line {first}" if first == second else f"lines {first} and {second}"
