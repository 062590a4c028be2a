"""What is raised when the user's input is wrong, as opposed to a fault of ours."""


class UserError(ValueError):
    """A mistake in what the user gave: the command line prints the message alone, without a traceback.

    The message names the key (as it stands in the configuration), what was expected, what was got and what to do.
    """


class DataError(UserError):
    """A data file or a row of it cannot be used; the message names file and line."""


class RewardError(UserError):
    """A reward failed or returned something that must not be trained on; the message shows the prompt."""


class RankUserError(UserError):
    """One process of several met a `UserError`; raised on all of them, with the rank and its message."""


class RankError(RuntimeError):
    """One process of several failed; raised on all of them, with the rank and its message."""
