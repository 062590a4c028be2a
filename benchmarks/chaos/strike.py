"""A callback that acts at a phase of a run: it kills its process, or makes its disk read-only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

PHASES = (
    "data",  # rows are prepared and written to their cache
    "rollout",  # after some tokens of a response
    "reward",
    "reference",
    "backward",  # some gradients are there
    "optimizer",  # weights have moved, nothing else has
    "evaluation",
    "logging",
    "samples",  # half of a line is written
    "write",  # half of a checkpoint file is written
    "rename",  # a checkpoint is complete, and has no name yet
    "export",  # half of the exported weights are written
)


class Strike(Callback):
    """Acts once, at a phase of the optimizer step after `step` others.

    Args:
        folder: gets a file `hit` with the time.
        phase: one of `PHASES`.
        action: name of a signal, or `write TEXT PATH`, which a file system is made read-only by.
        rank: whose process acts.
        step: optimizer steps done before. Data and export have one time only.
    """

    def __init__(self, folder: str, phase: str, action: str, rank: int = 0, step: int = 2) -> None:
        self.folder, self.phase, self.action = Path(folder), phase, action
        self.rank, self.step = rank, step
        self.trainer: Any = None
        if phase == "data" and int(os.environ.get("LOCAL_RANK", "0")) == rank:
            self._strike_in_data()

    def act(self) -> None:
        """Do it, once."""
        mark = self.folder / "hit"
        if mark.exists():
            return
        mark.write_text(repr(time.time()))
        if self.action.startswith("write "):
            _, text, path = self.action.split(" ", 2)
            Path(path).write_text(text)
        else:
            os.kill(os.getpid(), signal.Signals[self.action])

    def is_due(self, phase: str, done: int = 0) -> bool:
        """Whether this is the phase, rank and step; `done` are the steps that were counted since the step began."""
        place = (phase, self.trainer.global_rank, self.trainer.global_step - done)
        return place == (self.phase, self.rank, self.step)

    def before(self, owner: Any, name: str, phase: str, done: int = 0, calls: int = 1) -> None:
        """Act before the `calls`-th call of a method within the step."""
        method, count = getattr(owner, name), 0

        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal count
            if self.is_due(phase, done):
                count += 1
                if count == calls:
                    self.act()
            return method(*args, **options)

        setattr(owner, name, wrapped)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap what the phase consists of."""
        self.trainer = trainer
        prepare: dict[str, Callable[[Any], None]] = {
            "rollout": self._strike_in_rollout,
            "reward": lambda module: self.before(module.reward, "score", "reward"),
            "reference": self._strike_in_reference,
            "backward": self._strike_in_backward,
            "optimizer": self._strike_in_optimizer,
            "logging": lambda _: self.before(trainer.logger, "log_metrics", "logging", done=1),
            "samples": self._strike_in_samples,
            "write": self._strike_in_write,
            "rename": self._strike_in_rename,
            "export": self._strike_in_export,
        }
        if self.phase in prepare and trainer.global_rank == self.rank:
            prepare[self.phase](pl_module)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        """Act within a validation, of which there is one after every epoch."""
        self.trainer = trainer
        if trainer.global_step >= self.step and not trainer.sanity_checking and self.phase == "evaluation":
            self.step = trainer.global_step
            if self.is_due("evaluation"):
                self.act()

    # ---- The phases ----

    def _strike_in_data(self) -> None:
        import pyarrow

        writer = pyarrow.ipc.RecordBatchFileWriter
        write = writer.write_batch

        def wrapped(*args: Any, **options: Any) -> None:
            write(*args, **options)
            self.act()

        writer.write_batch = wrapped

    def _strike_in_rollout(self, module: Any) -> None:
        worker, passes = module.worker, 0
        generate = worker.generate_responses

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1
            if passes == 3 and self.is_due("rollout") and self.trainer.training:
                self.act()

        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal passes
            passes = 0
            hook = module.policy.register_forward_pre_hook(count)
            try:
                return generate(*args, **options)
            finally:
                hook.remove()
                if self.is_due("rollout") and self.trainer.training:
                    self.act()  # where the engine calls something else than the policy

        worker.generate_responses = wrapped

    def _strike_in_reference(self, module: Any) -> None:
        def hook(*_: Any) -> None:
            if self.is_due("reference"):
                self.act()

        for part in module.reference.modules():
            part.register_forward_pre_hook(hook)

    def _strike_in_backward(self, module: Any) -> None:
        # The gradient of the first layer's output comes when those of the layers behind it are there. Not a hook on a
        # parameter: FSDP2 runs the backward pass on other tensors than those.
        layer = next(part for part in module.policy.modules() if type(part).__name__.endswith("DecoderLayer"))

        def strike(gradient: Any) -> Any:
            if self.is_due("backward"):
                self.act()
            return gradient

        def hook(_: Any, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(strike)

        layer.register_forward_hook(hook)

    def _strike_in_optimizer(self, module: Any) -> None:
        def hook(*_: Any) -> None:
            if self.is_due("optimizer"):
                self.act()

        for optimizer in self.trainer.optimizers:
            getattr(optimizer, "optimizer", optimizer).register_step_post_hook(hook)

    def _strike_in_samples(self, _: Any) -> None:
        from remax_lightning.callbacks import samples

        append = samples.append_lines

        def wrapped(path: Path, lines: Any) -> None:
            lines = list(lines)
            if self.is_due("samples", done=1):
                if not self.action.startswith("write "):
                    append(path, [lines[0][: len(lines[0]) // 2]])
                self.act()
                return
            append(path, lines)

        samples.append_lines = wrapped

    def _strike_in_write(self, _: Any) -> None:
        import io

        import torch

        save = torch.save

        def wrapped(state: Any, file: Any, *args: Any, **options: Any) -> None:
            # Into memory tensors go that are sent to other ranks.
            if self.is_due("write", done=1) and not isinstance(file, io.BytesIO):
                whole = io.BytesIO()
                save(state, whole)
                half = whole.getvalue()[: len(whole.getvalue()) // 2]
                Path(file).write_bytes(half) if isinstance(file, str | Path) else file.write(half)
                self.act()
                if not isinstance(file, str | Path):
                    file.seek(0)
            save(state, file, *args, **options)

        torch.save = wrapped

    def _strike_in_rename(self, _: Any) -> None:
        replace = Path.replace

        def wrapped(path: Path, target: Any) -> Any:
            if path.suffix == ".tmp" and ".ckpt" in path.name and self.is_due("rename", done=1):
                self.act()
            return replace(path, target)

        Path.replace = wrapped  # type: ignore[method-assign]

    def _strike_in_export(self, _: Any) -> None:
        from transformers import PreTrainedModel

        save = PreTrainedModel.save_pretrained

        def wrapped(model: Any, folder: Any, *args: Any, **options: Any) -> None:
            save(model, folder, *args, **options)
            file = Path(folder) / "model.safetensors"
            if not (self.folder / "hit").exists():
                whole = file.read_bytes()
                file.write_bytes(whole[: len(whole) // 2])
                self.act()
                if not self.action.startswith("write "):
                    file.write_bytes(whole)

        PreTrainedModel.save_pretrained = wrapped  # type: ignore[method-assign]
