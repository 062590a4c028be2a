"""`remax lm-eval` on exported folders, with a stand-in for lm-eval; tests/real has the real one."""

from __future__ import annotations

import json
import logging
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, tiny_model
from helpers.cli import Outcome, is_one_message, message, remax
from helpers.harness import FakeHarness, install

from remax_lightning.models.lora import LoRAConfig, add_adapter


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> FakeHarness:
    return install(monkeypatch)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full model `base`, and `adapter` on it, which is not zero."""
    folder = tmp_path_factory.mktemp("exported")
    model = tiny_model("llama")
    model.save_pretrained(folder / "base")
    adapted = add_adapter(model, LoRAConfig(r=2), "model.policy.lora", 0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(folder / "adapter")
    for name in ("base", "adapter"):
        make_tokenizer().save_pretrained(folder / name)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder


def call(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> Outcome:
    return remax(capsys, "lm-eval", str(folder), "--device", "cpu", *arguments)


@pytest.mark.slow(0.3)
def test_a_full_model_gives_a_table_and_a_file(
    lm_eval: FakeHarness, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures" / "new.json"
    done = call(
        capsys, folders / "base", "--tasks", "arc_easy,hellaswag", "--limit", "100", "--num_fewshot", "2",
        "--batch_size", "4", "--output", str(output),
    )  # fmt: skip
    assert done.code == 0, done.err
    model = tiny_model("llama")
    answer = json.loads(output.read_text())
    assert answer["figures"]["arc_easy"]["acc"] == {
        "value": pytest.approx(lm_eval.value(model)),
        "stderr": 0.25,
        "n": 4,
    }
    assert answer["figures"]["hellaswag"]["exact_match/strict-match"] == {"value": 0.0, "stderr": None, "n": 4}
    assert answer["base"] is None
    assert answer["settings"]["limit"] == 100
    assert answer["packages"]["torch"] == version("torch")
    (heading, _, *rows) = done.out.partition("base\n\n")[2].splitlines()[:6]
    assert heading.split() == ["task", "metric", "value", "standard", "error", "n"]
    assert rows[0].split() == ["arc_easy", "acc", f"{lm_eval.value(model):.4f}", "0.2500", "4"]
    assert rows[1].split() == ["arc_easy", "exact_match/strict-match", "0.0000", "-", "4"]
    (measured,) = lm_eval.calls
    assert (measured["limit"], measured["batch_size"]) == (100, 4)
    assert [count for count, _ in measured["fewshot"]] == [2, 0]
    assert "many words" not in done.err
    assert logging.getLogger("lm_eval").level == logging.NOTSET


@pytest.mark.slow(0.3)
def test_an_adapter_is_measured_around_its_base(
    lm_eval: FakeHarness, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("adapter_lm_eval.json", "adapter_lm_eval_1.json"):  # beside the folder, and nothing is overwritten
        done = call(capsys, folders / "adapter", "--tasks", "arc_easy")
        assert done.code == 0, done.err
        assert json.loads((folders / name).read_text())["base"] == str(folders / "base")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        adapted, plain = lm_eval.calls[0]["pretrained"](ids).logits, tiny_model("llama")(ids).logits
    assert (adapted - plain).abs().max() > 1e-2


def test_the_base_of_an_adapter_may_have_moved(
    lm_eval: FakeHarness, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "adapter"
    moved.mkdir()
    for file in (folders / "adapter").iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    refused = call(capsys, moved, "--tasks", "arc_easy")
    assert refused.code == 2
    assert "there is no folder './gone'" in message(refused)
    done = call(capsys, moved, "--tasks", "arc_easy", "--base", str(folders / "base"))
    assert done.code == 0, done.err


def test_a_task_of_a_users_own_needs_no_index(
    lm_eval: FakeHarness, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    done = call(capsys, folders / "base", "--tasks", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "a.json"))
    assert done.code == 0, done.err
    assert lm_eval.managers == [False]


@pytest.mark.slow(0.3)
def test_code_runs_only_where_it_is_confirmed(
    lm_eval: FakeHarness, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--tasks", "writes_code", "--output", str(tmp_path / "a.json"))
    assert "--tasks: lm-eval refuses" in message(call(capsys, folders / "base", *arguments))
    assert call(capsys, folders / "base", *arguments, "--confirm_run_unsafe_code").code == 0


@pytest.mark.parametrize(
    ("folder", "arguments", "expected"),
    [
        ("base", ["--tasks", "arc_esay"], "--tasks: lm-eval has no task 'arc_esay'; did you mean arc_easy"),
        ("base", ["--tasks", ","], "--tasks must name at least one task"),
        ("base", ["--tasks", "arc_easy", "--limit", "-1"], "--limit must be a count of documents"),
        ("base", ["--tasks", "arc_easy", "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        ("base", ["--tasks", "arc_easy", "--base", "other"], "--base must be left out"),
        ("base", ["--tasks", "arc_easy", "--output", "{folder}/base/config.json"], "--output must be a new file"),
        ("base", ["--tasks", "arc_easy", "--device", "warp"], "--device must be a device of this machine, got 'warp'"),
        ("gone", ["--tasks", "arc_easy"], "FOLDER: there is no folder"),
        (".", ["--tasks", "arc_easy"], "has neither config.json nor adapter_config.json"),
    ],
)
def test_mistakes_are_one_line(
    lm_eval: FakeHarness, folders: Path, capsys: pytest.CaptureFixture[str], folder: str, arguments: list[str],
    expected: str,
) -> None:  # fmt: skip
    done = remax(capsys, "lm-eval", str(folders / folder), *(text.format(folder=folders) for text in arguments))
    assert done.code == 2
    assert is_one_message(done)
    assert expected in message(done)
    assert lm_eval.calls == []
