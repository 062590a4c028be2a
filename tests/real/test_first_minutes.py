"""The README's first ten minutes: an environment of its own, outside the checkout, a built wheel, a real model.

The package comes from the wheel. Its dependencies are those of this environment, by a `.pth` file in the new one: to
install torch once more would take minutes and shows nothing about this package. An editable install is not seen
through that file, because Python reads no further `.pth` files there.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.pages import ROOT, blocks
from real.published import TOPICS
from tools.browser import chromium, requests_of

pytestmark = pytest.mark.slow(20)

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
"""The model of the README, whose place the real one takes."""

SMALL = """
trainer:
  accelerator: cpu
  precision: 32-true
  max_steps: 2
  logger:
    - {class_path: TensorBoardLogger, init_args: {save_dir: runs, name: remax}}
    - {class_path: WandbLogger, init_args: {save_dir: runs, name: remax, offline: true}}
model: {sampling: {max_response_length: 12}}
data: {batch_size: 4}
samples: {every_n_steps: 1}
"""
"""Over the README's six lines: two short steps on a CPU, under two loggers."""


REWARD = """
def politeness(prompts, responses, rows):
    return [response.count("e") / 10 for response in responses]
"""
"""In the place of the README's, which pays nothing for a few tokens of this model, and then nothing is learned."""


class Home(NamedTuple):
    """Where a user works: a folder with an environment, and what its commands printed."""

    folder: Path
    python: Path

    def run(self, *command: str) -> str:
        """Run a program of the environment; returns what it prints."""
        programs = self.python.parent
        kept = {name: value for name, value in os.environ.items() if name in ("LANG", "TMPDIR", "OMP_NUM_THREADS")}
        environment = {
            **kept,
            "PATH": f"{programs}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "WANDB_SILENT": "true",
        }
        done = subprocess.run(
            [str(programs / command[0]), *command[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    @property
    def checkpoints(self) -> list[Path]:
        return sorted(self.only_run.glob("checkpoints/*.ckpt"))

    @property
    def only_run(self) -> Path:
        [folder] = (self.folder / "runs" / "remax").iterdir()
        return folder


def install(folder: Path) -> Path:
    """Build the wheel and install it in a new environment under `folder`; returns that environment's Python."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = folder / "wheels"
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], capture_output=True, text=True, check=False
    )
    if built.returncode:
        lines = built.stderr.strip().splitlines() or ["no message"]
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"the wheel cannot be built: {lines[-1]}")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "environment")], check=True)
    python = folder / "environment" / "bin" / "python"
    [wheel] = wheels.iterdir()
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    [packages] = (folder / "environment" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


@pytest.fixture(scope="module")
def home(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """After the README's `remax fit` with its six lines."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("home")
    home = Home(folder, install(folder))
    (folder / "short.yaml").write_text(blocks("yaml")[0].replace(MODEL, str(smollm2)))
    (folder / "small.yaml").write_text(SMALL)
    (folder / "my_rewards.py").write_text(REWARD)
    rows = [json.dumps({"prompt": f"Ask me kindly about {topic}."}) for topic in TOPICS * 10]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    home.run("remax", "fit", "--config", "short.yaml", "--config", "small.yaml")
    yield home
    shutil.rmtree(folder, ignore_errors=True)  # gigabytes


def test_the_package_is_that_of_the_wheel(home: Home) -> None:
    where = home.run("python", "-c", "import remax_lightning; print(remax_lightning.__file__)")
    assert Path(where.strip()).is_relative_to(home.folder / "environment")
    assert home.run("remax", "--version").startswith("remax")


def test_both_loggers_have_the_run(home: Home) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from wandb.proto.wandb_internal_pb2 import Record

    from remax_lightning.tools.report.run import _wandb_records

    events = EventAccumulator(str(home.only_run)).Reload()
    assert [event.step for event in events.Scalars("train/reward")][:2] == [1, 2]
    assert events.Scalars("val/reward")[0].step == 0  # before training
    assert any(tag.startswith("samples/train") for tag in events.Tags()["tensors"])
    file = min(
        (home.folder / "runs" / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime
    )
    records = [Record.FromString(data) for data in _wandb_records(file)]
    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["trainer/global_step"] for row in history if "train/reward" in row][:2] == [1, 2]


def test_the_report_opens_in_a_browser(home: Home, tmp_path: Path) -> None:
    home.run("remax", "report", str(home.only_run))
    page = home.only_run / "report.html"
    with chromium(tmp_path / "profile") as browser:
        browser.get_log("browser"), requests_of(browser)
        browser.get(page.as_uri())
        assert browser.get_log("browser") == []
        assert requests_of(browser) == [page.as_uri()]
        assert len(browser.find_elements("css selector", "svg.chart")) > 5
        browser.find_element("name", "stage").send_keys("before training")
        [stage, *_] = browser.find_elements("css selector", "#rows .numbers td:nth-child(2)")
        assert stage.text == "before training"


def test_it_resumes_and_exports(home: Home, smollm2: Path) -> None:
    resume = ("--ckpt_path", "last", "--trainer.max_steps", "3")
    home.run("remax", "fit", "--config", "short.yaml", "--config", "small.yaml", *resume)
    lines = (home.only_run / "samples" / "train.jsonl").read_text().splitlines()
    assert sorted({json.loads(line)["step"] for line in lines}) == [1, 2, 3]
    newest = max(home.checkpoints, key=lambda path: path.stat().st_mtime)
    assert "step=3" in newest.name
    home.run("remax", "export", str(newest), "my_policy")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = home.folder / "my_policy"
    assert AutoTokenizer.from_pretrained(exported).chat_template
    pairs = zip(*(AutoModelForCausalLM.from_pretrained(path).parameters() for path in (smollm2, exported)), strict=True)
    assert 0 < max(float((new - old).abs().max()) for old, new in pairs) < 1e-4  # three steps of 1e-6


def test_the_script_trains_and_a_checkpoint_generates(home: Home, smollm2: Path) -> None:
    text = blocks("python")[0]
    for shown, small in (
        (MODEL, str(smollm2)),
        ("* 512, tokenizer=policy", "* 8, tokenizer=policy, batch_size=4"),
        ("reward=politeness", "reward=politeness, sampling=SamplingConfig(max_response_length=8)"),
        ("import PromptDataModule", "import SamplingConfig, PromptDataModule"),
        ("Trainer(", "Trainer(accelerator='cpu', devices=1, enable_checkpointing=False, "),
    ):
        assert shown in text
        text = text.replace(shown, small)
    text += f"""
del module, trainer
print(ReMaxModule.load_from_checkpoint({str(home.checkpoints[-1])!r}).generate(["Ask me for the salt."]))
"""
    (home.folder / "script.py").write_text(text)
    trained, loaded = home.run("python", "script.py").splitlines()[-2:]
    for line in (trained, loaded):
        [response] = ast.literal_eval(line)
        assert isinstance(response, str)
        assert response
