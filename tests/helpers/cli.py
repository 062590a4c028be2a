"""The `remax` command inside this process: a small configuration, and what a call of it printed and left."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from helpers.training import write_rows

from remax_lightning.cli_keys import wrong_keys
from remax_lightning.cli_schema import shipped_signatures

PLUGINS = Path(__file__).parent.parent / "plugins"


def are_releases_described() -> bool:
    """Whether `signatures.json` describes the installed torch and Lightning: of others, wrong keys are told later."""
    paths = "lightning.pytorch.Trainer", "torch.optim.SGD"
    return all(shipped_signatures().parameters(path) is not None for path in paths)


class Outcome(NamedTuple):
    """How a call of the command ended."""

    code: int
    out: str
    err: str


def small_config(folder: Path, policy: Path | str, rows: int = 16) -> dict[str, Any]:
    """A run of two optimizer steps on the CPU; its files go to `folder`."""
    data = write_rows(folder / "rows.jsonl", ({"prompt": f"{n}+{n}=", "response": str(2 * n)} for n in range(rows)))
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "logger": {"init_args": {"save_dir": str(folder / "runs")}},
        },
        "model": {
            "policy": {"path": str(policy)},
            "reference": {"path": str(policy)},
            "reward": {
                "class_path": "FunctionReward",
                "init_args": {"function": "remax_lightning.rewards.verifiers.exact_match"},
            },
            "sampling": {"max_response_length": 4},
        },
        "data": {"path": data, "val_size": 4, "batch_size": 4, "max_prompt_length": 16},
    }


def changed(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A copy of `config` with keys set by dotted name (`__` for the dots); Ellipsis takes a key out."""
    config = copy.deepcopy(config)
    for dotted, value in values.items():
        *folders, name = dotted.split("__")
        node = config
        for folder in folders:
            node = node.setdefault(folder, {})
        if value is ...:
            del node[name]
        else:
            node[name] = value
    return config


def write_config(path: Path, config: dict[str, Any]) -> str:
    """Write a configuration as YAML and return its path as text."""
    path.write_text(yaml.safe_dump(config))
    return str(path)


@contextmanager
def in_folder(folder: Path, *, plugins: bool = False) -> Iterator[None]:
    """Inside, `folder` is the current one, with the user's own modules in it if `plugins`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        for module in PLUGINS.glob("*.py") if plugins else ():
            shutil.copy(module, folder)
            patch.delitem(sys.modules, module.stem, raising=False)
        yield
        for module in PLUGINS.glob("*.py") if plugins else ():
            sys.modules.pop(module.stem, None)


def remax(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """Call the command as its entry point does; an exception that it lets out is a traceback to the user."""
    from remax_lightning.cli import main

    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["remax", *arguments])
        capsys.readouterr()
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    out, err = capsys.readouterr()
    return Outcome(code, out, err)


def misread(config: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says of a configuration that it cannot read, after the error's name.

    This stops before anything is made of the configuration, and takes the parser of an earlier call.
    """
    path = write_config(folder / "run.yaml", config)
    with in_folder(folder):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            remax_parser().parse_args(["fit", "--config", path, *arguments])
    assert end.value.code == 2
    outcome = Outcome(2, *capsys.readouterr())
    assert is_one_message(outcome)
    said = message(outcome)
    # What is told before torch is imported is a part of it.
    with in_folder(folder):
        early = wrong_keys(["fit", "--config", path, *arguments], shipped_signatures())
    assert [line for line in (f"{key}: {text}" for key, text in early.items()) if line not in said] == []
    return said


@cache
def remax_parser() -> Any:
    """The parser of the `remax` command."""
    from remax_lightning.cli_run import command_parser

    return command_parser()


def is_one_message(outcome: Outcome) -> bool:
    """Whether a mistake was told in a message of its own, with none of what Python and jsonargparse say about it."""
    noise = ("Traceback", "usage:", "Namespace(")
    return outcome.err.count("error:") == 1 and not any(text in outcome.err + outcome.out for text in noise)


def refused(
    config: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, subcommand: str = "fit"
) -> Outcome:
    """Run the command, and check what holds of every mistake."""
    with in_folder(folder):
        outcome = remax(capsys, subcommand, "--config", write_config(folder / "run.yaml", config), *arguments)
    assert outcome.code == 2
    assert is_one_message(outcome)
    assert not list(folder.rglob("*.ckpt"))
    assert not list(folder.rglob(".*.new"))  # an export that was begun
    assert not (folder / "runs" / "remax" / "version_0" / "policy").exists()
    return outcome


def message(outcome: Outcome) -> str:
    """What follows `remax: error:`."""
    return outcome.err.partition("remax: error: ")[2]
