"""What is raised when the user's input is wrong, as opposed to a fault of ours."""

from __future__ import annotations

import re


class UserError(ValueError):
    """A mistake in what the user gave: the command line prints the message alone, without a traceback.

    The message names the key (as it stands in the configuration), what was expected, what was got and what to do.
    """


class DataError(UserError):
    """A data file or a row of it cannot be used; the message names file and line."""

    @property
    def reason(self) -> str:
        """What is wrong, without file, line and values: what is alike in other rows with the same mistake."""
        text = re.sub(r"^.*?, (?:near )?(?:line|row) \d+: ", "", str(self), count=1)
        text = re.split(r"; | \(|, got | - ", text, maxsplit=1)[0]
        return re.sub(r"\d+", "N", text.splitlines()[0])[:100] if text else type(self).__name__


class RewardError(UserError):
    """A reward failed or returned something that must not be trained on; the message shows the prompt."""


class RankUserError(UserError):
    """One process of several met a `UserError`; raised on all of them, with the rank and its message."""


class RankError(RuntimeError):
    """One process of several failed; raised on all of them, with the rank and its message."""
