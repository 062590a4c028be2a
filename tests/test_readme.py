"""The README, the docs and the examples against the code: what they say is run, parsed or looked up."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tokenizer, tiny_config
from helpers.cli import in_folder, remax
from helpers.pages import PAGES, README, ROOT, blocks, tables

from remax_lightning.modules import AdvantageConfig, KLConfig, LossConfig, ReMaxModule
from remax_lightning.rollout import SamplingConfig

EXTENDING = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yaml"))
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def table(first_cell: str, columns: int) -> list[list[str]]:
    [found] = [each for each in tables() if each[0][0] == first_cell and len(each[0]) == columns]
    return found


# Commands and links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_named_is_there(page: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:`|^\$ )make ([a-z-]+)", page.read_text(), re.MULTILINE)
    assert set(named) <= known
    assert page not in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") or named


def test_every_file_named_in_a_command_is_there() -> None:
    named = set(re.findall(r"\b(?:configs|benchmarks|examples)/[\w./]*\.\w+", README))
    assert {"configs/presets/verl.yaml", "benchmarks/draw_curves.py"} <= named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 260


def test_pre_commit_runs_what_lint_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "hooks of other repositories have versions of their own, and need the network"
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    linted = {line.strip().replace("$(BIN)", ".venv/bin").split(" ")[0:2][-1] for line in recipe[1].splitlines()}
    hooked = {hook["entry"].split(" ")[0:2][-1] for hook in repository["hooks"]}
    assert hooked == linted


def test_the_oldest_versions_are_those_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lower = (re.fullmatch(r"([\w-]+)(?:\[.+\])?>=([\d.]+)(?:,<.+)?", text) for text in requirements)
    bounds = [match.groups() if match else ("a requirement without a lower bound", "") for match in lower]
    pinned = re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    of_run_time = {bound for bound in bounds if not bound[0].startswith("types-")}
    assert of_run_time == set(pinned), "write every lower bound of pyproject.toml into constraints-oldest.txt, too"


def test_the_changelog_has_this_version() -> None:
    from remax_lightning import __version__

    assert re.search(
        rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


# Presets


def effective(preset: dict[str, Any]) -> dict[str, Any]:
    """All choices of a preset by dotted key, the defaults where it says nothing."""
    groups = {"sampling": SamplingConfig, "kl": KLConfig, "advantage": AdvantageConfig, "loss": LossConfig}
    values = {"kl_coef": preset.get("kl_coef", inspect.signature(ReMaxModule).parameters["kl_coef"].default)}
    for group, kind in groups.items():
        made = dataclasses.asdict(kind(**preset.get(group, {})))
        values |= {f"{group}.{name}": value for name, value in made.items()}
    return values


def test_the_table_of_presets_says_what_the_files_say() -> None:
    heading, *rows = table("key", 7)
    presets = {path.stem: yaml.safe_load(path.read_text())["model"]["init_args"] for path in PRESETS}
    columns = {name: effective(presets.get(name, {})) for name in heading[1:]}
    assert set(columns) == {"default", *presets}
    told = {row[0].split("`")[1]: [yaml.safe_load(cell) for cell in row[1:]] for row in rows}
    for key, values in told.items():
        assert dict(zip(columns, values, strict=True)) == {name: column[key] for name, column in columns.items()}, key
    differing = {key for key in columns["default"] if len({repr(column[key]) for column in columns.values()}) > 1}
    assert differing - set(told) == {"sampling.max_response_length"}  # the text has it


def test_what_the_text_adds_about_the_model_card() -> None:
    loaded = yaml.safe_load((ROOT / "configs" / "presets" / "model_card.yaml").read_text())
    assert loaded["model"]["init_args"]["sampling"]["max_response_length"] == 384
    assert loaded["data"]["init_args"]["max_prompt_length"] == 384
    assert loaded["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 5e-7


# Configuration page


@pytest.mark.slow(0.3)
def test_the_configuration_page_is_what_the_docstrings_say() -> None:
    script = ROOT / "docs" / "generate_configuration.py"
    spec = importlib.util.spec_from_file_location("generate_configuration", script)
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    fresh = generator.page()
    assert (ROOT / "docs" / "configuration.md").read_text() == fresh, f"stale: run python {script.relative_to(ROOT)}"
    for section in generator.sections():
        for name in generator.arguments(section.target):
            assert f"| `{name}` |" in fresh


# The user's own model


def test_every_key_of_the_users_yaml_is_explained() -> None:
    heads = ("trainer:", "model:", "data:", "init_args:", "sampling:", "optimizer:")
    for block in blocks("yaml")[:2]:
        lines = [line.strip() for line in block.splitlines()]
        assert [line for line in lines if " # " not in line and line not in heads] == []


@pytest.fixture(scope="module")
def reward_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random reward model and its tokenizer."""
    from transformers import AutoModelForSequenceClassification

    path = tmp_path_factory.mktemp("reward")
    config = tiny_config("llama")
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    make_tokenizer(chat_template=CHAT).save_pretrained(path)
    return path


SMALL = """
trainer: {accelerator: cpu, precision: 32-true, max_steps: 2, val_check_interval: 4, enable_progress_bar: false,
          enable_model_summary: false, num_sanity_val_steps: 0}
model: {sampling: {max_response_length: 4}}
"""


def write_blocks(folder: Path, *texts: str) -> list[str]:
    """Write YAML texts as files and return the arguments that lay them over each other."""
    arguments = []
    for number, text in enumerate(texts):
        (folder / f"{number}.yaml").write_text(text)
        arguments += ["--config", str(folder / f"{number}.yaml")]
    return arguments


def scalars(folder: Path) -> set[str]:
    """What a run logged, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {*accumulator.Tags()["scalars"], *accumulator.Tags()["histograms"]}


@pytest.mark.slow
def test_the_users_yaml_trains_resumes_and_predicts(
    tmp_path: Path, policy_path: Path, reward_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = blocks("yaml")[1]
    for name, local in (
        ("Qwen/Qwen2.5-0.5B-Instruct", policy_path),
        ("Skywork/Skywork-Reward-V2-Llama-3.2-1B", reward_path),
    ):
        assert name in text
        text = text.replace(name, str(local))
    prompts = "".join(json.dumps({"prompt": f"{number}+1="}) + "\n" for number in range(128))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    configs = write_blocks(tmp_path, text, SMALL, "{tensorboard: {every_n_steps: 1}, data: {max_prompt_length: 64}}")
    with in_folder(tmp_path):
        ended = remax(capsys, "fit", *configs)
        assert ended.code == 0, ended.err
        run = tmp_path / "runs" / "remax" / "version_0"
        [checkpoint] = (run / "checkpoints").glob("*.ckpt")
        resume = ["--ckpt_path", str(checkpoint)]
        longer = ["--trainer.max_epochs", "2", "--trainer.max_steps", "3"]
        assert remax(capsys, "fit", *configs, *resume, *longer).code == 0
        assert remax(capsys, "predict", *configs, *resume, "--predictions.path", "responses.jsonl").code == 0
        for preset in PRESETS:
            shown = remax(capsys, "fit", *configs, "--config", str(preset), "--model.kl_coef", "0.3", "--print_config")
            assert yaml.safe_load(shown.out)["model"]["init_args"]["kl_coef"] == 0.3
    # It went on in its folder; Lightning keeps the checkpoint that it resumed from.
    checkpoints = sorted(path.name for path in tmp_path.glob("runs/remax/*/checkpoints/*.ckpt"))
    assert checkpoints == ["epoch=0-step=2.ckpt", "epoch=1-step=3.ckpt"]
    assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == 64
    for kept in ("config.yaml", "samples", "policy/best/tokenizer.json", "policy/last/model.safetensors"):
        assert (run / kept).exists()
    told = {key for row in table("key", 2) for key in re.findall(r"`([a-z]+/\w+)`", row[0])}
    # One figure per baseline, with the ends of its interval.
    compared = ("train/gradient_variance", "train/variance_seconds")
    assert all(f"`{name}/NAME`" in "".join(row[0] for row in table("key", 2)) for name in compared)
    logged = {name for name in scalars(run) if "/" in name and not name.startswith(compared)}
    told.remove("train/baseline")  # of `auto` alone
    corrected = {"train/mismatch_kl", "train/mismatch_ratio_max", "train/mismatch_clipped"}
    assert logged == told - {"train/reward_part", "train/clip_fraction"} - corrected


@pytest.mark.slow
def test_six_lines_train_with_a_function_and_defaults(
    tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = blocks("yaml")[0]
    assert len(text.splitlines()) == 6
    text = text.replace("Qwen/Qwen2.5-0.5B-Instruct", str(policy_path))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1="}) + "\n" for n in range(64)))
    (tmp_path / "my_rewards.py").write_text((ROOT / "examples" / "politeness.py").read_text())
    small = "data: {max_prompt_length: 64, batch_size: 8}"
    with in_folder(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        ended = remax(capsys, "fit", *write_blocks(tmp_path, text, SMALL, small))
    assert ended.code == 0, ended.err
    saved = yaml.safe_load((tmp_path / "runs" / "remax" / "version_0" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-6
    assert saved["trainer"]["gradient_clip_val"] == 1.0
    assert "val/reward" in scalars(tmp_path / "runs" / "remax" / "version_0")


@pytest.mark.slow
def test_ten_lines_train_from_python(tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = blocks("python")[0]
    assert len([line for line in text.splitlines() if line]) == 10
    for shown, local in (
        ("Qwen/Qwen2.5-0.5B-Instruct", str(policy_path)),
        ("* 512, tokenizer=policy", "* 16, tokenizer=policy, batch_size=8, max_prompt_length=32"),
        ("reward=politeness", "reward=politeness, sampling=SamplingConfig(max_response_length=4)"),
        ("import PromptDataModule", "import SamplingConfig, PromptDataModule"),
        ("Trainer(", "Trainer(accelerator='cpu', devices=1, enable_progress_bar=False, "),
    ):
        assert shown in text
        text = text.replace(shown, local)
    with in_folder(tmp_path):
        exec(compile(text, "README.md", "exec"), {})
    [response] = yaml.safe_load(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(response, str)


def test_the_mistake_shown_is_what_the_command_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").touch()
    text = blocks("yaml")[1].replace("kl_coef:", "kl_coeff:")
    ended = remax(capsys, "fit", *write_blocks(tmp_path, text))
    assert ended.code == 2
    assert ended.err == next(block for block in blocks("text") if block.startswith("remax: error"))


# Other pages


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [
        each
        for name in ("lora", "evaluation", "baselines", "migrating", "rollouts")
        for each in blocks("yaml", (ROOT / f"docs/{name}.md").read_text())
    ],
)
def test_the_yaml_of_pages_is_read(block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    function = "remax_lightning.rewards.verifiers.exact_match"
    rest = f"model: {{reward: {{class_path: FunctionReward, init_args: {{function: {function}}}}}}}\n"
    rest += "data: {init_args: {path: prompts.jsonl}}"
    shown = remax(capsys, "fit", *write_blocks(tmp_path, rest, block), "--print_config")
    assert shown.code == 0, shown.err


# Examples


def test_the_pages_show_the_examples_as_they_are() -> None:
    assert sorted(blocks("python", EXTENDING)) == sorted(path.read_text() for path in EXAMPLES)
    assert set(blocks("python")[1:]) <= set(blocks("python", EXTENDING))
    for path in EXAMPLES:
        lines = path.read_text().splitlines()
        assert lines[0].startswith(f"# examples/{path.name}: ")
        assert len([line for line in lines if line]) <= 15


@pytest.fixture
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the examples in it as a user's own modules."""
    for path in EXAMPLES:
        shutil.copy(path, tmp_path)
    with in_folder(tmp_path):
        yield tmp_path
    for path in EXAMPLES:
        sys.modules.pop(path.stem, None)


@pytest.mark.slow
def test_the_examples_plug_in(users_folder: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"model: {{policy: {{path: {policy_path}}}, kl_coef: 0}}\ndata: {{init_args: {{batch_size: 8}}}}"
    ended = remax(capsys, "fit", *write_blocks(users_folder, own, SMALL, blocks("yaml", EXTENDING)[-1]))
    assert ended.code == 0, ended.err
    logged = scalars(users_folder / "runs" / "remax" / "version_0")
    assert {"train/distinct_responses", "train/reward_part/brief", "train/reward_part/polite"} <= logged


def test_every_example_does_what_it_says(
    users_folder: Path, monkeypatch: pytest.MonkeyPatch, policy_path: Path
) -> None:
    monkeypatch.syspath_prepend(users_folder)
    from additions import Additions
    from brevity import Brevity
    from politeness import politeness
    from running_mean import RunningMean
    from steps import Steps

    from remax_lightning import PromptBatch, UserError
    from remax_lightning.baselines import BaselineInputs, checked_values
    from remax_lightning.types import Response

    own = RunningMean(decay=0.5)
    scores = BaselineInputs(torch.tensor([1.0, 3.0]), 1, None, torch.ones(2), None)
    assert checked_values(own, scores).tolist() == [0.0, 0.0]
    own.observe(scores)
    assert checked_values(own, scores).tolist() == [1.0, 1.0]
    assert politeness([], ["Thanks!", "no"], [], word="thanks") == [1.0, 0.0]
    assert Brevity(2).score([], ["a b", "a b c d"], []) == [0.0, -1.0]
    with pytest.raises(UserError, match="words"):
        Brevity(0)
    steps, text = Steps(str(policy_path)), "1=1\nx\na=2\n="
    token_ids = tuple(steps.tokenizer(text, add_special_tokens=False)["input_ids"])
    (per_token,) = steps.score([""], [Response(text, None, token_ids)], [{}])
    assert len(per_token) == len(token_ids)
    assert sum(per_token) == 2.0  # the last line has no end
    batch = next(iter(Additions(str(policy_path), batch_size=4).train_dataloader()))
    assert isinstance(batch, PromptBatch)
    assert batch.prompt_ids.shape == batch.prompt_mask.shape
    assert batch.prompt_mask[:, -1].all()  # padded on the left


# The picture


@pytest.mark.slow
def test_curves_are_drawn_from_event_files(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    script = ROOT / "benchmarks" / "draw_curves.py"
    spec = importlib.util.spec_from_file_location("draw_curves", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    keys = [key for panel in module.PANELS for key in panel.curves]
    with pytest.raises(SystemExit, match="no TensorBoard event file"):
        module.read_curves(tmp_path)
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(20):
            for number, key in enumerate(keys):
                writer.add_scalar(key, number + step, step)
    curves = module.read_curves(tmp_path)
    assert curves[keys[2]] == (list(range(20)), [2.0 + step for step in range(20)])
    assert module.running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
    module.main([str(tmp_path), "--output", str(tmp_path / "docs" / "curves.png")])
    drawn = (tmp_path / "docs" / "curves.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert len(drawn) < module.LIMIT
