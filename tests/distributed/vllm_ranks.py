"""Training on two ranks that share a vLLM server; run by test_vllm.py, in whose process the server is."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.invariance import Keep, make_strategy
from helpers.training import PROMPTS, CharacterReward, make_trainer, prompt_data, remax_module

from remax_lightning.config import LossConfig, MismatchConfig
from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig
from remax_lightning.rollout import ProofConfig, VLLMEngine

STEPS = 3


def train(url: str, policy: str, folder: Path, strategy: str, ahead: int = 0, transfer: Any = "files") -> None:
    """Train for some steps; rank 0 writes the weights at the end and the figures down."""
    rank = os.environ["LOCAL_RANK"]
    own = folder / f"rank{rank}"
    own.mkdir(parents=True, exist_ok=True)
    module = remax_module(
        policy,
        rollout=VLLMEngine(
            [url],
            transfer_dir=str(folder / "weights"),
            restart_timeout=20.0,
            transfer_timeout=60.0,
            ahead=ahead,
            transfer=transfer,
        ),
        loss=LossConfig(mismatch=MismatchConfig("tis")),
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    keep = Keep()
    options = {"max_steps": STEPS, "max_epochs": STEPS, "devices": 2, "strategy": make_strategy(strategy)}
    make_trainer(folder, [keep], **options).fit(module, prompt_data(own, policy, batch_size=4, val_path=None))
    if rank == "0":
        torch.save({"weights": keep.weights[-1], "logged": keep.logged}, folder / "end.pt")


def colocate(python: str, policy: str, folder: Path) -> None:
    """Train for two steps, where each rank starts a real server of its own; every rank writes the figures down."""
    rank = os.environ["LOCAL_RANK"]
    own = folder / f"rank{rank}"
    own.mkdir(parents=True)
    arguments = ["--enforce-eager", "--max-num-seqs", "16"]
    engine = VLLMEngine(
        mode="colocate", python=python, transfer_dir=str(folder / "weights"), restart_timeout=600, server_args=arguments
    )
    module = remax_module(
        ModelConfig(policy, dtype="float32"),
        rollout=engine,
        reward=CharacterReward(),
        loss=LossConfig(mismatch=MismatchConfig("tis")),
        optimizer=partial(torch.optim.SGD, lr=1e-2),
    )
    keep = Keep()
    options = {"max_steps": 2, "max_epochs": 2, "devices": 2, "strategy": make_strategy("ddp")}
    data = prompt_data(own, policy, PROMPTS[:4], batch_size=2, val_path=None)
    make_trainer(own, [keep], **options).fit(module, data)
    [server] = engine.servers
    figures = {"url": server.url, "version": server.value("/weight_info", "weight_version"), **keep.logged}
    engine.close()
    (folder / f"{rank}.json").write_text(json.dumps(figures, default=float))


def fail(url: str, policy: str, folder: Path, strategy: str, where: str) -> None:
    """Train where one rank fails in its first rollout; both have to end at once, with its message."""
    is_first = os.environ["LOCAL_RANK"] == "0"
    own = folder / f"rank{os.environ['LOCAL_RANK']}"
    own.mkdir(parents=True, exist_ok=True)
    if is_first:
        (folder / "file").touch()
    # Whatever is drawn differs by more than no standard errors at all from what is expected.
    proof = ProofConfig(standard_errors=1e-9) if where == "proof" and not is_first else ProofConfig()
    weights = folder / ("file" if where == "write" else "weights")
    engine = VLLMEngine([url], transfer_dir=str(weights), restart_timeout=20.0, retries=0, proof=proof)
    module = remax_module(policy, rollout=engine, loss=LossConfig(mismatch=MismatchConfig("tis")))
    options = {"max_steps": STEPS, "max_epochs": STEPS, "devices": 2, "strategy": make_strategy(strategy)}
    trainer, data = make_trainer(folder, **options), prompt_data(own, policy, batch_size=4, val_path=None)
    message = {
        "write": r"rank 0: .*transfer_dir: the weights cannot be written to",
        "proof": r"rank 1: .*standard errors",
        "response": r"rank \d: .*refused /inference/v1/generate with status 400",
    }
    start = time.monotonic()
    with pytest.raises(UserError, match=message[where]):
        trainer.fit(module, data)
    assert time.monotonic() - start < 60, "it waited for what never came"
