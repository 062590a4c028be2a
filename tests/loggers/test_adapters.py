"""What every logger gets of a run, seen with small stand-ins; tests/real has the real ones."""

from __future__ import annotations

import csv
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from callbacks.fakes import FakeModule, events, make_output, two_steps_of_two_parts
from callbacks.fakes import make_trainer as fake_trainer
from helpers.loggers import RecordingLogger
from helpers.training import make_trainer, prompt_data, remax_module, save_policy
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

from remax_lightning.callbacks import Evaluation, ExportPolicy, SampleDump, TensorBoardReport
from remax_lightning.errors import UserError
from remax_lightning.loggers import check_loggers, logger_adapters
from remax_lightning.loggers.adapters import PACKAGES, CometAdapter, MLFlowAdapter, adapt


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def test_tables_and_histograms_stand_at_the_steps_of_the_figures(tmp_path: Path) -> None:
    logger = RecordingLogger(tmp_path)
    callbacks = [SampleDump(every_n_steps=1, num_samples=2), TensorBoardReport(every_n_steps=1)]
    fake_trainer(tmp_path, callbacks, logger=logger, accumulate_grad_batches=2).fit(
        FakeModule(two_steps_of_two_parts())
    )
    assert [step for step, _, _ in logger.tables["samples/train"]] == [1, 2]
    _, columns, rows = logger.tables["samples/train"][0]
    assert columns[:3] == ["prompt", "response", "greedy_response"]
    assert [row[1] for row in rows] == ["response 0.0", "response 0.1"]
    assert {name: [step for step, _ in values] for name, values in logger.histograms.items()} == {
        "distribution/reward": [1, 2],
        "distribution/response_length": [1, 2],
        "distribution/kl": [1, 2],
    }
    assert logger.histograms["distribution/reward"] == [(1, 12), (2, 12)]


def test_all_loggers_of_a_run_get_all(tmp_path: Path) -> None:
    """A second logger is no poorer than the first, and one without tables is passed over."""
    second = RecordingLogger(tmp_path)
    loggers = [TensorBoardLogger(tmp_path, "logs", version=""), CSVLogger(tmp_path / "csv"), second]
    trainer = fake_trainer(tmp_path, [SampleDump(1), TensorBoardReport(1)], logger=loggers)
    trainer.fit(FakeModule([make_output(0)]))
    assert list(second.tables) == ["samples/train"]
    assert "samples/train/6/text_summary" in events(tmp_path).Tags()["tensors"]
    assert set(events(tmp_path).Tags()["histograms"]) == set(second.histograms)


def test_half_an_emoji_does_not_end_a_table(tmp_path: Path) -> None:
    logger, output = RecordingLogger(tmp_path), make_output(0)
    output["rollout"].sampled.texts[0] = "\ud83d"
    fake_trainer(tmp_path, [SampleDump(every_n_steps=1)], logger=logger).fit(FakeModule([output]))
    (_, columns, rows) = logger.tables["samples/train"][0]
    assert json.dumps(rows, ensure_ascii=False).encode() is not None
    assert rows[0][columns.index("response")] == "\\ud83d"


@pytest.mark.slow(0.3)
def test_the_evaluation_is_a_table(policy: str, tmp_path: Path) -> None:
    logger = RecordingLogger(tmp_path)
    trainer = make_trainer(tmp_path, [Evaluation(num_resamples=10)], logger=logger)
    data = prompt_data(tmp_path, policy)
    trainer.test(remax_module(policy), data, verbose=False)
    (step, columns, rows) = logger.tables["evaluation"][0]
    written = json.loads((tmp_path / "mine" / "first" / "evaluation.json").read_text())["figures"]
    assert {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows} == written
    assert logger.metrics["test/reward"] == [(step, pytest.approx(written["reward"]["value"]))]


@pytest.mark.slow
def test_an_exported_policy_is_an_artifact_on_demand(policy: str, tmp_path: Path) -> None:
    logger = RecordingLogger(tmp_path)
    options = {"logger": logger, "limit_val_batches": 1}
    make_trainer(tmp_path, [ExportPolicy(log_artifact=True)], **options).fit(
        remax_module(policy), prompt_data(tmp_path, policy)
    )
    assert [(name, alias) for name, alias, _ in logger.artifacts] == [("policy", "best"), ("policy", "last")]
    assert all("model.safetensors" in files for _, _, files in logger.artifacts)
    silent = RecordingLogger(tmp_path, version="second")
    make_trainer(tmp_path, [ExportPolicy(best=False)], logger=silent).fit(
        remax_module(policy), prompt_data(tmp_path, policy)
    )
    assert silent.artifacts == []


@pytest.mark.parametrize("logger", [False, TensorBoardLogger, CSVLogger])
def test_artifacts_need_a_logger_that_takes_them(logger: Any, policy: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [ExportPolicy(log_artifact=True)], logger=logger and logger(tmp_path))
    with pytest.raises(UserError, match=r"export\.log_artifact must be false .*got true; set trainer\.logger to Wandb"):
        trainer.fit(remax_module(policy), prompt_data(tmp_path, policy))


# ---- Hyper-parameters ----


@pytest.mark.slow(0.3)
def test_every_logger_gets_hyper_parameters_versions_and_git(policy: str, tmp_path: Path) -> None:
    other = RecordingLogger(tmp_path)
    loggers = [TensorBoardLogger(tmp_path, "logs", version=""), CSVLogger(tmp_path / "csv"), other]
    trainer = make_trainer(tmp_path, logger=loggers)
    trainer.fit(remax_module(policy, kl_coef=0.0), prompt_data(tmp_path, policy))
    assert other.params["versions"]["torch"] == version("torch")
    assert {"python", "transformers", "lightning", "remax_lightning"} <= set(other.params["versions"])
    assert len(other.params["git"]["commit"]) == 40
    assert other.params["git"]["dirty"] in (True, False)
    assert other.params["config"]["model"]["init_args"]["sampling"]["max_response_length"] == 6
    assert other.params["config"]["trainer"]["max_steps"] == 1
    for logger in loggers[:2]:
        saved = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
        assert saved == other.params
    from tensorboard.plugins.hparams import plugin_data_pb2

    tags = events(tmp_path).summary_metadata
    start = plugin_data_pb2.HParamsPluginData.FromString(
        tags["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info.hparams
    assert start["versions/torch"].string_value == version("torch")
    assert start["config/trainer/max_steps"].number_value == 1
    assert "hp_metric" not in events(tmp_path).Tags()["scalars"]


@pytest.mark.slow(0.3)
def test_a_trainer_that_logs_no_hyper_parameters_is_obeyed(policy: str, tmp_path: Path) -> None:
    logger = RecordingLogger(tmp_path)
    trainer = make_trainer(tmp_path, logger=logger, enable_autolog_hparams=False)
    trainer.fit(remax_module(policy), prompt_data(tmp_path, policy))
    assert logger.params == {}


# ---- MLflow, without its package ----


class Client:
    """An MLflow run whose parameters cannot change."""

    def __init__(self) -> None:
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}

    def get_run(self, _: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params=self.params))

    def set_tag(self, _: str, key: str, value: str) -> None:
        self.tags[key] = value


class MlflowException(Exception):  # noqa: N818
    """As MLflow calls it."""


def mlflow_logger(uri: str, client: Any = None) -> Any:
    class Fake(MLFlowLogger):
        experiment = client
        run_id = "a"

        def __init__(self) -> None:
            self._tracking_uri, self._experiment_name, self._run_id = uri, "helpful", None

        def log_hyperparams(self, params: Any) -> None:
            from lightning.fabric.utilities.logger import _flatten_dict

            new = {key: str(value) for key, value in _flatten_dict(params).items()}
            if any(client.params.get(key, value) != value for key, value in new.items()):
                raise MlflowException("Changing param values is not allowed.")
            client.params |= new

    return Fake()


def test_a_changed_parameter_becomes_a_tag_of_mlflow() -> None:
    client = Client()
    adapter = MLFlowAdapter(mlflow_logger("file:store", client))
    adapter.log_hyperparameters({"config": {"steps": 2, "lr": 1.0}})
    adapter.log_hyperparameters({"config": {"steps": 4, "lr": 1.0, "seed": 1}})
    assert client.params == {"config/steps": "2", "config/lr": "1.0", "config/seed": "1"}
    assert client.tags == {"config/steps": "4"}


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("file:runs/mlruns", "runs/helpful"),
        ("sqlite:///runs/mlflow.db", "runs/helpful"),
        ("sqlite:////data/mlflow.db", "/data/helpful"),
        ("http://127.0.0.1:5000", "root/helpful"),
        ("databricks", "root/helpful"),
    ],
)
def test_runs_of_mlflow_lie_beside_their_store(uri: str, folder: str) -> None:
    assert adapt(mlflow_logger(uri)).runs_folder(Path("root")) == Path(folder)


# ---- Missing packages ----


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_told_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remax_lightning.loggers.adapters.find_spec", lambda _: None)
    config = SimpleNamespace(class_path=f"lightning.pytorch.loggers.{name}")
    for form in (config, [SimpleNamespace(class_path="TensorBoardLogger"), config], {"class_path": name}):
        with pytest.raises(
            UserError, match=rf"{name} needs {PACKAGES[name]}; pip install 'remax-lightning\[loggers\]'"
        ):
            check_loggers(form)
    for form in (None, True, [], SimpleNamespace(class_path="TensorBoardLogger")):
        check_loggers(form)


def test_a_comet_that_records_nothing_is_refused() -> None:
    arguments = {"online": False}
    for given in (arguments, SimpleNamespace(**arguments)):
        with pytest.raises(UserError, match=r"records nothing with online: false.* COMET_START_ONLINE=false"):
            check_loggers([SimpleNamespace(class_path="CometLogger", init_args=given)])
    with pytest.raises(UserError, match="records nothing"):
        CometAdapter(SimpleNamespace(_online=False))
    logger = SimpleNamespace(_online=None, _prefix="")
    CometAdapter(logger)
    assert logger._prefix is None


def test_a_dry_run_logs_nothing(tmp_path: Path) -> None:
    assert logger_adapters(fake_trainer(tmp_path, [], fast_dev_run=True)) == []


def test_the_file_of_csv_is_read_by_python(policy: str, tmp_path: Path) -> None:
    make_trainer(tmp_path, logger=CSVLogger(tmp_path, "csv")).fit(remax_module(policy), prompt_data(tmp_path, policy))
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows if row["train/reward"]] == ["1"]
