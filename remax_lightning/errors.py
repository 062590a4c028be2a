"""What is raised when the user's input is wrong, as opposed to a fault of ours."""


class UserError(ValueError):
    """A mistake in what the user gave: the command line prints the message alone, without a traceback.

    The message names the key (as it stands in the configuration), what was expected, what was got and what to do.
    """


class DataError(UserError):
    """A data file or a row of it cannot be used; the message names file and line."""


class RewardError(UserError):
    """A reward failed or returned something that must not be trained on; the message shows the prompt."""
