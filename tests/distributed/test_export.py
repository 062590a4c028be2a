"""`remax export` gives back the weights in training, bit by bit, whatever wrote the checkpoint."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.export import PRECISIONS, STRATEGIES, main, train_on_three
from helpers.cli import Outcome, remax
from helpers.ranks import launch
from helpers.training import save_policy
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    for family in PRECISIONS:
        save_policy(folder / family, family)
    return folder


@cache
def run_of(strategy: str, family: str, folder: Path) -> Path:
    """The folder of a run on two ranks."""
    launch(main, strategy, family, folder)
    return folder / f"{strategy}-{family}"


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of which no part of a tensor is as long as the last; some of the policy is frozen, and cut up apart."""
    folder = tmp_path_factory.mktemp("three")
    save_policy(folder / "opt", "opt")
    launch(train_on_three, folder, ranks=3, fresh="no other test has three ranks")
    return folder


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step=2.ckpt"


def is_policy(out: Path, run: Path) -> None:
    """Check `out` against the weights of the run's end, and file by file against what its callback exported."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before, after = torch.load(run / "weights.pt", weights_only=True)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    exported = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert exported.keys() == after.keys()
    for name, value in after.items():
        assert exported[name].dtype == value.dtype
        assert torch.equal(exported[name], value), name
    ours, callbacks = load_file(out / "model.safetensors"), load_file(run / "export" / "last" / "model.safetensors")
    assert ours.keys() == callbacks.keys()
    assert ("lm_head.weight" in ours) is ("llama" in run.name)  # tied weights are saved once
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_text() == (run / "export" / "last" / name).read_text()
    assert AutoTokenizer.from_pretrained(out)("1+1=").input_ids


@pytest.mark.parametrize("family", PRECISIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_folder_has_the_weights_of_the_run(
    strategy: str, family: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    run = run_of(strategy, family, folder)
    outcome = remax(capsys, "export", str(checkpoint(run)), str(tmp_path / "out"))
    assert outcome.code == 0, outcome.err
    assert f"Exported the policy of {checkpoint(run)}" in outcome.out
    is_policy(tmp_path / "out", run)


def test_parts_of_unequal_length_are_put_together(three_ranks: Path, tmp_path: Path, capsys: Any) -> None:
    run = three_ranks / "zero3-opt"
    before, after = torch.load(run / "weights.pt", weights_only=True)
    frozen = [name for name in after if ".layers.0." in name]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert remax(capsys, "export", str(checkpoint(run)), str(tmp_path / "out")).code == 0
    is_policy(tmp_path / "out", run)


def broken(
    strategy: str, folder: Path, tmp_path: Path, capsys: Any, pattern: str, keep: float | None, is_old: bool = False
) -> Outcome:
    """Export a checkpoint of which one file is cut to a part, or is not there; an old one has no checksums."""
    run = tmp_path / "run"
    shutil.copytree(run_of(strategy, "llama", folder), run)
    path = checkpoint(run)
    if is_old and path.is_dir():
        (path / "checksums.json").unlink()
    [file] = [path] if path.is_file() else path.glob(pattern)
    if keep is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    outcome = remax(capsys, "export", str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    return outcome


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("keep", [None, 0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    ("strategy", "pattern"),
    [
        ("zero2", "*/mp_rank_00_model_states.pt"),
        ("zero3", "*/*zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("zero3", "*/*zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("fsdp2", "__1_0.distcp"),
        ("fsdp2", ".metadata"),
        ("fsdp2_file", ""),
    ],
)
def test_half_a_checkpoint_is_refused(
    strategy: str, pattern: str, keep: float | None, is_old: bool, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    outcome = broken(strategy, folder, tmp_path, capsys, pattern, keep, is_old)
    assert outcome.code == 2
    assert outcome.err.startswith("remax: error: checkpoint: ")
    if not pattern:
        expected = "does not exist" if keep is None else "cannot be read"
    elif is_old:
        expected = "cannot be read"
    else:
        expected = "is missing" if keep is None else f"{'' if keep else '0 bytes, '}and was written with"
    assert expected in outcome.err
