"""Strategies that load checkpoints by code of their own, such as Lightning's: no code in a checkpoint runs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.payloads import RunsCode, fsdp2_folder, lightning_file, zero_folder
from helpers.ranks import launch
from helpers.training import PROMPTS, make_trainer, prompt_data, remax_module, save_policy
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from remax_lightning.errors import UserError
from remax_lightning.strategies import ReMaxDeepSpeedStrategy


class LoadsAnything(SingleDeviceStrategy):
    """A user's own strategy, which unpickles what it is given."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(checkpoint_path, weights_only=False)


class DeepSpeedOnCPU(ReMaxDeepSpeedStrategy):
    """Lightning's way to load under DeepSpeed, which it lets run on CUDA only."""

    load_checkpoint = DeepSpeedStrategy.load_checkpoint


class FSDPOnCPU(FSDPStrategy):
    """Lightning refuses the class itself on a CPU, and torch to shard there."""

    def _setup_model(self, model: Any) -> Any:
        return model


STRATEGIES: dict[str, Callable[[], Any]] = {
    "deepspeed": lambda: DeepSpeedOnCPU(stage=2),
    "fsdp": FSDPOnCPU,
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
}
PAYLOADS: dict[str, Callable[[Path, Path], Any]] = {
    "file": lambda path, mark: lightning_file(path, callbacks=RunsCode(mark)),
    "zero": lambda path, mark: torch.save(RunsCode(mark), zero_folder(path, 2, 1) / "checkpoint" / "more.pt"),
    "zero model": lambda path, mark: torch.save(
        {"module": RunsCode(mark)}, zero_folder(path, 2, 1) / "checkpoint" / "mp_rank_00_model_states.pt"
    ),
    "table": lambda path, mark: (fsdp2_folder(path) / ".metadata").write_bytes(pickle.dumps(RunsCode(mark))),
    "meta": lambda path, mark: torch.save({"a": RunsCode(mark)}, fsdp2_folder(path) / "meta.pt"),
}


def load(folder: Path, policy: str, strategy: Any, payload: str) -> None:
    """Resume a run from a checkpoint with code, and check that it was refused and not run."""
    folder.mkdir(parents=True)
    mark, checkpoint = folder / "mark", folder / "a.ckpt"
    PAYLOADS[payload](checkpoint, mark)
    trainer = make_trainer(folder, [], max_steps=1, strategy=strategy)
    data = prompt_data(folder, policy, PROMPTS[:4], batch_size=4)
    with pytest.raises(UserError, match=r"ckpt_path: .* holds code \("):
        trainer.fit(remax_module(policy), data, ckpt_path=checkpoint)
    assert not mark.exists()


def load_all(folder: Path, policy: str, strategy: str) -> None:
    for payload in PAYLOADS:
        load(folder / payload, policy, STRATEGIES[strategy](), payload)


def test_a_strategy_of_the_users_own_gets_no_code_to_load(tmp_path: Path, policy_path: Path) -> None:
    load(tmp_path / "run", str(policy_path), LoadsAnything(torch.device("cpu")), "file")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lightnings_own_get_none(strategy: str, tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy", "llama")
    launch(load_all, tmp_path / "runs", policy, strategy, ranks=1, fresh="no other test has one rank")
