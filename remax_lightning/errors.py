"""What is raised when the user's input is wrong, as opposed to a fault of ours."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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
        if name in values and not _is_of_type(values[name], hint):
            value = values[name]
            shown = "None" if value is None else f"{type(value).__name__} {value!r:.60}"
            raise ArgumentTypeError(f"{key and f'{key}.'}{name} must be {_type_in_words(hint)}, got {shown}")


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
