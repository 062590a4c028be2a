"""Files that run code where they are unpickled without a limit: the code leaves a mark that a test looks for."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class RunsCode:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def reaches_code(mark: Path, module: str, name: str) -> bytes:
    """A pickle that reaches `os.system` through a module that imports it, as protocol 4 allows with a dotted name."""
    short = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name, f"touch {mark}")]
    return b"\x80\x04" + short[0] + short[1] + pickle.STACK_GLOBAL + short[2] + pickle.TUPLE1 + pickle.REDUCE + b"."


def lightning_file(path: Path, weights: dict[str, torch.Tensor] | None = None, **more: Any) -> Path:
    """A checkpoint of one process."""
    content = {"state_dict": weights or {"policy.a": torch.ones(2)}, "global_step": 3, "epoch": 0, "loops": {}}
    torch.save({**content, "pytorch-lightning_version": "2.6.0", **more}, path)
    return path


def zero_folder(path: Path, stage: int, ranks: int = 2) -> Path:
    """A checkpoint of DeepSpeed ZeRO."""
    (path / "checkpoint").mkdir(parents=True)
    (path / "latest").write_text("checkpoint")
    model = {"module": {}, "global_step": 3, "dp_world_size": ranks, "ds_config": {}, "buffer_names": []}
    model["param_shapes"] = [{"policy.a": torch.Size([4])}]
    if stage < 3:
        model["module"] = {"policy.a": torch.ones(4)}
        torch.save(model, path / "checkpoint" / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        optimizer = {"fp32_flat_groups": [torch.ones(2)], "optimizer_state_dict": {"param_groups": [{"lr": 0.1}]}}
        torch.save({"optimizer_state_dict": optimizer}, path / "checkpoint" / f"{prefix}_optim_states.pt")
        if stage == 3:
            torch.save(model, path / "checkpoint" / f"{prefix}_model_states.pt")
    return path


def fsdp2_folder(path: Path, setting: Any = 0.1) -> Path:
    """A checkpoint of FSDP2; `setting` is among those of the optimizer, which are pickled into the shards."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    state = {"state_dict": {"policy.a": torch.ones(2)}, "optimizer_0": {"param_groups": {"0": {"lr": setting}}}}
    save(state, storage_writer=FileSystemWriter(path), no_dist=True)
    torch.save({"global_step": 3}, path / "meta.pt")
    return path
