"""What is raised when the user's input is wrong, as opposed to a fault of ours; types and ranges of arguments."""

from __future__ import annotations

import math
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeGuard, Union, get_args, get_origin, get_type_hints

_PLACE = re.compile(r"^[^\n]*?, (?:near )?(?:line|row) \d+: ")


class UserError(ValueError):
    """A mistake in what the user gave: the command line prints the message alone, without a traceback.

    The message names the key (as it stands in the configuration), what was expected, what was got and what to do.
    """


class DataError(UserError):
    """A data file or a row of it cannot be used; the message names file and line."""

    @property
    def without_place(self) -> str:
        """The message without file and line, or row."""
        return _PLACE.sub("", str(self), count=1)

    @property
    def reason(self) -> str:
        """What is wrong, without place and values: the same for all rows with the same mistake."""
        text = re.split(r"; | \(|, got ", self.without_place, maxsplit=1)[0]
        return re.sub(r"\d+", "N", text.partition("\n")[0])[:100] or type(self).__name__


class RewardError(UserError):
    """A reward failed or returned something that must not be trained on; the message shows the prompt."""


class ArgumentTypeError(UserError, TypeError):
    """An argument of another type than its annotation says; from Python it is a TypeError."""


def check_types(function: Callable[..., Any], values: Mapping[str, Any], key: str = "") -> None:
    """Refuse arguments of other types than a function's annotations, which only a configuration has checked before.

    Args:
        function: with annotations.
        values: arguments by name, as `locals()` at the function's beginning has them; other names are not looked at.
        key: where they stand in a configuration, for the message.

    Raises:
        ArgumentTypeError: naming the argument, the type that is expected, and the value.
    """
    for name, hint in get_type_hints(function).items():
        if name in values:
            _check_type(f"{key and f'{key}.'}{name}", values[name], hint)


def _check_type(key: str, value: Any, hint: Any) -> None:
    if not _is_of_type(value, hint):
        shown = "None" if value is None else f"{type(value).__name__} {value!r:.60}"
        raise ArgumentTypeError(f"{key} must be {_type_in_words(hint)}, got {shown}")


def _is_of_type(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_is_of_type(value, option) for option in inner)
    if origin is Literal:  # which words there are is checked where they are known
        return isinstance(value, tuple(type(option) for option in inner))
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if origin in (list, tuple, dict):
        kinds = (list, tuple) if origin is tuple else origin
        values = value.values() if isinstance(value, dict) else value
        item = inner[-1] if inner and inner[-1] is not Ellipsis else next(iter(inner), Any)
        return isinstance(value, kinds) and all(_is_of_type(entry, item) for entry in values)
    return value is None if hint is NoneType else not isinstance(hint, type) or isinstance(value, hint)


def _type_in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type_in_words(option) for option in get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False", NoneType: "None"}
    if hint in words:
        return words[hint]
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


# ---- Ranges of numbers, in the annotations of arguments: `Annotated[int, at_least(1)]` ----


class Range(NamedTuple):
    """The numbers that an argument takes; NaN and infinite ones never. `at_least` and `above` make it.

    It stands in the annotation of the argument. `check_ranges` refuses other numbers where the object is made, and
    `signatures.json` carries it to the command line, which refuses them before torch is imported.

    Attributes:
        low: the smallest number.
        high: the largest number; None for no bound.
        is_above: whether `low` itself is refused.
        is_below: whether `high` itself is refused.
        zero: what 0 stands for, such as "off".
        note: the unit, or a reason.
        up_to: another argument, whose number it must not be above.
        divides: another argument, whose number it must divide.
    """

    low: float
    high: float | None = None
    is_above: bool = False
    is_below: bool = False
    zero: str = ""
    note: str = ""
    up_to: str = ""
    divides: str = ""

    def explain(self, value: Any, optional: bool = False) -> str | None:
        """Return what is wrong with a number, or with one of a list; None if nothing is, or it is of another type.

        Args:
            value: what an argument was given.
            optional: whether it may be None, for the words.
        """
        is_list = isinstance(value, list | tuple)
        numbers = [item for item in (value if is_list else [value]) if _is_number(item)]
        if all(self._holds(number) for number in numbers):
            return None
        finite = "" if all(map(math.isfinite, numbers)) else " and finite"
        kind = ("null or " if optional else "") + ("numbers of " if is_list else "")
        return f"must be {kind}{self._words()}{finite}{f' ({self.note})' if self.note else ''}, got {value}"

    def explain_beside(self, value: Any, others: Mapping[str, Any], group: str) -> str | None:
        """Return what is wrong with a number beside those of other arguments; None if nothing is.

        Args:
            value: what an argument was given, within its range.
            others: all arguments by name; what is no number above 0 is not looked at.
            group: what stands before their names in a configuration, such as `data.`.
        """
        found = (others.get(name) for name in (self.up_to, self.divides))
        top, whole = (float(number) if _is_number(number) and number > 0 else None for number in found)
        if not _is_number(value):
            return None
        if top is not None and value > top:
            return f"must be at most {group}{self.up_to} {top:g}, got {value}"
        if whole is not None and whole % value:
            return f"must divide {group}{self.divides} {whole:g}, got {value}; choose a divisor"
        return None

    def _holds(self, number: float) -> bool:
        if not math.isfinite(number):
            return False
        is_low = number <= self.low if self.is_above else number < self.low
        high = math.inf if self.high is None else self.high
        return not (is_low or (number >= high if self.is_below else number > high))

    def _words(self) -> str:
        # "1,000,000" and "0.5"
        bounds = (bound if bound is None or bound != int(bound) else int(bound) for bound in (self.low, self.high))
        low, high = (None if bound is None else f"{bound:,}" for bound in bounds)
        if high is not None and not (self.is_above or self.is_below):
            return f"between {low} and {high}"
        if self.is_above:
            words = f"above {low}"
        elif self.low == 0:
            words = f"0 ({self.zero}) or more" if self.zero else "0 or more"
        else:
            words = f"at least {low}"
        return words if high is None else f"{words} and {'below' if self.is_below else 'at most'} {high}"


def at_least(low: float, *, at_most: float | None = None, below: float | None = None, **more: Any) -> Range:
    """Return the range from a number on, up to another one, or below it; `Range` has the further names."""
    return Range(low, at_most if below is None else below, is_below=below is not None, **more)


def above(low: float, *, at_most: float | None = None, below: float | None = None, **more: Any) -> Range:
    """Return the range of the numbers above one, up to another one, or below it; `Range` has the further names."""
    return Range(low, at_most if below is None else below, is_above=True, is_below=below is not None, **more)


@cache
def ranges_of(function: Callable[..., Any]) -> Mapping[str, tuple[Range, Any]]:
    """Return the ranges in the annotations of a function or a dataclass, with the types, by the argument's name."""
    types, ranges = get_type_hints(function), {}
    for name, hint in get_type_hints(function, include_extras=True).items():
        # `Annotated[int, at_least(1)]`, or an alias of it in `Length | None`
        notes = (note for part in (hint, *get_args(hint)) for note in getattr(part, "__metadata__", ()))
        for note in notes:
            if isinstance(note, Range):
                ranges[name] = note, types[name]
    return ranges


def check_ranges(function: Callable[..., Any], values: Mapping[str, Any], key: str) -> None:
    """Refuse numbers outside of the ranges that a function, or a dataclass, has in its annotations.

    Args:
        function: with annotations.
        values: arguments by name, as `locals()` at the function's beginning has them; other names are not looked at.
        key: where they stand in a configuration, for the message.

    Raises:
        UserError: naming the key, the range and the number.
    """
    group = key if key.endswith((".", "-")) else f"{key}."  # "--" of a command
    ranges = {name: found for name, found in ranges_of(function).items() if name in values}
    for name, (allowed, hint) in ranges.items():
        _check_type(f"{group}{name}", values[name], hint)
        if text := allowed.explain(values[name], NoneType in get_args(hint)):
            raise UserError(f"{group}{name} {text}")
    for name, (allowed, _) in ranges.items():
        if text := allowed.explain_beside(values[name], values, group):
            raise UserError(f"{group}{name} {text}")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its cause or context, the cause of that, and so on; every exception once.

    A chain can be a ring: a writer thread that raises one stored object again and again, as TensorBoard's does on a
    full disk, links the object to exceptions that were raised from it.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def loaded_class(module: str, name: str) -> Any:
    """Return a class of a library if its module is loaded, else `()`, of which nothing is an instance.

    Who asks for the kind of an exception need not import the library: one that is not loaded has raised nothing.
    """
    return getattr(sys.modules.get(module), name, ())


TERMINATED = 128 + signal.SIGTERM
"""Exit code of a command that SIGTERM ended, as shells have it."""


class SignalExit(SystemExit):
    """A signal ends the process; unlike `sys.exit()` in code of a user's own, this is no error."""


class RankUserError(UserError):
    """One process of several met a `UserError`; raised on all of them, with the rank and its message."""


class RankError(RuntimeError):
    """One process of several failed; raised on all of them, with the rank and its message."""


def printable(text: str) -> str:
    r"""Return a text with its control characters written out, as in `\x1b`.

    Messages quote what strangers wrote: a server's answer, a row of the data, the name of a file. An escape sequence
    in it would move the cursor, or change the title of the terminal.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
