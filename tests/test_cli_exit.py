"""How the command ends: whose fault an error is, what the line says, and where the traceback goes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import changed, in_folder, is_one_message, message, misread, remax, remax_parser, small_config
from helpers.cli import write_config as write

from remax_lightning.cli_checks import check_config, flatten
from remax_lightning.cli_exit import Stage, describe_end, side
from remax_lightning.errors import UserError
from remax_lightning.models.loading import ModelConfig

OPTIMIZER = "torch.optim.AdamW"
WRONG = {
    "trainer.accumulate_grad_batches": [0, -1],
    "trainer.devices": ["two", 0, -2, [0, 0], [], "1,1", "0.5"],
    "trainer.num_nodes": [0],
    "trainer.strategy": ["ddp_spawn", "ddp_notebook"],
    "trainer.max_epochs": [-2],
    "trainer.max_steps": [-5],
    "trainer.min_steps": [-1],
    "trainer.val_check_interval": [0, -1, 1.5, 0.0],
    "trainer.check_val_every_n_epoch": [0],
    "trainer.gradient_clip_val": [-1.0, float("nan")],
    "trainer.gradient_clip_algorithm": ["max"],
    "trainer.limit_train_batches": [-1, 1.5, -0.1],
    "trainer.limit_val_batches": [-1, float("inf")],
    "trainer.overfit_batches": [-2],
    "trainer.log_every_n_steps": [-1],
    "trainer.num_sanity_val_steps": [-2],
    "trainer.max_time": ["1 hour", {"minute": 5}, {"hours": -1}],
    "trainer.barebones": [True],
    "trainer.strategy.init_args.stage": [9, -1],
    "trainer.callbacks.0.class_path": [
        "lightning.pytorch.callbacks.BatchSizeFinder",
        "lightning.pytorch.callbacks.LearningRateFinder",
    ],
    "trainer.callbacks.0.init_args.filename": ["{step:zz}", "{", "{step:d:d}"],
    "trainer.default_root_dir": ["{file}/inside", "x" * 300, "a\0b"],
    "trainer.logger.init_args.save_dir": ["{file}"],
    "trainer.logger.init_args.name": ["a\0b"],
    "seed_everything": [-1, 2**40],
    "model.optimizer.init_args.lr": [-1e-3, float("nan")],
    "model.optimizer.init_args.weight_decay": [-0.1],
    "model.optimizer.init_args.eps": [-1e-8],
    "model.optimizer.init_args.betas": [(0.9, 1.0), (-0.1, 0.9)],
    "model.lr_scheduler.init_args.step_size": [0],
    "model.lr_scheduler.init_args.T_max": [0],
    "model.lr_scheduler.init_args.gamma": [-0.5],
    "model.lr_scheduler.init_args.end_factor": [1.5],
    "model.sampling": [[1], 3, None],
    "trainer": [None],
    "data.loading": ["x"],
    "data": [None],
    "samples": [3, None],
    "predictions.path": ["{file}/inside.jsonl", "{folder}"],
}
RIGHT = {
    "trainer.devices": ["auto", -1, 1, 2, [0, 1], "0,1", "-1", "2", "0,"],
    "trainer.val_check_interval": [0.5, 1.0, 7, "00:01:00:00"],
    "trainer.limit_train_batches": [0, 0.0, 1.0, 5, None],
    "trainer.max_time": ["00:12:00:00", {"hours": 1, "minutes": 30}, None],
    "trainer.barebones": [False],
    "trainer.callbacks.0.init_args.filename": ["{epoch}-{step:06d}-{val/reward:.2f}", "best", None],
    "trainer.strategy.init_args.stage": [0, 3],
    "trainer.default_root_dir": ["{folder}/new/one", None, "s3://bucket/runs"],
    "trainer.strategy": ["auto", "ddp", "fsdp"],
    "seed_everything": [True, 0, 2**32 - 1],
    "model.optimizer.init_args.lr": [0.0, 1e-6],
    "model.optimizer.init_args.eps": [(1e-30, 1e-3)],
    "model.lr_scheduler.init_args.div_factor": [25.0],
    "model.reference": [None],
    "predictions.path": ["{folder}/new/predictions.jsonl"],
}


def nested(key: str, value: Any, folder: Path) -> dict[str, Any]:
    if isinstance(value, str):
        value = value.replace("{folder}", str(folder)).replace("{file}", str(folder / "file"))
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_value_that_a_library_would_not_name_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^{key}: "):
        check_config(nested(key, value, tmp_path), ["samples"])


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in RIGHT.items() for value in values])
def test_right_values_pass(key: str, value: Any, tmp_path: Path) -> None:
    check_config(nested(key, value, tmp_path), ["samples"])


def test_all_wrong_values_are_told_together(tmp_path: Path) -> None:
    config = {"trainer": {"devices": 0, "callbacks": [{"init_args": {"save_top_k": -2}}]}, "seed_everything": -1}
    with pytest.raises(UserError) as error:
        check_config(config)
    keys = [line.strip().partition(":")[0] for line in str(error.value).splitlines()]
    assert keys == ["trainer.devices", "trainer.callbacks.0.init_args.save_top_k", "seed_everything"]


@pytest.mark.slow
def test_keys_are_those_of_the_yaml(tmp_path: Path, policy_path: Path) -> None:
    optimizer = {"class_path": OPTIMIZER, "init_args": {"lr": 0.5}}
    path = write(tmp_path / "run.yaml", changed(small_config(tmp_path, policy_path), model__optimizer=optimizer))
    keys = dict(flatten(remax_parser().parse_args(["fit", "--config", path])["fit"]))
    assert keys["model.optimizer.init_args.lr"] == 0.5
    assert "data.batch_size" in keys


@pytest.mark.slow
def test_all_wrong_keys_are_told_together(
    tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(small_config(tmp_path, policy_path), model__samplng={"top_k": 1}, data__batch_size="four")
    text = misread(config, tmp_path, capsys, "--trainer.max_stepz=3", "--model.kl_coef", "abc")
    for expected in (
        "model.samplng.top_k: there is no such key; did you mean sampling?",
        "data.batch_size: expected a whole number, got four",
        "trainer.max_stepz: there is no such key; did you mean max_steps?",
        "model.kl_coef: expected a number, got abc",
    ):
        assert text.count(expected) == 1
    assert len(text.splitlines()) == 4


@pytest.mark.slow
def test_a_misspelt_group_is_named(tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = misread(small_config(tmp_path, policy_path), tmp_path, capsys, "--model.polcy.path=x")
    assert text.strip() == "model.polcy.path: there is no such key; did you mean policy?"


# ---- Whose fault an error is ----


def raised(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as error:
        call()
    return error.value


def test_the_users_code_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a library fails in it."""
    monkeypatch.chdir(tmp_path)
    end = describe_end(raised(lambda: torch.zeros(2).view(3)), Stage("fit"))
    assert end.code == 2
    assert f"({__file__}:" in end.message
    assert "RuntimeError: shape" in end.message
    assert "view(3)" in (tmp_path / "traceback.txt").read_text()
    assert str(tmp_path / "traceback.txt") in end.message


def test_a_traceback_finds_another_folder_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, free = tmp_path / "full", tmp_path / "free"
    full.mkdir()
    free.mkdir()
    write_text = Path.write_text

    def failing(path: Path, *arguments: Any, **options: Any) -> int:
        if path.parent == full:
            path.touch()  # a full disk takes the name, and none of the text
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", failing)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(free))
    monkeypatch.chdir(full)
    end = describe_end(raised(lambda: torch.zeros(2).view(3)), Stage("fit"))
    assert str(free / "traceback.txt") in end.message
    assert "view(3)" in (free / "traceback.txt").read_text()
    assert not list(full.iterdir())


def test_a_disk_error_without_a_files_name_is_about_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[Path] = []
    monkeypatch.setattr("remax_lightning.cli_exit.free_space", lambda path: asked.append(path) or "; 0 bytes are free")
    monkeypatch.setattr(Stage, "planned_folder", lambda _: Path("/the/run"))
    end = describe_end(OSError(errno.ENOSPC, "No space left on device"), Stage("fit"))
    assert asked == [Path("/the/run")]
    assert end.message.startswith("a file of the run: No space left on device; 0 bytes are free; make room")


def test_a_download_that_does_not_fit_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from remax_lightning.data import load_tokenizer

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", full)
    end = describe_end(raised(lambda: load_tokenizer("owner/name")), Stage("fit"))
    assert end.code == 2
    assert "\n" not in end.message
    assert end.message.startswith("data.tokenizer: no tokenizer could be loaded from 'owner/name'")
    assert f"downloads go to {tmp_path / 'hub'}: " in end.message
    assert "are free there; make room, or set HF_HOME to a folder on another disk" in end.message
    other = describe_end(raised(lambda: load_tokenizer("./nowhere")), Stage("fit"))
    assert "HF_HOME" not in other.message


def test_before_the_runs_folder_is_chosen_its_parents_disk_counts(tmp_path: Path) -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger

    logged = Trainer(accelerator="cpu", logger=CSVLogger(tmp_path / "logs"), enable_checkpointing=False)
    plain = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path / "root", enable_checkpointing=False)
    assert Stage("fit", logged).planned_folder() == tmp_path / "logs"
    assert Stage("fit", plain).planned_folder() == tmp_path / "root"


def test_a_library_is_believed_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = raised(lambda: json.loads("{"))
    error.__traceback__ = error.__traceback__.tb_next.tb_next.tb_next  # without this file's frames
    end = describe_end(error, Stage("fit"))
    assert (end.code, end.message.partition(" (traceback")[0].partition(":")[0]) == (2, "fit")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENOTDIR])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_disk_that_refuses_is_named_with_its_space(
    number: int, wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error: Exception = OSError(number, "text", str(tmp_path / "gone" / "file.bin"))
    if wrapped:
        outer = RuntimeError("the writer failed")
        outer.__cause__, error.__context__ = error, outer  # a ring
        error = outer
    end = describe_end(error, Stage("fit"))
    assert end.code == 2
    assert str(tmp_path / "gone" / "file.bin") in end.message
    assert number == errno.ENOTDIR or "are free there; " in end.message
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_another_language() -> None:
    end = describe_end(RuntimeError("I/O error: No space left on device (os error 28)"), Stage("fit"))
    assert end.code == 2
    assert "No space left on device" in end.message


def test_sides() -> None:
    assert side(torch.__file__) == side(json.__file__) == side("<string>") == "library"
    assert side(sys.modules["remax_lightning.cli_exit"].__file__ or "") == "ours"
    assert side(__file__) == "user"


# ---- Files of a model ----


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def widen(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_size": 2 * settings["hidden_size"]}))


def nest(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 20_000 + "1" + "}" * 20_000)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(cut, "model.safetensors is damaged"), (widen, "does not fit the weights"), (nest, "nested too deeply")],
)
def test_files_that_are_no_model(
    damage: Callable[[Path], None], expected: str, tmp_path: Path, policy_path: Path
) -> None:
    folder = shutil.copytree(policy_path, tmp_path / "policy")
    damage(folder)
    with pytest.raises(UserError, match=expected) as error:
        ModelConfig(str(folder)).load("model.policy")
    assert str(error.value).startswith("model.policy.path: ")


CALLBACK = (
    "from lightning.pytorch import Callback\nclass Mine(Callback):\n    def on_train_batch_end(self, *_):\n        {}\n"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "code", "expected"),
    [
        ("1 / 0", 2, "my_broken.py:4) raised ZeroDivisionError"),
        ("raise KeyboardInterrupt", 130, "remax: interrupted after optimizer step 1, before a first checkpoint"),
    ],
)
def test_a_callback_of_the_users_ends_the_command(
    body: str, code: int, expected: str, tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_broken.py").write_text(CALLBACK.format(body))
    sys.modules.pop("my_broken", None)
    config = changed(small_config(tmp_path, policy_path), trainer__callbacks=[{"class_path": "my_broken.Mine"}])
    with in_folder(tmp_path):
        outcome = remax(capsys, "fit", "--config", write(tmp_path / "run.yaml", config))
    sys.modules.pop("my_broken", None)
    assert outcome.code == code
    assert "Traceback" not in outcome.err
    assert expected in outcome.err
    assert is_one_message(outcome) == (code == 2)
    assert len(list(tmp_path.rglob("traceback.txt"))) == (code == 2)


@pytest.mark.slow
def test_more_batches_between_validations_than_there_are(
    tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(small_config(tmp_path, policy_path), trainer__val_check_interval=100)
    with in_folder(tmp_path):
        outcome = remax(capsys, "fit", "--config", write(tmp_path / "run.yaml", config))
    assert outcome.code == 2
    assert message(outcome).startswith("trainer.val_check_interval is 100, but an epoch has only ")


def test_escapes_of_a_stranger_do_not_reach_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from remax_lightning import cli_run

    def run() -> None:
        raise UserError("the scorer answered \x1b]0;owned\x07 \u202e\n  é 日本")

    monkeypatch.setattr(cli_run, "run", run)
    reward = "remax_lightning.rewards.verifiers.exact_match"
    outcome = remax(capsys, "fit", "--model.policy", "owner/model", "--model.reward", reward)
    assert outcome.code == 2
    assert message(outcome) == "the scorer answered \\x1b]0;owned\\x07 \\u202e\n  é 日本\n"


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("arguments", [["configs", "list"], ["--version"]])
def test_a_reader_that_leaves_ends_the_command_without_a_word(arguments: list[str], tmp_path: Path) -> None:
    """As `head` does; a bug of ours would be told, with a traceback in the folder."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout:
        ended = subprocess.run(
            [sys.executable, "-m", "remax_lightning", *arguments], cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE
        )
    assert (ended.returncode, ended.stderr, list(tmp_path.iterdir())) == (141, b"", [])
