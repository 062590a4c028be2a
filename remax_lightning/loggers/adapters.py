"""One adapter for each kind of logger: everything of a logger that Lightning's interface does not cover.

Tables, histograms, artifacts and hyper-parameters, the folder of a run, and going on with an earlier run. A logger
without an adapter of its own gets what its methods offer.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from csv import DictReader, DictWriter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from remax_lightning.errors import UserError
from remax_lightning.loggers.trackio import TrackioLogger

Charts = Mapping[str, Mapping[str, Sequence[str]]]
"""Log keys by the title of their chart, by group."""

HEADLINES = ("val/reward", "val/baseline_reward", "val/kl", "train/reward", "train/kl")
"""Metrics beside the hyper-parameters in TensorBoard's table of runs."""


class LoggerAdapter:
    """What this package asks of any logger; subclasses know one kind. Call what logs on rank 0.

    Args:
        logger: the logger.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    # ---- What is logged ----

    @property
    def has_histograms(self) -> bool:
        """Whether the logger shows histograms; the same on every rank."""
        return hasattr(self.logger, "log_histogram")

    @property
    def has_artifacts(self) -> bool:
        """Whether the logger stores folders."""
        return hasattr(self.logger, "log_artifact")

    def log_hyperparameters(self, params: dict[str, Any]) -> None:
        """Log nested hyper-parameters."""
        self.logger.log_hyperparams(params)

    def log_table(self, key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Log a table, where the logger has them."""
        if hasattr(self.logger, "log_table"):
            self.logger.log_table(key=key, columns=columns, data=rows, step=step)

    def log_samples(self, key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Log samples, whose cells may be long texts."""
        self.log_table(key, columns, rows, step)

    def log_histogram(self, key: str, values: Any, step: int) -> None:
        """Log a histogram of an array of finite numbers."""
        if self.has_histograms:
            self.logger.log_histogram(key, values, step)

    def log_charts(self, charts: Charts) -> None:
        """Tell the logger which metrics to draw together, where it can be told."""

    def log_artifact(self, folder: Path, name: str, alias: str) -> None:
        """Store a copy of a folder under a name; the alias moves to the latest one."""
        if self.has_artifacts:
            self.logger.log_artifact(folder, name, alias)

    # ---- The run ----

    @property
    def has_folder(self) -> bool:
        """Whether the logger has a folder for each run itself, which it writes to."""
        return False

    def runs_folder(self, root: Path) -> Path:
        """Return the folder that holds the folders of all runs with this logger; `root` is the trainer's."""
        save_dir, name = self.logger.save_dir, str(self.logger.name or "")
        return (root if save_dir is None or "://" in str(save_dir) else Path(save_dir)) / name

    def lightning_folder(self, root: Path) -> Path | None:
        """Return where Lightning alone would put the folders of runs, and versions 0.1 and 0.2 put them."""
        return Path(self.logger.save_dir or root) / str(self.logger.name)

    @property
    def chosen_version(self) -> str | None:
        """Version or id of the run, where the user has set it, as the name of the run's folder."""
        version = self.logger.version
        if version is None or version == "":
            return None
        return version if isinstance(version, str) else f"version_{version}"

    def continue_run(self, version: str, step: int) -> None:
        """Go on with an earlier run, before the logger writes; nothing where the logger cannot be told.

        Args:
            version: its version or id.
            step: optimizer steps done; what was logged later is logged again.
        """

    def files(self) -> str | None:
        """Return the folder of this run's own files, where the logger has one beside the run's folder."""
        return None

    def prepare(self) -> None:
        """Do what is to be done before a new run starts."""


class TensorBoardAdapter(LoggerAdapter):
    """Event files; texts are Markdown, in which TensorBoard shows HTML, so they are escaped."""

    has_histograms = True
    has_artifacts = False
    has_folder = True

    def log_hyperparameters(self, params: dict[str, Any]) -> None:
        """Write `hparams.yaml`, and a row of the HParams tab with the run's headline metrics."""
        from torch.utils.tensorboard.summary import hparams

        self.logger.log_hyperparams(params, metrics={})  # Lightning would log a metric of its own, hp_metric = -1
        flat = self.logger._sanitize_params(_flatten_dict(params))
        for summary in hparams(flat, dict.fromkeys(HEADLINES, 0.0)):  # names of metrics; their values are the curves
            self.logger.experiment._get_file_writer().add_summary(summary)

    def log_table(self, key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Write a table as text."""
        lines = [columns, ["---"] * len(columns), *([escape_cell(value) for value in row] for row in rows)]
        self.logger.experiment.add_text(key, "\n".join(f"|{'|'.join(line)}|" for line in lines), step)

    def log_samples(self, key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Write one text per sample, with its fields below each other, so that long ones can be read."""
        for number, row in enumerate(rows, 1):
            fields = [[name.replace("_", " "), value] for name, value in zip(columns, row, strict=True)]
            self.log_table(f"{key}/{number}", ["sample", str(number)], fields, step)

    def log_histogram(self, key: str, values: Any, step: int) -> None:
        """Write a histogram."""
        self.logger.experiment.add_histogram(key, values, step)

    def log_charts(self, charts: Charts) -> None:
        """Write the layout of the Custom Scalars tab.

        TensorBoard matches a tag as a regular expression at the start of a name, so `train/kl` would also draw
        `train/kl_max`.
        """
        layout = {
            group: {title: ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]] for title, tags in titles.items()}
            for group, titles in charts.items()
        }
        self.logger.experiment.add_custom_scalars(layout)

    @property
    def chosen_version(self) -> str | None:
        """The version that the user has set; the property of the logger would take the next free number."""
        version = self.logger._version
        return version if version is None or isinstance(version, str) else f"version_{version}"

    def continue_run(self, version: str, step: int) -> None:
        """Write another event file, and have TensorBoard hide what the earlier ones have after `step`."""
        self.logger._version = version
        self.logger._kwargs["purge_step"] = step + 1


class CSVAdapter(LoggerAdapter):
    """`metrics.csv` and `hparams.yaml`; samples are in the run's folder anyway."""

    has_histograms = False
    has_artifacts = False
    has_folder = True
    chosen_version = TensorBoardAdapter.chosen_version

    def continue_run(self, version: str, step: int) -> None:
        """Keep the rows up to `step`: Lightning removes the file when it opens a folder again."""
        self.logger._version = version
        file = Path(self.logger.log_dir) / "metrics.csv"
        if getattr(rank_zero_only, "rank", 0) != 0 or not file.is_file():
            return
        with file.open(newline="") as stream:
            reader = DictReader(stream)
            names = list(reader.fieldnames or ())
            rows = [row for row in reader if (row.get("step") or "").isdecimal() and int(row["step"]) <= step]
        earlier = file.with_name(".metrics.csv.earlier")
        with earlier.open("w", newline="") as stream:
            writer = DictWriter(stream, names, extrasaction="ignore")  # a killed run may have cut its last row
            writer.writeheader()
            writer.writerows(rows)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            experiment = self.logger.experiment
        earlier.replace(file)
        experiment.metrics_keys = names


class WandbAdapter(LoggerAdapter):
    """Weights & Biases, online and offline."""

    has_histograms = True
    has_artifacts = True
    _runs: ClassVar[set[str]] = set()  # ids of runs of this process, of which Lightning finishes none

    def log_hyperparameters(self, params: dict[str, Any]) -> None:
        """Log the configuration of the run."""
        self._runs.add(self.logger.experiment.id)
        super().log_hyperparameters(params)

    def log_histogram(self, key: str, values: Any, step: int) -> None:
        """Log a histogram."""
        import wandb

        self.logger.log_metrics({key: wandb.Histogram(values)}, step)

    def log_artifact(self, folder: Path, name: str, alias: str) -> None:
        """Log a new version of the artifact `NAME-RUN`."""
        import wandb

        run = self.logger.experiment
        artifact = wandb.Artifact(f"{name}-{run.id}", type="model")
        artifact.add_dir(str(folder))
        run.log_artifact(artifact, aliases=[alias])

    def continue_run(self, version: str, step: int) -> None:
        """Use the id of the run; W&B joins what has one id, offline when it is synchronized."""
        self.logger._id = self.logger._wandb_init["id"] = version
        self.logger._wandb_init["resume"] = "allow"

    def files(self) -> str | None:
        """Return W&B's folder of this run, which has its log of records when it is offline."""
        run = self.logger._experiment
        folder = getattr(run, "dir", None)
        return None if not isinstance(folder, str) else str(Path(folder).parent)

    def prepare(self) -> None:
        """Finish a run of an earlier logger in this process: a new logger would write to it."""
        import wandb

        if self.logger._experiment is None and wandb.run is not None and wandb.run.id in self._runs:
            wandb.finish()


class MLFlowAdapter(LoggerAdapter):
    """MLflow, with a store on this machine or a server."""

    has_histograms = False
    has_artifacts = True

    def log_hyperparameters(self, params: dict[str, Any]) -> None:
        """Log parameters; MLflow refuses to change one, so what a resumed run changes becomes a tag."""
        try:
            self.logger.log_hyperparams(params)
        except Exception as error:
            if "param" not in str(error).lower() or type(error).__name__ not in ("MlflowException", "RestException"):
                raise
            client, run = self.logger.experiment, self.logger.run_id
            flat = _flatten_dict(params)
            known = client.get_run(run).data.params
            self.logger.log_hyperparams({key: value for key, value in flat.items() if key not in known})
            for key, value in flat.items():
                if key in known and known[key] != str(value)[:250]:
                    client.set_tag(run, key, str(value)[:250])

    def log_table(self, key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Log a table as the artifact `KEY/step_N.json`."""
        data = {name: [row[column] for row in rows] for column, name in enumerate(columns)}
        self.logger.experiment.log_table(self.logger.run_id, data=data, artifact_file=f"{key}/step_{step}.json")

    def log_artifact(self, folder: Path, name: str, alias: str) -> None:
        """Log the folder as the artifact `NAME/ALIAS`."""
        self.logger.experiment.log_artifacts(self.logger.run_id, str(folder), artifact_path=f"{name}/{alias}")

    def runs_folder(self, root: Path) -> Path:
        """Return the folder of the experiment beside a store of this machine, whose folders are MLflow's alone."""
        address, experiment = str(self.logger._tracking_uri), str(self.logger._experiment_name)
        if self.logger.save_dir is not None:
            return Path(self.logger.save_dir).parent / experiment
        if address.startswith("sqlite:///"):
            return Path(address.removeprefix("sqlite:///")).parent / experiment
        return root / experiment

    def lightning_folder(self, root: Path) -> Path | None:
        """Return the experiment's folder in a store of files; the logger's `name` would start a run to tell it."""
        store = self.logger.save_dir
        found = (
            None if store is None else self.logger._mlflow_client.get_experiment_by_name(self.logger._experiment_name)
        )
        return None if found is None else Path(store) / str(found.experiment_id)

    @property
    def chosen_version(self) -> str | None:
        """The id that was set; the property of the logger would start a run."""
        return cast("str | None", self.logger._run_id)

    def continue_run(self, version: str, step: int) -> None:
        """Log to the run with this id, which is running again."""
        self.logger._run_id, self.logger._initialized = version, False
        if getattr(rank_zero_only, "rank", 0) == 0:
            self.logger.experiment.update_run(version, status="RUNNING")


class TrackioAdapter(LoggerAdapter):
    """trackio by its logger here, which has a method for each of these."""

    def continue_run(self, version: str, step: int) -> None:
        """Log to the run with this name."""
        self.logger._run_name = version


COMET_OFFLINE = (
    "trainer.logger: Lightning's CometLogger records nothing with online: false; leave online out, and set the"
    " environment variable COMET_START_ONLINE=false"
)


class CometAdapter(LoggerAdapter):
    """Comet, online and offline. An experiment starts with its logger, so `experiment_key` says which to go on with.

    Raises:
        UserError: if Lightning has made an experiment that records nothing.
    """

    has_histograms = True
    has_artifacts = True

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        if getattr(logger, "_online", None) is False:  # it then disables the experiment
            raise UserError(COMET_OFFLINE)
        # Comet writes an empty prefix as "_train/reward"; it is left of TensorBoard's logger where a configuration
        # replaces that by Comet's.
        logger._prefix = logger._prefix or None

    def log_table(self, key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Log a table as the asset `KEY_step_N.csv`."""
        name = f"{key.replace('/', '_')}_step_{step}.csv"
        self.logger.experiment.log_table(name, tabular_data=rows, headers=columns)

    def log_histogram(self, key: str, values: Any, step: int) -> None:
        """Log a histogram."""
        self.logger.experiment.log_histogram_3d(values, name=key, step=step)

    def log_artifact(self, folder: Path, name: str, alias: str) -> None:
        """Log the folder as the model `NAME-ALIAS`."""
        self.logger.experiment.log_model(f"{name}-{alias}", str(folder))


ADAPTERS: dict[type[Logger], type[LoggerAdapter]] = {
    TensorBoardLogger: TensorBoardAdapter,
    CSVLogger: CSVAdapter,
    WandbLogger: WandbAdapter,
    MLFlowLogger: MLFlowAdapter,
    TrackioLogger: TrackioAdapter,
    CometLogger: CometAdapter,
}

PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "TrackioLogger": "trackio", "CometLogger": "comet_ml"}
"""The package that a logger needs, all of the extra `loggers`."""


def adapt(logger: Logger) -> LoggerAdapter:
    """Return the adapter of a logger; that of the nearest base class that has one."""
    return next((ADAPTERS[kind] for kind in type(logger).__mro__ if kind in ADAPTERS), LoggerAdapter)(logger)


def logger_adapters(trainer: Trainer) -> list[LoggerAdapter]:
    """Return the adapters of a trainer's loggers; none in a `fast_dev_run`, which logs nothing."""
    return [] if cast("Any", trainer).fast_dev_run else [adapt(logger) for logger in trainer.loggers]


def check_loggers(config: Any) -> None:
    """Refuse loggers whose package is not installed, and those that would record nothing.

    Args:
        config: `trainer.logger` of a configuration, in any of its forms.

    Raises:
        UserError: naming the extra that installs it, or what to set.
    """
    for path, arguments in _classes(config):
        name = path.rpartition(".")[2]
        if name == "CometLogger" and arguments.get("online") is False:
            raise UserError(COMET_OFFLINE)
        package = PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise UserError(f"trainer.logger: {name} needs {package}; pip install 'remax-lightning[loggers]'")


def _classes(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield class path and arguments of each logger."""
    if isinstance(config, list | tuple):
        for item in config:
            yield from _classes(item)
        return
    parts = config if isinstance(config, Mapping) else vars(config) if hasattr(config, "class_path") else {}
    arguments = parts.get("init_args") or {}
    if isinstance(path := parts.get("class_path"), str):
        yield path, dict(arguments if isinstance(arguments, Mapping) else vars(arguments))


def escape_cell(value: object) -> str:
    """Return a value for a cell of a Markdown table that shows it literally: markup in it is escaped."""
    if value is None:
        return "–"  # noqa: RUF001
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = re.sub(r"\r\n|[\r\n]", "⏎", text).encode("utf-8", "backslashreplace").decode("utf-8")
    # Numeric entities, because Markdown and HTML both show them as plain characters.
    return re.sub(r"[^\w\s⏎]|_", lambda match: f"&#{ord(match[0])};", text)
