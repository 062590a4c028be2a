"""`remax configs`: list, show and copy the configurations that come with the package."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from remax_lightning.errors import UserError
from remax_lightning.shipped_configs import config_folder, config_names, shipped_config


def main(args: Sequence[str]) -> None:
    """List, show or copy a configuration that comes with the package; `--config NAME` reads it where it is.

    Args:
        args: the arguments after `remax configs`.
    """
    options = make_parser().parse_args(args)
    if options.command == "list":
        _print_list()
    elif options.command == "show":
        print(shipped_config(options.name).read_text(encoding="utf-8"), end="")
    else:
        _copy(options.name, options.out)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `remax configs`."""
    description = main.__doc__.partition("Args:")[0] if main.__doc__ else None
    parser = argparse.ArgumentParser(prog="remax configs", description=description, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | show | copy")
    commands.add_parser("list", help="print their names, each with its first line")
    shown = commands.add_parser("show", help="print one")
    shown.add_argument("name", help="as in the list, such as presets/verl")
    copied = commands.add_parser("copy", help="copy one to a file of your own")
    copied.add_argument("name", help="as in the list")
    copied.add_argument("out", nargs="?", type=Path, help="a new file (default: its name, in this folder)")
    return parser


def _print_list() -> None:
    names = config_names()
    width = max(map(len, names))
    for name in names:
        # The first line of each file is a comment that says what it is for.
        first = (config_folder() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:{width}}  {first.lstrip('# ')}".rstrip())


def _copy(name: str, out: Path | None) -> None:
    source = shipped_config(name)
    target = Path(source.name) if out is None else out / source.name if out.is_dir() else out
    if target.exists():
        raise UserError(f"out: {str(target)!r} is there already; give another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print(f"Copied {name} to {target}.")
