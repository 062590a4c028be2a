"""Disks that fail on one rank, and what is not finite on one rank; run by test_disks.py on two ranks."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from distributed.invariance import make_strategy
from helpers.training import PromptEngine, make_trainer, prompt_data, remax_module
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from remax_lightning.callbacks import ExportPolicy
from remax_lightning.errors import UserError
from remax_lightning.models.checkpoint_reader import inspect_checkpoint, read_weights
from remax_lightning.models.checksums import check_whole
from remax_lightning.sharding import local_shard
from remax_lightning.strategies import atomic_checkpoint

RANK = int(os.environ.get("LOCAL_RANK", "0"))
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@contextmanager
def failing(target: Any, name: str, number: int, affects: Callable[..., bool] = lambda *_: True) -> Iterator[None]:
    """Have a function of the file system fail with an error number."""
    whole = getattr(target, name)

    def call(*args: Any, **options: Any) -> Any:
        if affects(*args):
            raise OSError(number, os.strerror(number))
        return whole(*args, **options)

    with patch.object(target, name, call):
        yield


def is_file(_: Any, target: Any, *__: Any) -> bool:
    """Whether `torch.save` writes to the disk; tensors that are sent to other ranks go through it, too."""
    return isinstance(target, str | Path)


def broken_disks(strategy: str) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Where a disk fails: the rank, and what makes it so."""
    import deepspeed.runtime.engine
    from torch.distributed.checkpoint.filesystem import FileSystem

    is_new = lambda path, *_: ".tmp" in str(path)  # noqa: E731
    cases: dict[str, tuple[int, Callable[[], Any]]] = {
        "rename": (0, partial(failing, Path, "replace", errno.EDQUOT)),
        "sync": (0, partial(failing, atomic_checkpoint, "_sync", errno.EIO)),
    }
    if strategy == "ddp":  # the first rank alone writes
        return {**cases, "part": (0, partial(failing, torch, "save", errno.ENOSPC, is_file))}
    cases["folder"] = (0, partial(failing, Path, "mkdir", errno.EROFS, is_new))
    cases["reading"] = (1, partial(failing, atomic_checkpoint, "compute_checksums", errno.EIO))
    cases["manifest"] = (0, partial(failing, atomic_checkpoint, "write_manifest", errno.ENOSPC))
    if strategy == "fsdp2":
        stream = partial(failing, FileSystem, "create_stream", errno.ENOSPC)
        return {
            **cases,
            "part": (1, stream),
            "first part": (0, stream),
            "rest": (0, partial(failing, torch, "save", errno.EIO, is_file)),
        }
    cases["part"] = (1, partial(failing, torch, "save", errno.ENOSPC, is_file))
    cases["first part"] = (0, partial(failing, torch, "save", errno.EROFS, is_file))
    cases["script"] = (0, partial(failing, deepspeed.runtime.engine, "copyfile", errno.EDQUOT))
    cases["latest"] = (0, partial(failing, Path, "write_text", errno.EFBIG))
    return cases


class SecondSaveFails(Callback):
    """Breaks the disk of one rank while the second checkpoint is saved, and looks what is left after each step."""

    def __init__(self, strategy: str, folder: Path) -> None:
        self.rank, self.broken = broken_disks(strategy)["part"]
        self.folder = folder
        self.left: list[list[str]] = []
        self.stack = ExitStack()

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.left.append(sorted(path.name for path in self.folder.glob("*.ckpt")))
        self.stack.close()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2 and self.rank == RANK:
            self.stack.enter_context(self.broken())


class Attempts(Callback):
    """Saves at the end of training, on disks that fail in every way, and what is not finite; then as it should be."""

    def __init__(self, strategy: str, target: Path) -> None:
        self.strategy, self.target = strategy, target
        self.messages: dict[str, list[str]] = {}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.target)
        before = files(self.target)
        for name, (rank, broken) in broken_disks(self.strategy).items():
            with ExitStack() as stack:
                if rank == RANK:
                    stack.enter_context(broken())
                self.messages[name] = self.save(trainer)
            check_unchanged(self.target, before, name)
        for name, value in (("weight", self.weight(pl_module)), ("moment", self.moment(trainer))):
            kept = value.clone()
            if RANK == 1:
                value.view(-1)[0] = torch.nan
            self.messages[name] = self.save(trainer)
            check_unchanged(self.target, before, name)
            value.copy_(kept)
        assert self.save(trainer) == []
        torch.distributed.barrier()
        assert files(self.target) != before

    def save(self, trainer: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.save_checkpoint(self.target)
        torch.distributed.barrier()
        return [
            str(item.message) for item in caught if "not saved" in str(item.message) or "no check" in str(item.message)
        ]

    def weight(self, module: Any) -> torch.Tensor:
        """What this rank holds of a weight."""
        parameters = (local_shard(parameter.data) for parameter in module.policy.parameters())
        if self.strategy == "zero3":
            parameters = (parameter.ds_tensor.data for parameter in module.policy.parameters())
        return next(parameter for parameter in parameters if parameter.numel())

    @staticmethod
    def moment(trainer: Any) -> torch.Tensor:
        states = trainer.optimizers[0].state.values()
        values = (local_shard(state["exp_avg"]) for state in states if "exp_avg" in state)
        return next(value for value in values if value.numel())


def files(path: Path) -> dict[str, tuple[int, int]]:
    found = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    return {item.name: (item.stat().st_ino, item.stat().st_mtime_ns) for item in found}


def check_unchanged(path: Path, before: dict[str, tuple[int, int]], name: str) -> None:
    torch.distributed.barrier()
    assert files(path) == before, name
    left = [item.name for item in path.parent.glob(".*")]
    assert not left, (name, left)
    torch.distributed.barrier()


def fit(strategy: str, folder: Path, steps: int, callbacks: list[Any], checkpoint: Path | None = None) -> None:
    own = folder / f"data{RANK}"
    own.mkdir(exist_ok=True)
    data = prompt_data(own, str(folder / "policy"), batch_size=2)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    module = remax_module(str(folder / "policy"), rollout=PromptEngine(), optimizer=optimizer)
    options = {"devices": 2, "strategy": make_strategy(strategy), "max_steps": steps, "enable_checkpointing": True}
    make_trainer(folder, callbacks, **options).fit(module, data, ckpt_path=checkpoint)


def main(folder: Path, strategy: str) -> None:
    saves = ModelCheckpoint(folder / "saves", "{step}", every_n_train_steps=1)
    second, attempts = SecondSaveFails(strategy, folder / "saves"), Attempts(strategy, folder / "tried" / "a.ckpt")
    fit(strategy, folder, 3, [second, attempts, saves])
    # ---- The run went on, kept the first checkpoint, and has saved the third ----
    torch.distributed.barrier()
    if RANK == 0:  # which removes old ones; the other rank may look too early
        assert second.left == [[], ["step=1.ckpt"], ["step=1.ckpt"]]
    assert [path.name for path in (folder / "saves").iterdir()] == ["step=3.ckpt"]
    checkpoint = folder / "saves" / "step=3.ckpt"
    check_whole(checkpoint, "ckpt_path")
    assert inspect_checkpoint(checkpoint).step == 3
    for name, messages in attempts.messages.items():
        if RANK == 0:
            word = "is not finite" if name in ("weight", "moment") else "a.ckpt was not saved: cannot write"
            assert len(messages) == 1, (name, messages)
            assert word in messages[0], (name, messages)
    # ---- The export that is missing is made by the run that resumes at its end ----
    torch.distributed.barrier()
    export = ExportPolicy(str(folder / "export"), best=False)
    fit(strategy, folder, 3, [export, ModelCheckpoint(folder / "other")], checkpoint)
    if RANK == 0:
        saved = read_weights(checkpoint, "policy.")
        exported = load_file(folder / "export" / "last" / "model.safetensors")
        assert all(torch.equal(exported[name], saved[name]) for name in exported)
        assert len(exported) >= len(saved) - 1  # tied weights are exported once


def damaged(folder: Path, strategy: str) -> None:
    """A bit is flipped in a part of the checkpoint: every rank refuses it, and names the file."""
    message = ""
    try:
        fit(strategy, folder, 4, [ModelCheckpoint(folder / "other")], folder / "saves" / "step=3.ckpt")
    except UserError as error:
        message = str(error)
    assert "is damaged: its content has changed" in message, message
    assert (folder / "damaged").read_text() in message
