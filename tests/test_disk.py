"""Disks that are full or closed: training goes on, nothing that was whole is lost, and one line says what is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.fakes import FakeModule, make_output
from callbacks.fakes import make_trainer as fake_trainer
from helpers.training import make_trainer, prompt_data, remax_module, save_policy
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from remax_lightning.callbacks import ExportPolicy, PredictionWriter, SampleDump, TensorBoardReport
from remax_lightning.errors import UserError
from remax_lightning.files import append_lines, describe_disk_error, is_disk_error
from remax_lightning.strategies import AtomicCheckpointIO, latest_checkpoint
from remax_lightning.strategies.atomic_checkpoint import save_folder_atomically

ERRORS = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"), (disk / "full").open("wb", buffering=0) as file:  # noqa: PT012
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("number", ERRORS)
def test_a_message_names_file_reason_and_space(number: int, tmp_path: Path) -> None:
    path = tmp_path / "not" / "there.jsonl"
    error = OSError(number, os.strerror(number))
    assert is_disk_error(error)
    message = describe_disk_error(error, path)
    assert message.startswith(f"cannot write {path}: {os.strerror(number)}; ")
    assert message.endswith(" are free there")
    assert "\n" not in message


def test_lines_are_appended_all_or_none(small_disk: Path) -> None:
    path = small_disk / "lines.jsonl"
    append_lines(path, ["whole \ud800\n"])
    with pytest.raises(OSError, match="No space left"):
        append_lines(path, ["x" * 1000 + "\n"] * 2000)
    assert path.read_bytes() == b"whole \\ud800\n"


def failing_at(patch: pytest.MonkeyPatch, name: str, number: int, calls: set[int]) -> None:
    """Have `torch.save` and its like fail at these calls, with half of the file written."""
    whole, count = getattr(torch, name), 0

    def save(state: Any, path: Any, *args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count in calls:
            Path(path).write_bytes(b"PK")
            raise OSError(number, os.strerror(number))
        whole(state, path, *args, **options)

    patch.setattr(torch, name, save)


@pytest.mark.slow
@pytest.mark.parametrize("number", ERRORS)
def test_a_checkpoint_that_cannot_be_written_keeps_the_old_one(
    number: int, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_at(monkeypatch, "save", number, {2, 3})
    saves, kept = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1), []

    class Watch(ModelCheckpoint):
        def on_train_batch_end(self, *args: Any, **options: Any) -> None:
            super().on_train_batch_end(*args, **options)
            kept.append(sorted(path.name for path in (tmp_path / "kept").iterdir() if path.suffix == ".ckpt"))

    saves.__class__ = Watch
    trainer = make_trainer(tmp_path, [saves], max_steps=4, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=rf"step=2\.ckpt was not saved: .*{os.strerror(number)}; .* are free there"):
        trainer.fit(remax_module(policy), prompt_data(tmp_path, policy))
    assert kept == [["step=1.ckpt"], ["step=1.ckpt"], ["step=1.ckpt"], ["step=4.ckpt"]]
    assert torch.load(tmp_path / "kept" / "step=4.ckpt", weights_only=True)["global_step"] == 4
    assert not list((tmp_path / "kept").glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("save_last", ["link", True])
def test_last_is_the_one_before_where_a_save_fails(
    save_last: Any, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, steps = tmp_path / "kept", []
    failing_at(monkeypatch, "save", errno.ENOSPC, {2} if save_last == "link" else {3, 4})

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if (folder / "last.ckpt").exists():
                steps.append(torch.load(folder / "last.ckpt", weights_only=True)["global_step"])

    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last=save_last)
    trainer = make_trainer(tmp_path, [saves, Watch()], max_steps=4, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"\.ckpt was not saved"):
        trainer.fit(remax_module(policy), prompt_data(tmp_path, policy))
    assert steps == [1, 1, 3]
    assert latest_checkpoint([folder], tmp_path) is not None


@pytest.mark.slow
def test_a_link_that_cannot_be_made_is_a_warning(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(shutil, "copy", refuse)
    saves = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_last="link")
    trainer = make_trainer(tmp_path, [saves], max_steps=2, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"cannot write .*last\.ckpt: .*The checkpoint itself was saved"):
        trainer.fit(remax_module(policy), prompt_data(tmp_path, policy))
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["step=2.ckpt"]


@pytest.mark.slow
def test_a_folder_that_was_removed_during_the_run_is_made_again(policy: str, tmp_path: Path) -> None:
    class Remove(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                shutil.rmtree(tmp_path / "run")

    saves = ModelCheckpoint(None, "{step}", every_n_train_steps=1)
    callbacks = [SampleDump(every_n_steps=1), ExportPolicy(best=False), Remove(), saves]
    logger = CSVLogger(tmp_path, "run", version="", flush_logs_every_n_steps=1)
    trainer = make_trainer(tmp_path, callbacks, logger=logger, max_steps=4, enable_checkpointing=True)
    trainer.fit(remax_module(policy), prompt_data(tmp_path, policy))
    names = {path.name for path in (tmp_path / "run").rglob("*")}
    assert {"step=4.ckpt", "train.jsonl", "model.safetensors"} <= names


def test_a_checkpoint_may_have_the_longest_name_that_there_is(tmp_path: Path) -> None:
    name = "é" * 125 + ".ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("number", ERRORS)
def test_an_old_checkpoint_that_cannot_be_removed_stays(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "old.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "rename", refuse)
    for name in ("old.ckpt", "folder.ckpt"):
        with pytest.warns(UserWarning, match=rf"old checkpoint .*{name} stays, because it cannot be removed"):
            io.remove_checkpoint(tmp_path / name)


def test_a_real_full_disk_keeps_the_checkpoint(small_disk: Path) -> None:
    io, target = AtomicCheckpointIO(), small_disk / "last.ckpt"
    io.save_checkpoint({"step": 1}, target)
    with pytest.warns(UserWarning, match=r"last\.ckpt was not saved: cannot write .*of 1.05 MB are free"):
        io.save_checkpoint({"step": 2, "weights": torch.zeros(1_000_000)}, target)
    assert torch.load(target) == {"step": 1}
    assert [path.name for path in small_disk.iterdir()] == ["last.ckpt"]
    io.save_checkpoint({"step": 3}, target)
    assert torch.load(target) == {"step": 3}


def test_a_folder_of_parts_is_kept_whole(tmp_path: Path) -> None:
    strategy, target = SingleDeviceStrategy("cpu"), tmp_path / "a.ckpt"
    strategy.checkpoint_io = io = AtomicCheckpointIO()
    for version in (1, 2, 3):

        def write(path: Path, version: int = version) -> None:
            (path / "part").write_text(str(version))
            if version == 2:
                raise OSError(errno.ENOSPC, "No space left on device")

        save_folder_atomically(strategy, target, write)
        io.remove_checkpoint(tmp_path / "b.ckpt")
        assert (target / "part").read_text() == {1: "1", 2: "1", 3: "3"}[version]
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_full_disk_ends_neither_samples_nor_logs_nor_the_run(kind: Any, policy: str, tmp_path: Path, small_disk: Path,
    capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    class Filling(SampleDump):
        def on_train_start(self, *args: Any) -> None:
            super().on_train_start(*args)
            fill(small_disk)

    callbacks = [Filling(every_n_steps=1), TensorBoardReport(every_n_steps=1)]
    trainer = make_trainer(tmp_path, callbacks, logger=kind(small_disk, "mine"), max_steps=5)
    with pytest.warns(UserWarning, match=r"cannot write .*train\.jsonl: No space left on device; 0 bytes of") as warned:
        trainer.fit(remax_module(policy), prompt_data(tmp_path, policy))
    assert trainer.global_step == 5
    about_samples = [item for item in warned if "train.jsonl" in str(item.message)]
    assert len(about_samples) == 1
    assert "Traceback" not in capfd.readouterr().err


class Predictor(FakeModule):
    """Predicts three batches of a row, and changes the disk before the second and the third."""

    def __init__(self, before: Any) -> None:
        super().__init__([])
        self.before = before

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.before(batch_idx)
        return [{"row": batch_idx, "text": "x" * 5000}]  # more than a block of the disk

    def predict_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(range(3), batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("gets_room", [True, False])
def test_predictions_wait_until_there_is_room_again(gets_room: bool, tmp_path: Path, small_disk: Path) -> None:
    path = small_disk / "predictions.jsonl"

    def before(batch: int) -> None:
        if batch == 1:
            fill(small_disk)
        if batch == 2 and gets_room:
            (small_disk / "full").unlink()

    trainer = fake_trainer(tmp_path, [PredictionWriter(str(path))], logger=False)
    module = Predictor(before)
    if gets_room:
        with pytest.warns(UserWarning, match="Predictions are kept in memory and tried again"):
            trainer.predict(module, return_predictions=False)
        assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2]
    else:
        with pytest.raises(UserError, match="2 predictions could not be written"):
            trainer.predict(module, return_predictions=False)


def test_predictions_that_cannot_be_written_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trainer = fake_trainer(tmp_path, [PredictionWriter(str(tmp_path / "file" / "mine.jsonl"))], logger=False)
    with pytest.raises(UserError, match=r"predictions\.path: cannot write .*mine\.jsonl.*give another path"):
        trainer.predict(Predictor(lambda _: pytest.fail("the model ran")), return_predictions=False)


# ---- What a kill left undone ----


@pytest.mark.slow
def test_the_final_export_is_made_by_the_run_that_resumes(policy: str, tmp_path: Path) -> None:
    class Killed(BaseException): ...

    class KilledInExport(ExportPolicy):
        def _export(self, *_: Any) -> None:
            raise Killed

    def fit(export: ExportPolicy, **options: Any) -> None:
        saves = ModelCheckpoint(tmp_path / "saves", "{step}", every_n_train_steps=1)
        trainer = make_trainer(tmp_path, [export, saves], max_steps=2, enable_checkpointing=True)
        trainer.fit(remax_module(policy), prompt_data(tmp_path, policy), **options)

    with pytest.raises(Killed):
        fit(KilledInExport(best=False))
    assert not list(tmp_path.rglob("model.safetensors"))
    checkpoint = tmp_path / "saves" / "step=2.ckpt"
    fit(ExportPolicy(best=False), ckpt_path=checkpoint)
    from safetensors.torch import load_file

    (file,) = tmp_path.rglob("last/model.safetensors")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in load_file(file).items():
        assert torch.equal(value, saved[f"policy.{name}"])


def test_samples_that_were_cut_inside_a_character_are_resumed(tmp_path: Path) -> None:
    from callbacks.fakes import checkpoint_at

    def run(**arguments: Any) -> None:
        callbacks = [SampleDump(every_n_steps=1, num_samples=1), checkpoint_at(2, tmp_path)]
        fake_trainer(tmp_path, callbacks).fit(FakeModule([make_output(i) for i in range(4)]), **arguments)

    run()
    path = tmp_path / "logs" / "samples" / "train.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + '{"step": 5, "response": "é'.encode()[:-1])
    run(ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_other_rows_at_resume_are_noticed(policy: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def fit(prompts: list[str], **options: Any) -> list[str]:
        saves = ModelCheckpoint(tmp_path / "saves", "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(tmp_path, [saves], max_steps=2, enable_checkpointing=True)
        recwarn.clear()
        trainer.fit(remax_module(policy), prompt_data(tmp_path, policy, prompts), **options)
        return [str(item.message) for item in recwarn if "rows of the checkpoint" in str(item.message)]

    checkpoint = tmp_path / "saves" / "step=1.ckpt"
    assert fit(["1+1=", "2+2="]) == []
    assert fit(["1+1=", "2+2="], ckpt_path=checkpoint) == []
    (warning,) = fit(["1+1=", "2+3="], ckpt_path=checkpoint)
    assert "data.path" in warning
    assert "prompts.jsonl" in warning


def test_a_failed_write_of_safetensors_is_the_disks(tmp_path: Path) -> None:
    """Its writer has an exception that is no OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with pytest.raises(SafetensorError) as failed:
        save_file({"weight": torch.zeros(2)}, tmp_path / "nowhere" / "model.safetensors")
    assert is_disk_error(failed.value)
    assert not is_disk_error(SafetensorError("invalid header"))
