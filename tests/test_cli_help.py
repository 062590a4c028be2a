"""What the command says before any run: its help, its subcommands, and what it loads for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cli import message, remax

import remax_lightning
from remax_lightning.cli import RUNS, TOOLS

LIGHT = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO

for name in ("torch", "lightning", "transformers", "jsonargparse", "deepspeed", "datasets"):
    sys.modules[name] = None  # importing it raises ImportError
from remax_lightning.cli import main

codes = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["remax", *arguments]
    code = 0
    with redirect_stdout(StringIO()):
        try:
            main()
        except SystemExit as end:
            code = end.code
    codes.append(code)
print(json.dumps(codes))
"""
"""Runs commands one after the other, without torch and all that needs it."""


def evaluation(folder: Path, rewards: list[float]) -> str:
    """An evaluation of a prompt per reward, as `remax test` writes it."""
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"figures": {}, "settings": {"reward": None}}))
    records = [
        {
            "number": i,
            "prompt": f"prompt {i}",
            "responses": {"sampled": ["x"], "greedy": ["y"]},
            "rewards": {"sampled": [reward], "greedy": [reward]},
            "sums": {"reward": [reward, 1.0], "kl": [0.1 * i, 2.0]},
        }
        for i, reward in enumerate(rewards)
    ]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def test_commands_that_read_little_need_no_torch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("epoch,step,train/reward\n0,1,0.5\n0,2,0.75\n")
    (run / "config.yaml").write_text("trainer:\n  max_steps: 2\n")
    (run / "run.json").write_text('{"loggers": [{"class": "CSVLogger", "files": null}]}')
    one, two = evaluation(tmp_path / "a", [0.0, 0.25, 2.0]), evaluation(tmp_path / "b", [1.0, 1.5, 2.5])
    commands = {
        ("--help",): 0,
        ("--version",): 0,
        ("fitt",): 2,
        (): 2,
        ("configs", "list"): 0,
        ("configs", "show", "nothing"): 2,
        ("report", str(run)): 0,
        ("report", str(tmp_path / "none")): 2,
        ("report",): 2,
        ("compare", one, two): 0,
        ("compare", one, str(run)): 2,
    }
    environment = os.environ | {"PYTHONPATH": str(Path(remax_lightning.__file__).parents[1])}
    ended = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(list(commands))], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == list(commands.values()), ended.stderr
    assert "Traceback" not in ended.stderr
    assert (run / "report.html").stat().st_size > 10_000


def test_the_help_names_all_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    shown = remax(capsys, "--help")
    assert shown.code == 0
    first_words = [line.split()[0] for line in shown.out.splitlines() if line.startswith("  ")]
    assert set(first_words) >= {*RUNS, *TOOLS, "--version"}


def test_every_tool_has_a_command_of_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    for name in TOOLS:
        shown = remax(capsys, name, "--help")
        assert shown.code == 0
        assert shown.out.startswith(f"usage: remax {name} ")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fitt", "did you mean fit?"),
        ("comapre", "did you mean compare?"),
        ("convert_reward", "did you mean convert-reward?"),
        ("train", "did you mean fit?"),
        ("run.yaml", "did you mean remax fit --config run.yaml?"),
        ("xyzzy", "there is no subcommand 'xyzzy'; the subcommands are"),
    ],
)
def test_an_unknown_subcommand_is_told_with_the_nearest_and_all(
    name: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = remax(capsys, name, "--trainer.max_steps=3")
    assert ended.code == 2
    assert hint in message(ended)
    assert ", ".join([*RUNS, *TOOLS]) in message(ended)
    assert ended.err.count("\n") == 1
