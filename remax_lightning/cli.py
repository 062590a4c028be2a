"""The `remax` command: chooses what runs a subcommand, and ends it in one line.

The standard library and YAML alone are imported here, and a subcommand loads what it needs when it runs. So help, a
subcommand that does not exist, a misspelt key, `configs`, `compare` and `report` need no torch, whose import takes
seconds.
"""

from __future__ import annotations

import sys
from importlib import import_module

from remax_lightning import launcher
from remax_lightning.cli_errors import foreign_exit_message
from remax_lightning.cli_exit import (
    INTERRUPTED,
    READER_LEFT,
    End,
    current_rank,
    describe_end,
    describe_interruption,
    exits_raise,
    reader_left,
    stage,
)
from remax_lightning.cli_help import RUNS, TOOLS, explain_subcommand, help_text, run_help
from remax_lightning.cli_keys import refuse_wrong_keys, run_options
from remax_lightning.errors import (
    TERMINATED,
    RankError,
    RankUserError,
    UserError,
    exception_chain,
    loaded_class,
    printable,
)
from remax_lightning.tools.parsers import read_tool_options
from remax_lightning.version import __version__


def main() -> None:
    """Run the command line.

    Whatever ends it is told in one line, with exit code 2 for what a user can mend and 1 for a bug, whose traceback
    goes to a file. SIGTERM ends it with 143, after a last checkpoint, and Ctrl-C with 130. The processes that Lightning
    starts for further devices run this function, too.
    """
    # ---- The command, or one of the processes that Lightning starts for it ----
    launched = launcher.is_launched()
    if launched:
        launcher.exit_with_launcher()
    else:
        launcher.mark_launcher()
    stage.name, stage.trainer = sys.argv[1] if sys.argv[1:2] else "remax", None
    try:
        with exits_raise():
            _run_subcommand(sys.argv[1:])
            sys.stdout.flush()  # an error of the last lines is told here, and not at the interpreter's end
    except KeyboardInterrupt:
        raise _interrupted() from None
    except BaseException as error:  # also what code of a user's own raises as no Exception
        if isinstance(error, loaded_class("lightning.pytorch.utilities.exceptions", "SIGTERMException")):
            # Lightning treats any other exit code of a process that it started as a failure.
            raise SystemExit(0 if launched else TERMINATED) from None
        if any(isinstance(cause, BrokenPipeError) for cause in exception_chain(error)) and reader_left():
            raise SystemExit(READER_LEFT) from None
        end = _end(error)
        # ---- One line: from every rank that has an error of its own, and from rank 0 of an error that all have ----
        if not isinstance(error, RankUserError | RankError) or current_rank() == 0:
            print(f"remax: error: {printable(end.message)}", file=sys.stderr)  # noqa: T201
        raise SystemExit(end.code) from None


def _run_subcommand(arguments: list[str]) -> None:
    first = arguments[0] if arguments else ""
    if first in TOOLS:
        read_tool_options(first, arguments[1:])
        if TOOLS[first].reads_run:
            refuse_wrong_keys(["fit", *run_options(arguments[1:])], first)
        import_module(f"remax_lightning.tools.{TOOLS[first].module}").main(arguments[1:])
    elif first in RUNS or (first.startswith("-") and not set(RUNS).isdisjoint(arguments)):
        run = next(argument for argument in arguments if argument in RUNS)
        if not {"-h", "--help"}.isdisjoint(arguments):
            print(run_help(run))  # noqa: T201
        else:
            if not launcher.is_launched():
                refuse_wrong_keys(arguments)
            import_module("remax_lightning.cli_run").run()
    elif arguments == ["--version"]:
        print(f"remax-lightning {__version__}")  # noqa: T201
    elif not {"-h", "--help"}.isdisjoint(arguments):
        print(help_text())  # noqa: T201
    elif first.startswith("--print_shtab"):
        # "--print_shtab=bash" or "--print_shtab" "bash"
        import_module("remax_lightning.tools.completion").main(first.split("=", 1)[1:] or arguments[1:])
    else:
        raise UserError(explain_subcommand(first))


def _interrupted() -> SystemExit:
    """Return the exit after Ctrl-C, having said what is left of a training run."""
    message = describe_interruption(stage)
    if message is not None and current_rank() == 0:
        print(f"remax: {message}", file=sys.stderr)  # noqa: T201
    return SystemExit(INTERRUPTED)


def _end(error: BaseException) -> End:
    """Return how the command ends; an exit that has been explained already is raised again."""
    if not isinstance(error, SystemExit):
        return describe_end(error, stage)
    if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes an exit of it
        raise _interrupted() from None
    message = foreign_exit_message(error)
    if message is None:
        raise error
    return End(message, 2)
