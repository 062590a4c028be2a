"""The parser of the `remax` command, which all tests of a process share, and what it remembers between them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

LOOKUPS = ("find_action_and_subcommand", "is_branch_key")


def share_parser(patch: pytest.MonkeyPatch) -> None:
    """Build the parser once a process: it is the same for every call."""
    from remax_lightning.cli_run import RemaxCLI

    build, built = RemaxCLI.setup_parser, {}

    def setup_parser(cli: RemaxCLI, *arguments: Any) -> None:
        if not built:
            before = set(vars(cli))
            build(cli, *arguments)
            built.update({name: value for name, value in vars(cli).items() if name not in before})
        vars(cli).update(built)

    patch.setattr(RemaxCLI, "setup_parser", setup_parser)


def remember_lookups(patch: pytest.MonkeyPatch) -> None:
    """Let jsonargparse remember which action of a parser a key belongs to.

    It looks ten thousand times while it reads one configuration, through all actions, which is two fifths of its time.
    """
    from jsonargparse import _subcommands

    for name in LOOKUPS:
        look_up = getattr(_subcommands, name)
        remembering = _remembering(look_up)
        for module in [module for key, module in sys.modules.items() if key.startswith("jsonargparse._")]:
            if vars(module).get(name) is look_up:
                patch.setattr(module, name, remembering)


def remember_keys(patch: pytest.MonkeyPatch) -> None:
    """Let jsonargparse remember the parts of a key, and walk along them without asking for each as a key of its own.

    It does so thirty thousand times while it reads one configuration, a quarter of its time.
    """
    from jsonargparse import _namespace
    from jsonargparse._namespace import Namespace, add_clash_mark

    parse_key, recreate = Namespace._parse_key, _namespace.recreate_branches
    parts_of: dict[str, tuple[str, list[str], str]] = {}

    def parse(self: Any, key: str) -> tuple[str, Any, str]:
        if key not in parts_of:
            result = parse_key(self, key)  # an error for what is no key
            *parents, leaf = map(add_clash_mark, key.split("."))
            parts_of[key] = leaf, parents, ".".join(parents)
            return result
        leaf, parents, parent_key = parts_of[key]
        place: Any = self
        for name in parents:
            place = getattr(place, name, None) if isinstance(place, Namespace) else place.get(name)
            if not isinstance(place, Namespace | dict):
                return leaf, None, parent_key
        return leaf, place, parent_key

    def recreate_branches(data: Any, skip_keys: Any = None) -> Any:
        if type(data) is not Namespace:
            return recreate(data, skip_keys)
        made, kept = Namespace(), [key for key in vars(data) if skip_keys is None or key not in skip_keys]
        vars(made).update({key: recreate_branches(vars(data)[key], skip_keys) for key in kept})
        return made

    patch.setattr(Namespace, "_parse_key", parse)
    for module in [module for key, module in sys.modules.items() if key.startswith("jsonargparse._")]:
        if vars(module).get("recreate_branches") is recreate:
            patch.setattr(module, "recreate_branches", recreate_branches)


def remember_defaults(patch: pytest.MonkeyPatch) -> None:
    """Let jsonargparse remember what the defaults of a parser are, with those of the file that it begins with.

    It asks for them several times while it reads one configuration, and reads the file each time.
    """
    from jsonargparse import ArgumentParser

    get_defaults = ArgumentParser.get_defaults

    def remembering(parser: ArgumentParser, skip_validation: bool = False) -> Any:
        files = parser._get_default_config_files()
        if not files:  # the parser of a class, in any of several contexts
            return get_defaults(parser, skip_validation)
        known = parser.__dict__.setdefault("_known_defaults", {})
        times = [(str(file), Path(str(file)).stat().st_mtime_ns) for file in files]
        question = (skip_validation, len(parser._actions), *times)
        if question not in known:
            known[question] = get_defaults(parser, skip_validation)
        return copy.deepcopy(known[question])

    patch.setattr(ArgumentParser, "get_defaults", remembering)


def _remembering(look_up: Callable[..., Any]) -> Callable[..., Any]:
    def remembering(parser: Any, key: str, *more: Any, **options: Any) -> Any:
        known = parser.__dict__.setdefault("_looked_up", {})
        actions = parser._actions
        # An action that is added or taken away makes the last one, or their number, another.
        question = (look_up, key, *more, *options.items(), len(actions), id(actions[-1]) if actions else 0)
        if question not in known:
            known[question] = look_up(parser, key, *more, **options)
        return known[question]

    return remembering
