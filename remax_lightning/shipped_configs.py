"""The configurations that come with the package, by their names: `opt1.3b`, `presets/verl`, `loggers/wandb`."""

from __future__ import annotations

import difflib
from pathlib import Path

from remax_lightning.errors import UserError

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
"""Of what `--config` takes for a file, whether or not there is one."""


def config_folder() -> Path:
    """Return the folder of the shipped configurations, in an installed wheel or in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Return the names of all shipped configurations: their paths in the folder, without `.yaml`."""
    folder = config_folder()
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return [path.relative_to(folder).with_suffix("").as_posix() for path in paths]


def shipped_config(name: str) -> Path:
    """Return the file of a shipped configuration.

    Args:
        name: as in `config_names`.

    Raises:
        UserError: if there is none of this name; with those that come closest.
    """
    names = config_names()
    if name in names:
        return config_folder() / f"{name}.yaml"
    # "verl" and "presets/verll" alike
    last = {known.rpartition("/")[2]: known for known in names}
    close = [known for part, known in last.items() if part == name] or difflib.get_close_matches(name, names, 2, 0.8)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; remax configs list shows them"
    raise UserError(f"config: there is neither a file {name!r} nor a shipped configuration of this name{hint}")


def config_path(value: str) -> str:
    """Return what `--config` names: a file or YAML text as it is, a shipped configuration by its path.

    Raises:
        UserError: if it is neither a file, nor text, nor the name of a shipped configuration.
    """
    if "\n" in value or value.lstrip().startswith("{") or ": " in value or "\0" in value or len(value) > 255:
        return value  # text
    looks_like_file = Path(value).suffix in CONFIG_SUFFIXES or Path(value).exists()
    return value if looks_like_file else str(shipped_config(value))
