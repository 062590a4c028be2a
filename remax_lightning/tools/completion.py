"""`remax --print_shtab`: a script with which a shell completes the subcommands of `remax`, their options and values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from shlex import quote
from typing import Any

import shtab

from remax_lightning.cli_help import RUNS, TOOLS
from remax_lightning.shipped_configs import config_names
from remax_lightning.tools.parsers import tool_parser

SHELLS = ("bash", "zsh", "fish", "tcsh")
"""Those of shtab whose scripts the help and the documentation name."""
_NAMES = "_remax_config_names"
"""The function of the script that completes what `--config` takes: files, and names of shipped configurations."""


def main(args: Sequence[str]) -> None:
    """Print the script of a shell.

    Args:
        args: the arguments after `remax --print_shtab`.
    """
    parser = argparse.ArgumentParser(prog="remax --print_shtab", allow_abbrev=False)
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    print(completion_script(parser.parse_args(args).shell))


def completion_script(shell: str) -> str:
    """Return a script that completes all subcommands, with the options of each and what these take.

    Args:
        shell: one of `SHELLS`.
    """
    # imported here: the one below takes seconds, and a shell may be none of `SHELLS`
    from jsonargparse._actions import ActionConfigFile
    from jsonargparse._completions import (
        bash_compgen_typehint,
        norm_name,
        prepare_actions_context,
        shtab_prepare_actions,
    )

    from remax_lightning.cli_run import command_parser

    # ---- Subcommands of Lightning: jsonargparse knows which classes and values their options take ----
    runs, prog = command_parser(), "remax"
    preambles = [_names_function(shell)]
    if shell == "bash":
        # the function that completes values, with a message about their type
        preambles.append(bash_compgen_typehint.strip().replace("{prog}", norm_name(prog)))
    with prepare_actions_context(shell, prog, preambles):
        shtab_prepare_actions(runs)
    # ---- One parser around them and the tools ----
    command = argparse.ArgumentParser(prog=prog, description="Align language models with ReMax.")
    command.add_argument("--version", action="store_true", help="print the version")
    command.add_argument("--print_shtab", choices=SHELLS, help="print a script for completion")
    subcommands = command.add_subparsers()
    parsers = dict(runs.commands())
    for name, text in RUNS.items():
        subcommands.add_parser(name, help=text, parents=[parsers[name]], add_help=False)
    for name, tool in TOOLS.items():
        own = tool_parser(name)
        if tool.reads_run:
            parser = subcommands.add_parser(name, help=tool.help, parents=[parsers["fit"]], add_help=False)
            for action in own._actions:
                if "--help" not in action.option_strings:
                    parser._add_action(action)
        else:
            subcommands.add_parser(name, help=tool.help, parents=[own], add_help=False)
    # ---- Where the name of a shipped configuration may stand ----
    for action in _actions(command):
        if isinstance(action, ActionConfigFile) or (action.dest == "name" and not action.option_strings):
            action.complete = {**shtab.FILE, "bash": _NAMES, "zsh": _NAMES}
    return shtab.complete(command, shell, preamble="\n".join(preambles))


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """Yield the actions of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        for inner in action.choices.values() if isinstance(action.choices, dict) else ():
            yield from _actions(inner)


def _names_function(shell: str) -> str:
    """Return a function of the shell that prints, or adds, what `--config` takes."""
    names = " ".join(config_names())
    functions = {
        "bash": f'{_NAMES}() {{ compgen -W {quote(names)} -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"{_NAMES}() {{ compadd -- {names}; _files }}",
    }
    return functions.get(shell, "")
