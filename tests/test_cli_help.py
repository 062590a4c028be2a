"""What the command says before any run: its help, its subcommands, and what it loads for that."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from helpers.cli import are_releases_described, in_folder, message, remax, remax_parser
from jsonargparse import Namespace

import remax_lightning
from remax_lightning.cli_help import KEYS, RUNS, TOOLS
from remax_lightning.config import WeightDType
from remax_lightning.tools.parsers import tool_parser

LIGHT = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO

for name in ("torch", "lightning", "transformers", "jsonargparse", "deepspeed", "datasets"):
    sys.modules[name] = None  # importing it raises ImportError
from remax_lightning import cli_keys
from remax_lightning.cli import main

cli_keys.is_current = lambda: True  # also where someone has changed the code since
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


@pytest.mark.slow
def test_commands_that_read_little_need_no_torch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("epoch,step,train/reward\n0,1,0.5\n0,2,0.75\n")
    (run / "config.yaml").write_text("trainer:\n  max_steps: 2\n")
    (run / "run.json").write_text('{"loggers": [{"class": "CSVLogger", "files": null}]}')
    one, two = evaluation(tmp_path / "a", [0.0, 0.25, 2.0]), evaluation(tmp_path / "b", [1.0, 1.5, 2.5])
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model: {policy: p, reward: my_rewards.mine, kl_coeff: 1}\ntrainer: {max_steps: many}\n")
    commands = {
        ("--help",): 0,
        ("fit", "--config", str(wrong)): 2,
        ("test", "--config", "presets/verl", "--model.loss.kindd", "x"): 2,
        ("fit", "--config", "presets/verll"): 2,
        ("plan", "--memory", "80", "--config", str(wrong)): 2,
        ("doctor", "--config", str(wrong), "--json", "out.json"): 2,
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
        **{(name, "--help"): 0 for name in TOOLS},
        **{(name,): 2 for name, tool in TOOLS.items() if tool.reads_run},  # without a configuration
        ("serve", str(wrong), "--", "--help"): 2,
        ("baselines", "--num_prompts", "many", "--config", str(wrong)): 2,
        ("export",): 2,
        ("lm-eval", "policy"): 2,
        ("convert-reward", "model", "out", "--overwritten"): 2,
        ("pipeline", "--steps", "3"): 2,
        ("--print_shtab",): 2,
        ("--print_shtab", "powershell"): 2,
    }
    environment = os.environ | {"PYTHONPATH": str(Path(remax_lightning.__file__).parents[1])}
    ended = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(list(commands))], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == list(commands.values()), ended.stderr
    assert "Traceback" not in ended.stderr
    assert "model.kl_coeff: there is no such key; did you mean kl_coef?" in ended.stderr
    if are_releases_described():
        assert "trainer.max_steps: expected a whole number, got many" in ended.stderr
    assert "model.loss.kindd: there is no such key; did you mean kind?" in ended.stderr
    assert "doctor: there is no configuration; give --config FILE_OR_NAME, or see remax doctor --help" in ended.stderr
    assert (run / "report.html").stat().st_size > 10_000


def test_the_help_names_all_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    shown = remax(capsys, "--help")
    assert shown.code == 0
    first_words = [line.split()[0] for line in shown.out.splitlines() if line.startswith("  ")]
    assert set(first_words) >= {*RUNS, *TOOLS, "--version"}


@pytest.mark.parametrize("run", RUNS)
def test_the_help_of_a_run_shows_the_keys_that_users_set_on_one_screen(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ((run, "-h"), (run, "--help"), (run, "--config", "run.yaml", "-h")):
        shown = remax(capsys, *arguments)
        assert shown.code == 0
        lines = shown.out.splitlines()
        assert len(lines) <= 45
        assert max(map(len, lines)) <= 110
        assert lines[0].startswith(f"usage: remax {run} ")
        assert "  --model.policy " in shown.out
        assert f"remax {run} --help-all" in shown.out


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    ("option", "name", "key"),
    [
        ("--model.help", "SFTModule", "--model.policy.path"),
        ("--model.reward.help", "HTTPReward", "reward.url"),
        ("--trainer.strategy.help", "ReMaxFSDP2Strategy", "--trainer.strategy.gather"),
    ],
)
def test_the_options_of_one_class_are_shown(
    option: str, name: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        remax_parser().parse_args(["fit", option, name])
    assert end.value.code == 0
    assert key in capsys.readouterr().out


def default_of(key: str, config: Any) -> Any:
    """The value of a key in a configuration that sets what must be set, and nothing else."""
    for part in key.split("."):
        if isinstance(config, Namespace) and "class_path" in config and part not in config:
            config = config.init_args
        config = config.get(part)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_the_help_tells_the_defaults_of_the_parser(run: str, tmp_path: Path) -> None:
    required = {
        "model.policy": "owner/name",
        "model.reward": "remax_lightning.rewards.verifiers.exact_match",
        "data.path": "rows.jsonl",
    }
    keys = {key.name: key.default for key in KEYS if run in key.runs}
    assert {name for name, default in keys.items() if default == "required"} == set(required)
    with in_folder(tmp_path):
        options = [f"--{name}={value}" for name, value in required.items()]
        config = remax_parser().parse_args([run, *options])[run]
    for name, default in keys.items():
        value = default_of(name, config)
        if name == "trainer.logger":
            assert value.class_path == f"lightning.pytorch.loggers.{default}Logger"
        elif name not in required:
            expected = yaml.safe_load(default)
            assert (list(value) if isinstance(value, tuple) else value) == (
                float(expected) if isinstance(value, float) else expected
            ), name


@pytest.mark.slow
def test_the_script_for_bash_completes_subcommands_options_and_names(tmp_path: Path) -> None:
    # In a process of its own: completion changes parsers that later commands of the same process would share.
    command = [sys.executable, "-c", "from remax_lightning.cli import main; main()", "--print_shtab", "bash"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)
    (tmp_path / "remax.bash").write_text(printed.stdout)
    (tmp_path / "mine.yaml").touch()

    def completed(*lines: str) -> list[set[str]]:
        """What each line is completed to: in one shell, since the script has megabytes."""
        asked = [[*line.split(), *([""] if line.endswith(" ") else [])] for line in lines]
        script = "source remax.bash\n" + "".join(
            f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=(); _shtab_remax\n"
            'printf "%s " "${COMPREPLY[@]}"; echo\n'
            for words in asked
        )
        ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
        return [set(line.split()) for line in ended.stdout.splitlines()]

    subcommands, tools, steps, samples, memory, of_run, common, configs, names, of_fit, files = completed(
        "remax ",
        "remax co",
        "remax fit --trainer.max_s",
        "remax fit --model.sampling.num",
        "remax plan --mem",
        "remax doctor --trainer.max",
        "remax compare --com",
        "remax configs ",
        "remax configs show presets/v",
        "remax fit --config presets/v",
        "remax fit --config mi",
    )
    assert subcommands >= {*RUNS, *TOOLS}
    assert tools == {"compare", "configs", "convert-reward"}
    assert steps == {"--trainer.max_steps"}
    assert samples >= {"--model.sampling.num_samples"}
    assert "--memory" in memory
    assert "--trainer.max_steps" in of_run
    assert common == {"--common"}
    assert configs >= {"list", "show", "copy"}
    assert names >= {"presets/verl"}
    assert of_fit >= {"presets/verl"}
    assert "mine.yaml" in files


@pytest.mark.parametrize("shell", ["ksh", "powershell"])
def test_another_shell_is_refused_with_those_there_are(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    ended = remax(capsys, "--print_shtab", shell)
    assert ended.code == 2
    assert "bash" in ended.err
    assert "zsh" in ended.err


def test_every_tool_has_a_command_of_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    for name in TOOLS:
        shown = remax(capsys, name, "--help")
        assert shown.code == 0
        assert shown.out.startswith(f"usage: remax {name} ")
        # what the script for completion asks for
        assert tool_parser(name).prog == f"remax {name}"


def test_the_dtypes_of_lm_eval_are_those_of_weights() -> None:
    dtypes = next(action.choices for action in tool_parser("lm-eval")._actions if action.dest == "dtype")
    assert tuple(dtypes or ()) == get_args(WeightDType)


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
