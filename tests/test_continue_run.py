"""A resumed fit goes on in the folder of its run, with the same version or id in every logger."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.training import make_trainer, prompt_data, remax_module, save_policy
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from remax_lightning.callbacks import ExportPolicy, SampleDump
from remax_lightning.errors import UserError
from remax_lightning.models.checkpoint_reader import inspect_checkpoint
from remax_lightning.run_folder import FolderLock, continue_run, folder_of_checkpoint, run_folder

STEPS = (1, 2)
"""Optimizer steps of the run that is resumed; its checkpoint is of the first."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


LOGGERS: dict[str, Any] = {
    "none": lambda folder: False,
    "tensorboard": lambda folder: TensorBoardLogger(folder / "logs", "mine"),
    "csv": lambda folder: CSVLogger(folder / "logs", "mine"),
    "csv and tensorboard": lambda folder: [
        CSVLogger(folder / "logs", "mine"),
        TensorBoardLogger(folder / "tb", "mine"),
    ],
}


def fit(folder: Path, policy: str, logger: Any, steps: int, checkpoint: Path | None = None, **options: Any) -> Any:
    """Train up to `steps` steps, from a checkpoint as the command does it; return the trainer and what it said."""
    saves = ModelCheckpoint(options.pop("dirpath", None), "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [saves, ExportPolicy(best=False), SampleDump(every_n_steps=1, num_samples=1)]
    trainer = make_trainer(folder, callbacks, logger=logger, enable_checkpointing=True, max_steps=steps, **options)
    reason = None
    if checkpoint is not None:
        info = inspect_checkpoint(checkpoint)
        earlier = folder_of_checkpoint(checkpoint, info.run_folder)
        assert earlier is not None
        reason = continue_run(trainer, earlier, info.step)
    trainer.fit(
        remax_module(policy), prompt_data(folder, policy, batch_size=2), ckpt_path=checkpoint, weights_only=True
    )
    return trainer, reason


def sample_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "samples" / "train.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGGERS)
def test_a_resumed_fit_is_the_same_run(name: str, policy: str, tmp_path: Path) -> None:
    first, _ = fit(tmp_path, policy, LOGGERS[name](tmp_path), STEPS[-1])
    folder = run_folder(first)
    checkpoint = folder / "checkpoints" / "step=1.ckpt"
    (folder / "checkpoints" / "step=2.ckpt").unlink()  # it was killed before that was saved
    second, reason = fit(tmp_path, policy, LOGGERS[name](tmp_path), 3, checkpoint)
    assert (reason, run_folder(second)) == (None, folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name] or name == "none"
    assert sample_steps(folder) == [1, 2, 3]
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
    if "csv" in name:
        with (folder / "metrics.csv").open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row["train/reward"]]
        assert [row["step"] for row in rows] == ["1", "2", "3"]
        assert all(row["train/kl" if "train/kl" in row else "train/entropy"] for row in rows)
    if "tensorboard" in name:
        logs = Path(second.loggers[-1].log_dir)
        assert logs == Path(first.loggers[-1].log_dir)
        assert len(list(logs.glob("events.*"))) == 2
        events = EventAccumulator(str(logs), purge_orphaned_data=True).Reload()
        assert [event.step for event in events.Scalars("train/reward")] == [1, 2, 3]


@pytest.mark.slow
def test_a_service_is_told_its_id_and_other_loggers_theirs(policy: str, tmp_path: Path) -> None:
    """The second logger of a run has a version that the folder does not say."""
    TensorBoardLogger(tmp_path / "tb", "mine", version=0).log_metrics({"another": 1.0}, 0)  # takes version_0
    first, _ = fit(
        tmp_path, policy, [CSVLogger(tmp_path / "logs", "mine"), TensorBoardLogger(tmp_path / "tb", "mine")], 1
    )
    assert first.loggers[1].log_dir.endswith("version_1")
    again = [CSVLogger(tmp_path / "logs", "mine"), TensorBoardLogger(tmp_path / "tb", "mine")]
    second, _ = fit(tmp_path, policy, again, 2, run_folder(first) / "checkpoints" / "step=1.ckpt")
    assert [logger.log_dir for logger in second.loggers] == [logger.log_dir for logger in first.loggers]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["name", "save_dir", "version"])
def test_another_name_folder_or_version_is_a_new_run(change: str, policy: str, tmp_path: Path) -> None:
    first, _ = fit(tmp_path, policy, TensorBoardLogger(tmp_path / "logs", "mine"), 1)
    options = {"save_dir": tmp_path / "logs", "name": "mine"}
    options[change] = {"name": "other", "save_dir": tmp_path / "other", "version": "other"}[change]
    before = {path: path.read_bytes() for path in run_folder(first).rglob("*") if path.is_file()}
    checkpoint = run_folder(first) / "checkpoints" / "step=1.ckpt"
    second, reason = fit(tmp_path, policy, TensorBoardLogger(**options), 2, checkpoint)
    assert reason is not None
    assert run_folder(second) != run_folder(first)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.slow
def test_a_checkpoint_elsewhere_names_the_folder_of_its_run(policy: str, tmp_path: Path) -> None:
    chosen = {"dirpath": tmp_path / "saves"}
    first, _ = fit(tmp_path, policy, TensorBoardLogger(tmp_path / "logs", "mine"), 1, **chosen)
    checkpoint = tmp_path / "saves" / "step=1.ckpt"
    second, reason = fit(tmp_path, policy, TensorBoardLogger(tmp_path / "logs", "mine"), 2, checkpoint, **chosen)
    assert (reason, run_folder(second)) == (None, run_folder(first))
    (run_folder(first) / "run.json").unlink()  # such as a folder that has been cleared away
    assert folder_of_checkpoint(checkpoint, inspect_checkpoint(checkpoint).run_folder) is None


@pytest.mark.slow(0.3)
def test_a_live_run_is_left_alone(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = fit(tmp_path, policy, CSVLogger(tmp_path / "logs", "mine"), 1)
    before = (run_folder(first) / "metrics.csv").read_bytes()

    def refuse(self: FolderLock, key: str) -> int:
        raise UserError(f"{key} is taken")

    monkeypatch.setattr(FolderLock, "_open", refuse)
    with pytest.raises(UserError, match="the folder of the run is taken"):
        fit(
            tmp_path, policy, CSVLogger(tmp_path / "logs", "mine"), 2, run_folder(first) / "checkpoints" / "step=1.ckpt"
        )
    assert (run_folder(first) / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"loggers": 1}', '{"loggers": [1, {"class": 2}]}'])
def test_a_record_that_cannot_be_read_leaves_the_name_of_the_folder(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "mine" / "version_3"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content)
    logger = TensorBoardLogger(tmp_path / "logs", "mine")
    assert continue_run(make_trainer(tmp_path, logger=logger), folder, 1) is None
    assert Path(logger.log_dir) == folder
