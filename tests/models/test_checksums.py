"""Damaged files: a flipped bit or a cut is named, with the file, or changes nothing that is loaded."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.payloads import fsdp2_folder, lightning_file, zero_folder
from helpers.training import save_policy
from torch import Tensor

from remax_lightning.callbacks.export_policy import write_folder_atomically
from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig
from remax_lightning.models.checkpoint_reader import load_torch_file, read_weights
from remax_lightning.models.checksums import (
    MANIFEST,
    check_whole,
    compute_checksums,
    list_files,
    unchecked_files,
    write_manifest,
)
from remax_lightning.models.shard_reader import load_deepspeed_file
from remax_lightning.strategies import AtomicCheckpointIO, latest_checkpoint

FLIPS = 48
KEY = "ckpt_path"


def with_manifest(folder: Path) -> Path:
    write_manifest(folder, compute_checksums(folder, list_files(folder)))
    return folder


def save_file(path: Path, step: int = 3) -> Path:
    weights = {f"policy.{name}": torch.ones(900) for name in "abc"}
    return lightning_file(path, weights, optimizer_states=[{"exp_avg": torch.randn(900)}], global_step=step)


def load_file(path: Path) -> Any:
    return AtomicCheckpointIO().load_checkpoint(path)


def load_zero(path: Path) -> Any:
    check_whole(path, KEY)
    return {name: load_deepspeed_file(path / name) for name in list_files(path) if name.endswith(".pt")}


def load_fsdp2(path: Path) -> Any:
    check_whole(path, KEY)
    return read_weights(path, "policy."), load_torch_file(path / "meta.pt")


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "a file": (save_file, load_file),
    "ZeRO-2": (lambda path: with_manifest(zero_folder(path, 2)), load_zero),
    "ZeRO-3": (lambda path: with_manifest(zero_folder(path, 3)), load_zero),
    "FSDP2": (lambda path: with_manifest(fsdp2_folder(path)), load_fsdp2),
    "ZeRO-3 without a manifest": (lambda path: zero_folder(path, 3), load_zero),
}


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return isinstance(second, dict) and list(first) == list(second) and equal([*first.values()], [*second.values()])
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and (first == second or vars(first) == vars(second))


def write(file: Path, data: bytes) -> None:
    """Write it with a time of its own, which clocks of file systems may be too coarse for."""
    file.write_bytes(data)
    os.utime(file, ns=(0, next(TIMES)))


TIMES = itertools.count(10**18, 10**9)


def damage_in(path: Path, load: Callable[[Path], Any], whole: Any) -> str:
    """What is said of a damaged checkpoint; empty where all that is loaded is equal."""
    try:
        loaded = load(path)
    except UserError as error:
        return str(error)
    assert equal(loaded, whole)
    return ""


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_named_or_changes_nothing(kind: str, tmp_path: Path) -> None:
    save, load = KINDS[kind]
    path, generator = save(tmp_path / "a.ckpt"), random.Random(0)
    whole, named = load(path), 0
    for _ in range(FLIPS):
        file = generator.choice(sorted(files_of(path)))
        before = file.read_bytes()
        data = bytearray(before)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        write(file, data)
        message = damage_in(path, load, whole)
        named += bool(message)
        assert not message or str(file) in message or MANIFEST in message or file.name == MANIFEST
        assert "\n" not in message
        write(file, before)
    assert named > FLIPS / 3
    assert equal(load(path), whole)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "without" not in kind])
def test_a_cut_file_is_named(kind: str, tmp_path: Path) -> None:
    save, load = KINDS[kind]
    path, generator = save(tmp_path / "a.ckpt"), random.Random(1)
    for file in sorted(files_of(path)):
        before = file.read_bytes()
        for _ in range(4):
            write(file, before[: generator.randrange(len(before))])
            with pytest.raises(UserError, match=r"a\.ckpt") as error:
                load(path)
            assert file.name in str(error.value)
        write(file, before)


@pytest.mark.parametrize("kind", ["ZeRO-2", "ZeRO-3", "FSDP2"])
def test_a_missing_file_of_a_folder_is_named(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind][0](tmp_path / "a.ckpt")
    for name in list_files(path):
        (path / name).rename(tmp_path / "aside")
        with pytest.raises(UserError, match=rf"{name}' is damaged: it is missing.*give an earlier one"):
            check_whole(path, KEY)
        (tmp_path / "aside").rename(path / name)


@pytest.mark.slow(0.3)
def test_every_bit_inside_of_tensors_counts(tmp_path: Path) -> None:
    """Where torch itself notices nothing."""
    path = lightning_file(tmp_path / "a.ckpt", {"policy.a": torch.full((64,), 3.0)})
    data = path.read_bytes()
    start = data.index(torch.full((64,), 3.0).numpy().tobytes())
    for bit in range(0, 64 * 32, 37):
        damaged = bytearray(data)
        damaged[start + bit // 8] ^= 1 << bit % 8
        write(path, damaged)
        assert torch.load(path)["global_step"] == 3
        with pytest.raises(UserError, match=r"a\.ckpt' is damaged: its content has changed.*data/0.*give an earlier"):
            load_file(path)
        with pytest.raises(UserError, match=r"checkpoint: .*a\.ckpt' is damaged"):
            read_weights(path, "policy.")


@pytest.mark.parametrize("kind", ["a file", "ZeRO-3", "FSDP2"])
def test_last_falls_back_on_the_newest_whole_one(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (5, 6, 7):
        if kind == "a file":
            save_file(folder / f"{step}.ckpt", step)
            continue
        path = KINDS[kind][0](folder / f"{step}.ckpt")
        for file in (file for file in files_of(path) if file.name.endswith(("model_states.pt", "meta.pt"))):
            torch.save({**torch.load(file), "global_step": step}, file)
        with_manifest(path)
    assert latest_checkpoint([folder], tmp_path) == folder / "7.ckpt"
    ones = torch.ones(2).numpy().tobytes()
    file = next(file for file in files_of(folder / "7.ckpt") if ones in file.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.index(ones) + 1] ^= 4
    write(file, data)
    with pytest.warns(UserWarning, match=rf"{file.name}' is damaged: .*the one before it is used"):
        assert latest_checkpoint([folder], tmp_path) == folder / "6.ckpt"


def test_each_file_is_read_once(tmp_path: Path) -> None:
    path = with_manifest(zero_folder(tmp_path / "a.ckpt", 3))
    assert set(unchecked_files(path, KEY)) == set(list_files(path))
    check_whole(path, KEY)
    assert unchecked_files(path, KEY) == []
    file = path / "latest"
    file.write_text("checkpoinT")
    assert unchecked_files(path, KEY) == ["latest"]


def test_what_has_no_checksums_is_loaded(tmp_path: Path) -> None:
    old = tmp_path / "old.ckpt"
    content = {"state_dict": {}, "global_step": 1, "pytorch-lightning_version": "2.6"}
    torch.save(content, old, _use_new_zipfile_serialization=False)
    assert load_file(old)["global_step"] == 1
    for path in (zero_folder(tmp_path / "zero.ckpt", 2), fsdp2_folder(tmp_path / "fsdp.ckpt")):
        check_whole(path, KEY)
    check_whole(tmp_path / "none.ckpt", KEY)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", ""])
def test_a_manifest_names_no_file_outside(name: str, tmp_path: Path) -> None:
    path = fsdp2_folder(tmp_path / "a.ckpt")
    (path / MANIFEST).write_text(json.dumps({"files": {name: {"bytes": 1, "crc32": "00"}}}))
    with pytest.raises(UserError, match=rf"{MANIFEST}' is damaged: it lists .*no file of the folder"):
        check_whole(path, KEY)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"files": 3}', '{"files": {"a": {"bytes": "x"}}}', "[" * 9999]
)
def test_a_manifest_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    path = fsdp2_folder(tmp_path / "a.ckpt")
    (path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=rf"{MANIFEST}' is damaged: it is no list of checksums"):
        check_whole(path, KEY)


# ---- Exported models ----


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = save_policy(tmp_path_factory.mktemp("policy"))
    folder = tmp_path_factory.mktemp("export") / "last"
    write_folder_atomically(folder, lambda new: shutil.copytree(policy, new, dirs_exist_ok=True))
    return folder


def flip(file: Path, place: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 16
    write(file, data)


def test_damaged_weights_of_an_export_are_refused(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "policy")
    ModelConfig(str(folder)).load("model.policy")
    flip(folder / "model.safetensors", 0.7)
    with pytest.raises(UserError, match=r"model\.policy\.path: .*model\.safetensors' is damaged: its content has chan"):
        ModelConfig(str(folder)).load("model.policy")


def test_another_changed_file_of_an_export_is_a_warning(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "policy")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "top_k": 7}))
    with pytest.warns(UserWarning, match=r"model\.policy\.path: .*generation_config\.json differs from what was expor"):
        ModelConfig(str(folder)).load("model.policy")
    (folder / MANIFEST).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelConfig(str(folder)).load("model.policy")
