"""Whatever a kill interrupts, what is found afterwards is a whole checkpoint: the old one or the new one."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.payloads import RunsCode
from lightning.pytorch.strategies import SingleDeviceStrategy

from remax_lightning.errors import UserError
from remax_lightning.strategies import AtomicCheckpointIO, latest_checkpoint, recover_interrupted, remove_stale
from remax_lightning.strategies import atomic_checkpoint as module

PARTS = ("mp_rank_00_model_states.pt", *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)))
"""Of a checkpoint of two ranks, as DeepSpeed names them."""


class Killed(BaseException):
    """What SIGKILL is to the code: nothing after it runs."""


class Killer:
    """Stands in for whatever changes the file system, and kills at one of these calls; None lets all pass."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at: int | None = None
        self.calls = 0
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(Path, name, self.before(getattr(Path, name)))
        patch.setattr(shutil, "rmtree", self.amid(shutil.rmtree, half_removed))
        patch.setattr(torch, "save", self.amid(torch.save, half_saved))

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.amid(function, lambda *_: None)

    def amid(self, function: Callable[..., Any], half: Callable[..., None]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                half(*args)
                raise Killed
            return function(*args, **options)

        return call


def half_removed(path: Path) -> None:
    os.remove(next(iter(path.rglob("*.pt"))))  # noqa: PTH107 - Path's own are watched


def half_saved(_: Any, path: Path) -> None:
    Path(path).write_bytes(b"PK")


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    monkeypatch.setattr(module, "_STARTED", float("inf"))  # every leftover is of an earlier process
    return Killer(monkeypatch)


def save_folder(target: Path, version: int, step: int = 0) -> None:
    content = {"version": version, "global_step": step, "dp_world_size": 2, "param_shapes": [], "module": {}}

    def write(path: Path) -> None:
        (path / "checkpoint").mkdir(exist_ok=True)
        (path / "latest").write_text("checkpoint")
        for part in PARTS:
            torch.save(content, path / "checkpoint" / part)

    module.save_folder_atomically(SingleDeviceStrategy("cpu"), target, write)


def save_file(target: Path, version: int, step: int = 0) -> None:
    content = {"version": version, "global_step": step, "state_dict": {}, "pytorch-lightning_version": "2.6"}
    AtomicCheckpointIO().save_checkpoint(content, target)


def versions(checkpoint: Path) -> set[int]:
    """The versions of its parts: one, if it is whole."""
    files = [checkpoint / "checkpoint" / part for part in PARTS] if checkpoint.is_dir() else [checkpoint]
    return {torch.load(file)["version"] for file in files}


def begin(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder / "last.ckpt"


KINDS = {"folder": save_folder, "file": save_file}


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", [*KINDS, "link", "nothing"])
def test_a_kill_during_a_save_leaves_a_whole_checkpoint(
    before: str, after: str, killer: Killer, tmp_path: Path
) -> None:
    folder, kills = tmp_path / "checkpoints", 0
    while True:
        target = begin(folder)
        if before == "link":
            save_folder(folder / "step=1.ckpt", 1)
            target.symlink_to("step=1.ckpt")
        elif before != "nothing":
            KINDS[before](target, 1)
        killer.at, killer.calls, kills = kills + 1, 0, kills + 1
        try:
            KINDS[after](target, 2)
        except Killed:
            killer.at = None
        else:
            break
        found = latest_checkpoint([folder], tmp_path)
        assert (found is None and before == "nothing") or versions(found or folder) in ({1}, {2})
        if target.exists() and kills % 2:  # a run that removes it must not bring half of the older one back
            AtomicCheckpointIO().remove_checkpoint(target)
            left = latest_checkpoint([folder], tmp_path)
            assert left is None or versions(left) in ({1}, {2})
        remove_stale(folder)
        KINDS[after](target, 3)  # the run that comes next
        assert versions(target) == {3}
        assert {path.name for path in folder.iterdir()} <= {"last.ckpt", "step=1.ckpt"}
    killer.at = None
    assert versions(target) == {2}
    assert kills > 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_during_a_removal_leaves_no_half_of_a_checkpoint(kind: str, killer: Killer, tmp_path: Path) -> None:
    folder, kills = tmp_path / "checkpoints", 0
    while True:
        begin(folder)
        old, new = folder / "step=1.ckpt", folder / "step=2.ckpt"
        KINDS[kind](new, 2)
        KINDS[kind](old, 1, step=9)  # later, so that it would be taken if anything of it could be
        killer.at, killer.calls, kills = kills + 1, 0, kills + 1
        try:
            AtomicCheckpointIO().remove_checkpoint(old)
        except Killed:
            killer.at = None
        else:
            break
        assert versions(latest_checkpoint([folder], tmp_path) or folder) in ({1}, {2})
        remove_stale(folder)
        assert not list(folder.glob(".*"))
    killer.at = None
    assert not old.exists()
    assert versions(new) == {2}


def test_the_one_with_the_most_steps_is_found_whatever_its_name_and_time(tmp_path: Path) -> None:
    first, second = tmp_path / "version_0", tmp_path / "version_1"
    for step, target in ((10, first / "last.ckpt"), (20, second / "epoch=0-step=2.ckpt"), (30, first / "a.ckpt")):
        save_file(target, step, step)
        os.utime(target, (time.time() - 10 * step,) * 2)  # as a copy may leave them
    (second / "dangling.ckpt").symlink_to("removed.ckpt")
    (second / "notes.txt").touch()
    assert latest_checkpoint([first, second], tmp_path) == first / "a.ckpt"
    assert latest_checkpoint([second], tmp_path) == second / "epoch=0-step=2.ckpt"
    assert latest_checkpoint([tmp_path / "none"], tmp_path) is None
    save_folder(tmp_path / "hpc_ckpt_1.ckpt", 1, step=31)
    assert latest_checkpoint([first, second], tmp_path) == tmp_path / "hpc_ckpt_1.ckpt"
    save_file(second / "again.ckpt", 2, step=31)  # of two with the same steps, the later one
    os.utime(second / "again.ckpt", (time.time() + 10,) * 2)
    assert latest_checkpoint([first, second], tmp_path) == second / "again.ckpt"


def cut(path: Path) -> None:
    file = path if path.is_file() else path / "checkpoint" / PARTS[1]
    file.write_bytes(file.read_bytes()[:-50])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [cut, "empty", "foreign"])
def test_what_is_not_whole_is_left_out_with_a_warning(damage: Any, kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "whole.ckpt", 1, step=1)
    broken = tmp_path / "broken.ckpt"
    KINDS[kind](broken, 2, step=2)
    if damage == "empty":
        module._delete(broken)
        broken.mkdir() if kind == "folder" else broken.touch()
    elif damage == "foreign":
        module._delete(broken)
        torch.save({"weight": torch.ones(2)}, broken)
    else:
        damage(broken)
    with pytest.warns(UserWarning, match=r"broken\.ckpt.*left out"):
        assert latest_checkpoint([tmp_path], tmp_path) == tmp_path / "whole.ckpt"


def test_what_another_run_is_writing_is_left_alone(tmp_path: Path) -> None:
    writing = tmp_path / ".step=1.ckpt.0a1b2c3d.tmp"
    writing.mkdir(parents=True)
    remove_stale(tmp_path)
    assert writing.exists()
    os.utime(writing, (0, 0))
    remove_stale(tmp_path)
    assert not writing.exists()


def test_settling_a_folder_that_is_not_there_or_in_order_changes_nothing(tmp_path: Path) -> None:
    recover_interrupted(tmp_path / "none")
    save_folder(tmp_path / "a.ckpt", 1)
    recover_interrupted(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_folder(tmp_path / "a.ckpt", 1)

    def write(_: Path) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        module.save_folder_atomically(SingleDeviceStrategy("cpu"), tmp_path / "a.ckpt", write)
    assert versions(tmp_path / "a.ckpt") == {1}


def test_a_folder_is_not_read_as_a_file(tmp_path: Path) -> None:
    save_folder(tmp_path / "a.ckpt", 1)
    with pytest.raises(UserError, match="is a folder of DeepSpeed or FSDP2"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("address", ["http://host/a.ckpt", "https://host/a.ckpt", "simplecache::https://host/a.ckpt"])
def test_an_address_of_the_web_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=rf"ckpt_path: '{address}' is an address; download it"):
        AtomicCheckpointIO().load_checkpoint(address)


def test_a_remote_file_is_read_without_its_code(tmp_path: Path) -> None:
    """Through fsspec, as from a bucket."""
    import fsspec

    proof = tmp_path / "proof"
    files = fsspec.filesystem("memory")
    save_file(tmp_path / "good.ckpt", 3)
    files.pipe("/good.ckpt", (tmp_path / "good.ckpt").read_bytes())
    assert AtomicCheckpointIO().load_checkpoint("memory://good.ckpt")["version"] == 3
    torch.save({"state_dict": RunsCode(proof)}, tmp_path / "evil.ckpt")
    files.pipe("/evil.ckpt", (tmp_path / "evil.ckpt").read_bytes())
    with pytest.raises(UserError, match=r"ckpt_path: 'memory://evil.ckpt': the file holds code \(posix.system\)"):
        AtomicCheckpointIO().load_checkpoint("memory://evil.ckpt", weights_only=False)
    with pytest.raises(UserError, match=r"memory://none\.ckpt' cannot be read"):
        AtomicCheckpointIO().load_checkpoint("memory://none.ckpt")
    assert not proof.exists()


def test_code_in_a_file_is_not_run_whatever_is_asked_for(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    torch.save({"state_dict": {}, "callbacks": RunsCode(proof)}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a.ckpt': the file holds code \(posix.system\), which is not run"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert not proof.exists()
