"""What is raised when the user's input is wrong, as opposed to a fault of ours."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

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
