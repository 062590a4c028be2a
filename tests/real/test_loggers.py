"""Runs under real loggers, without network, read back with the loggers' own readers: curves, tables, resume."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import changed, in_folder, small_config, write_config
from helpers.training import save_policy

from remax_lightning.cli_run import run
from remax_lightning.errors import UserError
from remax_lightning.run_folder import run_folder
from remax_lightning.shipped_configs import config_folder
from remax_lightning.tools.report.run import read_run

pytestmark = pytest.mark.slow(4)

EXTRA: dict[str, Any] = {"wandb": {"offline": True}}
"""What the overlay needs to stay on this machine."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "comet"))
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    (tmp_path / ".gitignore").write_text("*\n")
    for command in (["init", "-q"], ["add", "-f", ".gitignore"], ["commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=tmp_path, check=True)
    with in_folder(tmp_path):
        yield tmp_path


def commit(folder: Path) -> str:
    """The commit of the folder, which loggers tell with the hyper-parameters."""
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
    return told.stdout.strip()


def fit(folder: Path, policy: str, name: str, *arguments: str, steps: int = 2, subcommand: str = "fit") -> Any:
    """Train, or evaluate, under the shipped overlay of a logger; returns trainer and run folder."""
    config = changed(
        small_config(folder, policy),
        trainer__max_steps=steps,
        trainer__logger=...,
        trainer__callbacks=[
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"},
            }
        ],
        samples={"every_n_steps": 1, "num_samples": 2},
        tensorboard={"every_n_steps": 1},
        export={"log_artifact": True, "best": False},
    )
    mine = {"trainer": {"logger": {"init_args": EXTRA.get(name, {})}}}
    overlay = str(config_folder() / "loggers" / f"{name}.yaml")
    files = [write_config(folder / "run.yaml", config), overlay, write_config(folder / "mine.yaml", mine)]
    cli = run([subcommand, *(part for file in files for part in ("--config", file)), *arguments])
    return cli.trainer, run_folder(cli.trainer)


def check_folder(found: Path, steps: list[int]) -> None:
    """What every run has in its folder, whatever its logger."""
    lines = (found / "samples" / "train.jsonl").read_text().splitlines()
    assert sorted({json.loads(line)["step"] for line in lines}) == steps
    assert {path.name for path in (found / "checkpoints").iterdir()} == {f"step={step}.ckpt" for step in steps}
    assert (found / "policy" / "last" / "model.safetensors").is_file()


def test_wandb_offline(folder: Path, policy: str) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    from remax_lightning.tools.report.run import _wandb_records

    trainer, first = fit(folder, policy, "wandb")
    wandb.finish()
    assert first.parts[-3:] == ("runs", "remax", trainer.logger.version)
    check_folder(first, [1, 2])
    trainer, second = fit(folder, policy, "wandb", "--ckpt_path", "last", steps=3)
    wandb.finish()
    wandb.teardown()  # its process writes the end of the file when it ends
    assert second == first
    check_folder(first, [1, 2, 3])
    files = sorted((folder / "runs" / "wandb").glob(f"*-{first.name}/run-{first.name}.wandb"))
    assert len(files) == 2
    records = [Record.FromString(data) for file in files for data in _wandb_records(file)]
    history = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
               for record in records if record.WhichOneof("record_type") == "history"]  # fmt: skip
    steps = [row["trainer/global_step"] for row in history if "train/reward" in row]
    assert steps == [1, 2, 3]
    tables = [row for row in history if any(key.startswith("samples/train") for key in row)]
    assert [row["trainer/global_step"] for row in tables] == [1, 2, 3]
    assert [row["trainer/global_step"] for row in history if "distribution/reward" in row] == [1, 2, 3]
    config = {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    config |= {item.key: json.loads(item.value_json) for record in records for item in record.run.config.update}
    assert "torch" in config["versions"]
    assert config["config"]["model"]["init_args"]["sampling"]["max_response_length"] == 4
    assert config["git"] == {"commit": commit(folder), "dirty": False}
    assert any(record.request.WhichOneof("request_type") == "log_artifact" or record.WhichOneof("record_type") ==
               "artifact" for record in records)  # fmt: skip
    assert read_run(first).curves["train/reward"].steps == [1, 2, 3]  # what `remax report` draws
    fit(folder, policy, "wandb", subcommand="test")
    wandb.finish()
    [table] = (folder / "runs" / "wandb").rglob("evaluation*.table.json")
    assert "reward" in [row[0] for row in json.loads(table.read_text())["data"]]


def test_mlflow(folder: Path, policy: str) -> None:
    mlflow = pytest.importorskip("mlflow")
    (folder / "runs").mkdir()
    _, first = fit(folder, policy, "mlflow")
    assert first.parts[-3:-1] == ("runs", "remax")
    check_folder(first, [1, 2])
    _, second = fit(folder, policy, "mlflow", "--ckpt_path", "last", steps=3)
    assert second == first
    check_folder(first, [1, 2, 3])
    client = mlflow.tracking.MlflowClient("sqlite:///runs/mlflow.db")
    found = client.get_run(first.name)
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(first.name, "train/reward")
    assert [metric.step for metric in history] == [1, 2, 3]
    assert found.data.params["config/trainer/max_steps"] == "2"
    assert found.data.tags["config/trainer/max_steps"] == "3"  # MLflow keeps the first value of a parameter
    assert "versions/torch" in found.data.params
    assert len(client.search_runs([found.info.experiment_id])) == 1
    assert [file.path for file in client.list_artifacts(first.name, "samples/train")] == [
        f"samples/train/step_{step}.json" for step in (1, 2, 3)
    ]
    assert found.data.params["git/commit"] == commit(folder)
    assert "policy/last/model.safetensors" in [file.path for file in client.list_artifacts(first.name, "policy/last")]
    _, tested = fit(folder, policy, "mlflow", subcommand="test")
    [table] = client.list_artifacts(tested.name, "evaluation")
    told = json.loads((folder / "runs" / "mlartifacts" / tested.name / "artifacts" / table.path).read_text())
    assert "reward" in [row[0] for row in told["data"]]


def test_trackio(folder: Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "trackio" not in sys.modules  # it reads its folder when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    pytest.importorskip("trackio")
    project = "remax"
    mine = ("--trainer.logger.init_args.save_dir", str(folder / "trackio"))
    _, first = fit(folder, policy, "trackio", *mine)
    check_folder(first, [1, 2])
    _, second = fit(folder, policy, "trackio", *mine, "--ckpt_path", "last", steps=3)
    assert second == first
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs(project, first.name)
    assert [row["step"] for row in logs if "train/reward" in row] == [1, 2, 3]
    assert [row["step"] for row in logs if "samples/train" in row] == [1, 2, 3]
    assert [row["step"] for row in logs if "distribution/reward" in row] == [1, 2, 3]
    told = json.dumps(SQLiteStorage.get_run_config(project, first.name))
    assert commit(folder) in told
    assert "max_response_length" in told
    _, tested = fit(folder, policy, "trackio", *mine, subcommand="test")
    [table] = [row["evaluation"] for row in SQLiteStorage.get_logs(project, tested.name) if "evaluation" in row]
    assert "reward" in json.dumps(table)


def test_comet_offline(folder: Path, policy: str) -> None:
    pytest.importorskip("comet_ml")
    trainer, first = fit(folder, policy, "comet")
    assert first.name == trainer.logger.version
    check_folder(first, [1, 2])
    trainer.logger.experiment.end()  # or the end of the process
    [archive] = (folder / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        lines = [json.loads(line) for line in file.read("messages.json").splitlines()]
    messages = [(line["type"], line["payload"]) for line in lines]
    metrics = [content["metric"] for kind, content in messages if kind == "metric_msg"]
    assert [metric["step"] for metric in metrics if metric["metricName"] == "train/reward"] == [1, 2]
    told = json.dumps(messages)
    assert all(text in told for text in ("max_response_length", commit(folder), "samples_train_step_1.csv"))
    assert '"fileName": "last/model.safetensors", "groupingName": "policy-last"' in told
    with pytest.raises(UserError, match="CometLogger records nothing with online: false"):
        fit(folder, policy, "comet", "--trainer.logger.init_args.online", "false")
