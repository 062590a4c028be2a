"""What a checkpoint needs beyond weights: an unfinished rollout, and a place in the loops that resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer

from remax_lightning.distributed import gather_objects
from remax_lightning.errors import UserError


def gather_rank_states(state: dict[str, Any] | None) -> list[dict[str, Any] | None]:
    """Return the state of every rank, on the CPU: strategies save what rank 0 has. Every rank has to call this."""
    return gather_objects(move_data_to_device(state, torch.device("cpu")))


def checkpoint_folders(trainer: Trainer) -> set[Path]:
    """Return the local folders of this run's checkpoints and of the one that it was resumed from."""
    folders = [getattr(item, "dirpath", None) for item in trainer.checkpoint_callbacks]
    if trainer.ckpt_path is not None:
        folders.append(str(Path(trainer.ckpt_path).parent))
    return {Path(item) for item in folders if item is not None and "://" not in str(item)}


def previous_checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Return the folders where this run saves, and where runs before it with the same logger have saved.

    A run with a logger has a folder of its own, a version, unless the configuration says where checkpoints go.
    """
    root, folders = Path(trainer.default_root_dir), []
    for callback in trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        if folder is not None:
            folders.append(Path(folder))
        elif trainer.logger is None:
            folders.append(root / "checkpoints")
        else:
            runs = Path(trainer.logger.save_dir or root) / str(trainer.logger.name)
            folders.extend(runs.glob("*/checkpoints"))
    return folders


def select_rank_state(states: list[dict[str, Any] | None] | None, trainer: Trainer) -> Any:
    """Return what `gather_rank_states` took from this rank, on its device.

    Raises:
        UserError: if a rollout was half used when the checkpoint was saved, by another number of processes.
    """
    if not states or not any(states):  # None in a checkpoint of 0.1.0
        return None
    if len(states) != trainer.world_size:
        raise UserError(
            f"trainer.devices x num_nodes must be {len(states)}, got {trainer.world_size}: the checkpoint"
            " holds a rollout that is half used; resume with as many processes, or from one between two rollouts"
        )
    return move_data_to_device(states[trainer.global_rank], trainer.strategy.root_device)


def resume_after_last_batch(checkpoint: dict[str, Any]) -> None:
    """Make the loops of a checkpoint say that it was saved at the end of a training batch, whenever it was.

    That is the one place which Lightning 2.6 resumes exactly. From a checkpoint of the end of an epoch or of a
    validation, as its `ModelCheckpoint` saves by default, it counts an epoch too many or trains a batch too many in the
    old epoch, and every later epoch comes in another order. The data position is the loader's own, so nothing is lost.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    batches, epochs = loops.get("epoch_loop.batch_progress"), loops.get("epoch_progress")
    if batches is None or epochs is None:
        return
    now = batches["current"]
    if not 0 < now["ready"] == now["started"] == now["processed"]:
        return  # inside a batch, or before the first
    for part in ("total", "current"):
        batches[part]["completed"] = batches[part]["processed"] - 1
        epochs[part]["processed"] = epochs[part]["completed"] = epochs[part]["started"] - 1
