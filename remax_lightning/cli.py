"""The `remax` command: the table of its subcommands with its help, and the wall that ends it in one line.

This file imports the standard library alone, and a subcommand loads what it needs when it runs. So `remax --help`, a
subcommand that does not exist, `configs`, `compare` and `report` start without torch, whose import takes seconds.
"""

from __future__ import annotations

import difflib
import sys
import time
from importlib import import_module
from typing import NamedTuple

from remax_lightning import launcher
from remax_lightning.cli_errors import foreign_exit_message
from remax_lightning.cli_exit import INTERRUPTED, End, current_rank, describe_end, stage
from remax_lightning.errors import TERMINATED, RankError, RankUserError, UserError, loaded_class, printable
from remax_lightning.version import __version__


class Tool(NamedTuple):
    """A subcommand that is not Lightning's.

    Args:
        module: where its `main` is, under `remax_lightning.tools`.
        help: what it does, in a line.
    """

    module: str
    help: str


TOOLS = {
    "plan": Tool("plan.command", "compute the memory that each device needs for a configuration"),
    "doctor": Tool("doctor.command", "check a configuration's models and data before any training"),
    "baselines": Tool("baselines", "measure which baseline pays on a run's policy, reward and data"),
    "report": Tool("report", "write an HTML page about a run, with curves and samples"),
    "compare": Tool("compare", "compare the figures of two evaluations, with paired intervals"),
    "export": Tool("export", "write a checkpoint's policy as a Hugging Face folder"),
    "lm-eval": Tool("lm_eval", "measure an exported policy with tasks of lm-evaluation-harness"),
    "convert-reward": Tool("convert_reward", "write another project's reward model as a plain sequence classifier"),
    "serve": Tool("serve", "start a vLLM server for a configuration's policy"),
    "configs": Tool("configs", "list, show and copy the configurations that come with the package"),
    "demo": Tool("demo", "train a tiny policy on an embedded task, on a CPU in minutes"),
    "pipeline": Tool("pipeline", "run all three stages on generated preferences, in minutes"),
}
"""Subcommands of this package, in the order of the help."""

RUNS = {
    "fit": "train a policy with ReMax, or one of the stages before it",
    "validate": "measure reward, baseline and KL on the validation prompts",
    "test": "evaluate a policy, with a table of figures and their intervals",
    "predict": "write responses and their rewards to a file",
}
"""Lightning's subcommands, which read YAML and options."""

_SYNONYMS = {
    "train": "fit", "sft": "fit", "eval": "test", "evaluate": "test", "generate": "predict", "memory": "plan",
    "check": "doctor", "diff": "compare", "convert": "convert-reward", "config": "configs", "help": "--help",
    "version": "--version",
}  # fmt: skip
"""What other commands call it."""


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
        _run_subcommand(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except BaseException as error:  # also what code of a user's own raises as no Exception
        if isinstance(error, loaded_class("lightning.pytorch.utilities.exceptions", "SIGTERMException")):
            # Lightning treats any other exit code of a process that it started as a failure.
            raise SystemExit(0 if launched else TERMINATED) from None
        end = _end(error)
        # ---- One line: from every rank that has an error of its own, and from rank 0 of an error that all have ----
        on_all_ranks = isinstance(error, RankUserError | RankError)
        if on_all_ranks and launched:
            time.sleep(10)  # rank 0 prints the message; Lightning would kill it as soon as this process ends
        if not on_all_ranks or current_rank() == 0:
            print(f"remax: error: {printable(end.message)}", file=sys.stderr)  # noqa: T201
        raise SystemExit(end.code) from None


def _run_subcommand(arguments: list[str]) -> None:
    first = arguments[0] if arguments else ""
    if first in TOOLS:
        import_module(f"remax_lightning.tools.{TOOLS[first].module}").main(arguments[1:])
    elif any(argument in RUNS for argument in arguments):
        import_module("remax_lightning.cli_run").run()
    elif arguments == ["--version"]:
        print(f"remax-lightning {__version__}")  # noqa: T201
    elif not {"-h", "--help"}.isdisjoint(arguments):
        print(help_text())  # noqa: T201
    else:
        raise UserError(_explain_subcommand(first))


def help_text() -> str:
    """Return the help of the command, which names all subcommands."""
    runs, tools = (
        "\n".join(f"  {name:16}{text}" for name, text in rows)
        for rows in (RUNS.items(), ((name, tool.help) for name, tool in TOOLS.items()))
    )
    return f"""usage: remax SUBCOMMAND ...

Align language models with ReMax, REINFORCE with a greedy baseline.

runs, from YAML files and options:
{runs}

tools:
{tools}

options:
  -h, --help      print this help; remax SUBCOMMAND --help prints that of a subcommand
  --version       print the version

examples:
  remax fit --config run.yaml --trainer.max_steps 100
  remax doctor --config run.yaml
  remax report runs/remax/version_0"""


def _explain_subcommand(name: str) -> str:
    """Return what is wrong with the name of a subcommand that does not exist; an empty one is missing."""
    names = [*RUNS, *TOOLS]
    known = f"the subcommands are {', '.join(names)}; remax --help explains them"
    if not name or name.startswith("-"):
        return f"the subcommand is missing; {known}"
    if name.endswith((".yaml", ".yml", ".json")):
        return f"there is no subcommand {name!r}; did you mean remax fit --config {name}? {known}"
    close = [_SYNONYMS[name.lower()]] if name.lower() in _SYNONYMS else difflib.get_close_matches(name, names, 1)
    return f"there is no subcommand {name!r}; " + (f"did you mean {close[0]}? {known}" if close else known)


def _end(error: BaseException) -> End:
    """Return how the command ends; an exit that has been explained already is raised again."""
    if not isinstance(error, SystemExit):
        return describe_end(error, stage)
    if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes an exit of it
        raise SystemExit(INTERRUPTED) from None
    message = foreign_exit_message(error)
    if message is None:
        raise error
    return End(message, 2)
