"""DeepSpeed's universal checkpoint: optimizer state per parameter, which any number of ranks can load."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info

from remax_lightning.distributed import barrier, broadcast
from remax_lightning.errors import UserError

FOLDER, LATEST = "universal", "latest_universal"


def saved_ranks(checkpoint: Path) -> int:
    """Return the number of ranks that saved optimizer shards; 0 if this is not a ZeRO checkpoint."""
    return len(list(checkpoint.glob("checkpoint/*zero_pp_rank_*_optim_states.pt")))


@contextmanager
def reshard(strategy: DeepSpeedStrategy, checkpoint: Path) -> Iterator[None]:
    """Let the engine load a checkpoint of another number of ranks inside; every rank has to enter and leave.

    DeepSpeed's converter writes a second copy of the checkpoint into the folder; it is deleted afterwards.

    Raises:
        UserError: if the converter fails, as it does for optimizers other than Adam and its variants.
    """
    ranks = saved_ranks(checkpoint)
    rank_zero_info(f"Converting {checkpoint}, saved by {ranks} processes, for {strategy.world_size}.")
    # ---- Rank 0 converts; all ranks raise if it fails ----
    problem = _convert(checkpoint) if strategy.is_global_zero else ""
    if problem := broadcast(strategy, problem):
        raise UserError(
            f"trainer.devices x num_nodes must be {ranks}, got {strategy.world_size}: DeepSpeed cannot reshard the"
            f" optimizer state of {str(checkpoint)!r} to another number of processes: {problem}"
        )
    # ---- Load inside; DeepSpeed must not change the settings of parameter groups ----
    engine: Any = strategy.deepspeed_engine
    saved_groups = [dict(group) for group in engine.optimizer.optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
    _repair_optimizer(engine.optimizer.optimizer, saved_groups)
    barrier(strategy, "the universal checkpoint is read")
    if strategy.is_global_zero:
        _delete_universal(checkpoint)


def _convert(checkpoint: Path) -> str:
    """Write the universal checkpoint; return an error message, empty on success."""
    _delete_universal(checkpoint)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint / "checkpoint"), "--output_folder", str(checkpoint / FOLDER)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    _delete_universal(checkpoint)
    return (result.stderr.strip() or "no message").splitlines()[-1]


def _delete_universal(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / FOLDER, ignore_errors=True)
    (checkpoint / LATEST).unlink(missing_ok=True)


def _repair_optimizer(optimizer: torch.optim.Optimizer, saved_groups: list[dict[str, Any]]) -> None:
    """Undo two errors of DeepSpeed 0.19 under ZeRO-3 with torch's optimizers and several parameter groups.

    All parameters share one step counter after loading, which each of them would increment, and every group gets the
    settings of the first group, including its weight decay.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        group["weight_decay"] = saved.get("weight_decay", 0.0)
