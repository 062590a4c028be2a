"""State of a checkpoint beyond weights: unfinished rollouts, and loop positions that resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer

from remax_lightning.distributed import gather_objects
from remax_lightning.errors import UserError


def gather_rank_states(state: dict[str, Any] | None) -> list[dict[str, Any] | None]:
    """Return the states of all ranks on the CPU, because strategies save that of rank 0. A collective."""
    return gather_objects(move_data_to_device(state, torch.device("cpu")))


def checkpoint_folders(trainer: Trainer) -> set[Path]:
    """Return the local checkpoint folders of this run, and that of the checkpoint it resumed from."""
    folders = [getattr(item, "dirpath", None) for item in trainer.checkpoint_callbacks]
    if trainer.ckpt_path is not None:
        folders.append(str(Path(trainer.ckpt_path).parent))
    return {Path(item) for item in folders if item is not None and "://" not in str(item)}


def select_rank_state(states: list[dict[str, Any] | None] | None, trainer: Trainer) -> Any:
    """Return the state of this rank from `gather_rank_states`, on its device.

    Raises:
        UserError: if the checkpoint holds an unfinished rollout of another number of processes.
    """
    if not states or not any(states):  # None in a checkpoint of 0.1.0
        return None
    if len(states) != trainer.world_size:
        raise UserError(
            f"trainer.devices x num_nodes must be {len(states)}, got {trainer.world_size}: the checkpoint"
            " holds an unfinished rollout; resume with as many processes, or from a checkpoint between two rollouts"
        )
    return move_data_to_device(states[trainer.global_rank], trainer.strategy.root_device)


def resume_after_last_batch(checkpoint: dict[str, Any]) -> None:
    """Change the loop state of a checkpoint to that of the end of a training batch.

    Lightning 2.6 resumes exactly only from there. From a checkpoint at the end of an epoch or of a validation, which
    `ModelCheckpoint` saves by default, it counts one epoch too many or trains one batch too many in the old epoch, and
    later epochs have another order. The data loader saves its own position, so nothing is lost.
    """
    # ---- Only a checkpoint of a running fit, saved between two batches, is changed ----
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
