"""The arguments of a run's command: shorthand written out, values by key, and keys taken out again.

Nothing here needs torch or jsonargparse, so wrong keys can be told before they are imported.
"""

from __future__ import annotations

import difflib
import math
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from remax_lightning.cli_errors import plain_parts
from remax_lightning.cli_shorthand import SUBCOMMANDS, dependent_defaults, write_out, write_out_option
from remax_lightning.shipped_configs import CONFIG_SUFFIXES, config_names, config_path
from remax_lightning.yaml_files import load_yaml, read_yaml

CONFIG = ("config", "c")
"""The options whose values are configurations."""
NULLS = ("null", "Null", "NULL", "~")
"""What YAML takes for null, as the value of an option."""
MAX_MISTAKES = 10
"""How many wrong keys or values are told at once."""
MAX_LENGTH = 600
"""Characters of one mistake; values may be long."""
NOT_FINITE = 'must be a finite number, got {}; null means "none" where a key may be unset'
_FILLERS = {
    "model.policy.path": "missing",
    "model.reward_model.path": "missing",
    "model.reward": '{"class_path": "remax_lightning.rewards.FunctionReward", "init_args": {"function": "missing.it"}}',
    "data.path": "missing",
}
"""Values in place of keys without a default, with which the rest of a configuration is checked."""


def message_of(mistakes: Iterable[str]) -> str:
    """Return one message for all mistakes, a line each."""
    lines = list(mistakes)[:MAX_MISTAKES]
    return "\n  ".join(line if len(line) <= MAX_LENGTH else f"{line[:MAX_LENGTH]}..." for line in lines)


def completed(arguments: list[str]) -> list[str]:
    """Return the arguments of the command with shorthand written out, and defaults that depend on them."""
    written: list[str] = []
    for words, name, value in words_of(arguments):
        if name in CONFIG and value is not None:
            written += ["--config", config_path(value)]
        elif value in NULLS and words[0].lstrip("-").count(".") > 1:
            # within a class, jsonargparse passes null on as the text "None"; as YAML it is what a file would have
            written += ["--config", yaml.safe_dump(nested(name, "null"))]
        else:
            written += write_out_option(name, value) or words
    asks_for_help = any(name.endswith(".help") for _, name, _ in words_of(arguments))  # must be the last option
    if any(argument in SUBCOMMANDS for argument in arguments) and not asks_for_help:
        for key, default in dependent_defaults(list(configs(written))).items():
            written.append(f"--{key}={default}")
    return written


def configs(arguments: list[str]) -> Iterator[Any]:
    """Yield what each option sets in the form of a YAML file; what cannot be read counts as nothing."""
    for _, name, value in words_of(arguments):
        if name in CONFIG and value is not None:
            yield read_config(value)
        elif name.startswith(("model", "trainer")) and value is not None:
            yield nested(plain_key(name), value)


def nested(name: str, value: str) -> Any:
    """Return what an option sets in the form of a YAML file; a value that is no YAML counts as text."""
    try:
        config = load_yaml(value)
    except yaml.YAMLError:
        config = value
    for key in reversed(name.split(".")):
        config = {key: config}
    return config


def single(mistakes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield mistakes by single keys; jsonargparse names all that is missing together."""
    for keys, text in mistakes.items():
        yield from ((key, text) for key in keys.split(", "))


def is_consequence(key: str, text: str, mistakes: Mapping[str, str]) -> bool:
    """Whether a key is wrong only because another one was left out: it, or a group around it, is missing now."""
    plain = plain_key(key)
    if any(plain == plain_key(other) or plain_key(other).startswith(f"{plain}.") for other in mistakes):
        return True
    # "model.policy.path" is missing where "model.polcy.path" has been told: "did you mean policy?"
    return text.startswith("missing") and any(
        plain.startswith(f"{plain_key(other)}.") or any(f"did you mean {part}?" in said for part in plain.split("."))
        for other, said in mistakes.items()
    )


def with_fillers(arguments: list[str], mistakes: Mapping[str, str]) -> list[str] | None:
    """Return the arguments with values for keys that are missing, so that the rest is checked; None if it has them."""
    names = {name for _, name, _ in words_of(arguments)}
    missing = [key for key, text in single(mistakes) if text.startswith("missing")]
    fillers = [f"--{key}={_FILLERS[key]}" for key in missing if key in _FILLERS and key not in names]
    return [*arguments, *fillers] if fillers else None


def plain_key(key: str) -> str:
    """Return a key without the parts that a user may leave out."""
    return ".".join(plain_parts(key))


def words_of(arguments: list[str]) -> Iterator[tuple[list[str], str, str | None]]:
    """Yield the words of each option of the command with its name and its value; other words with an empty name."""
    index = 0
    while index < len(arguments):
        # "--trainer.max_steps=5" is one word, "--trainer.max_steps" "5" are two, "--trainer.callbacks+=..." appends.
        name, equals, value = arguments[index].partition("=")
        if not name.startswith("--") and name != "-c":
            yield arguments[index : index + 1], "", None
            index += 1
            continue
        separate = not equals and index + 1 < len(arguments) and not arguments[index + 1].startswith("--")
        words = arguments[index : index + 1 + separate]
        yield words, name.lstrip("-").rstrip("+"), value if equals else words[1] if separate else None
        index += len(words)


def without_keys(arguments: list[str], keys: Iterable[str]) -> list[str] | None:
    """Return the arguments of the command without keys, on the command line and in YAML files; None if none has them.

    A YAML file with the key is replaced by its text without it. The key of a group takes its keys along.
    """
    changed = False
    for path in [plain_key(key).split(".") for key in keys if key]:
        kept: list[str] = []
        for words, name, value in words_of(arguments):
            if name and plain_key(name).split(".")[: len(path)] == path:
                changed = True
            elif name in CONFIG and value is not None and (text := _yaml_without_key(value, path)) is not None:
                changed = True
                # jsonargparse takes the text of a YAML file in place of its path
                kept += ["--config", text]
            else:
                kept += words
        arguments = kept
    return arguments if changed else None


def read_config(config: str) -> Any:
    """Return the value of a configuration, a file or a text; None if it cannot be read."""
    try:
        return load_yaml(config) if _is_text(config) else read_yaml(Path(config).expanduser())
    except (OSError, ValueError, yaml.YAMLError):
        return None


def unreadable_configs(arguments: list[str]) -> Iterator[str]:
    """Yield what is wrong with the configurations of the command that are no files, or no YAML, a line each.

    Raises:
        UserError: if a configuration is neither a file nor the name of a shipped one.
    """
    for _, name, value in words_of(arguments):
        if name not in CONFIG or value is None:
            continue
        config = config_path(value)
        path = Path(config).expanduser()
        try:
            if _is_text(config):
                load_yaml(config, "--config")
            elif path.is_file():  # what else there is, such as a pipe, can be read once
                read_yaml(path)
            elif path.is_dir():
                yield f"config: {value!r} is a folder; give a YAML file in it"
            elif not path.exists():
                yield f"config: there is no file {value!r}{_similar(path)}"
        except OSError as error:
            yield f"config: cannot read {value!r}: {error.strerror or error}"
        except UnicodeDecodeError as error:
            yield f"{value}: no text in UTF-8 ({error}); save it as UTF-8, or give a YAML file"
        except yaml.YAMLError as error:
            yield str(error)


def _similar(path: Path) -> str:
    """Return a hint at a configuration of a similar name beside a file that does not exist, or a shipped one."""
    if not path.parent.is_dir():
        return f"; there is no folder {str(path.parent)!r} either"
    shipped = [name for name in config_names() if name.rpartition("/")[2] == path.stem]
    if shipped:
        return f"; did you mean --config {' or '.join(shipped)}?"
    # by their stems: "mien" is near "mine", and every ".yaml" is near another
    files = {file.stem: file for file in path.parent.iterdir() if file.suffix in CONFIG_SUFFIXES}
    close = difflib.get_close_matches(path.stem, files, 1)
    return f"; did you mean {path.with_name(files[close[0]].name)}?" if close else ""


def _is_text(config: str) -> bool:
    """Whether a configuration is YAML itself, and no file."""
    return "\n" in config or config.lstrip().startswith("{") or ": " in config


def _yaml_without_key(config: str, path: list[str]) -> str | None:
    """Return the YAML text of a configuration, a file or a text, without a key; None if it does not have it."""
    values = read_config(config)
    if _remove(values, path):
        return yaml.safe_dump(values)
    # a list of rewards stands for parts with names
    values = write_out(values)
    return yaml.safe_dump(values) if _remove(values, path) else None


def raw_values(arguments: list[str]) -> dict[str, Any]:
    """Return the values of the arguments by key as in the YAML; later ones come before earlier ones."""
    values: dict[str, Any] = {}
    for _, name, value in words_of(arguments):
        if name in CONFIG and value is not None:
            values |= dict(flatten(read_config(value) or {}))
        elif name and value is not None:
            try:
                values |= dict(flatten(load_yaml(value), yaml_key(name)))
            except yaml.YAMLError:
                values[yaml_key(name)] = value
    return values


def yaml_key(name: str) -> str:
    """Return the key as in the YAML, where arguments of the module and of the data module stand without init_args."""
    # "model.init_args.policy.path" -> "model.policy.path"; "trainer.logger.init_args.name" stays
    group, _, rest = name.partition(".init_args.")
    return f"{group}.{rest}" if rest and group in ("model", "data") else name


def _remove(values: Any, path: list[str]) -> bool:
    """Take a key out, or an element of a list by its number; say whether it was there."""
    if isinstance(values, list):
        number = int(path[0]) if path[0].isdecimal() else len(values)
        if number >= len(values) or len(path) > 1:
            return number < len(values) and _remove(values[number], path[1:])
        del values[number]
        return True
    if not isinstance(values, dict):
        return False
    if len(path) == 1 and path[0] in values:
        del values[path[0]]
        return True
    inner = values.get(path[0])
    return (isinstance(inner, dict | list) and _remove(inner, path[1:])) or _remove(values.get("init_args"), path)


def flatten(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a configuration, as in the YAML, with their values; lists of classes by number."""
    if isinstance(config, Namespace):
        config = vars(config)
    # {"model": {"class_path": ..., "init_args": {"seed": 1}}} -> ("model.class_path", ...), ("model.seed", 1)
    if isinstance(config, Mapping):
        for name, value in config.items():
            # Arguments of the module and of the data module stand in the YAML without init_args.
            inner = key if name == "init_args" and key in ("model", "data") else f"{key}.{name}".removeprefix(".")
            yield from flatten(value, inner)
        return
    if isinstance(config, list) and any(isinstance(item, Namespace | Mapping) for item in config):
        for number, item in enumerate(config):
            yield from flatten(item, f"{key}.{number}")
        return
    yield key, config


def nonfinite_numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield the key, as a user writes it, and the value of every number of a configuration that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    elif isinstance(value, dict | Namespace):
        for name, part in (value if isinstance(value, dict) else vars(value)).items():
            # The subcommand is no part of a key, nor are the init_args of the module and the data.
            inner = key if not key and name in SUBCOMMANDS else f"{key}.{name}" if key else str(name)
            yield from nonfinite_numbers(part, key if key in ("model", "data") and name == "init_args" else inner)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from nonfinite_numbers(part, f"{key}[{number}]")
