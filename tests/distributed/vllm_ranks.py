"""Training on two ranks that share a vLLM server; run by test_vllm.py, in whose process the server is."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from distributed.invariance import Keep, make_strategy
from helpers.training import make_trainer, prompt_data, remax_module

from remax_lightning.config import LossConfig, MismatchConfig
from remax_lightning.rollout import VLLMEngine

STEPS = 3


def train(url: str, policy: str, folder: Path, strategy: str) -> None:
    """Train for some steps; rank 0 writes the weights at the end and the figures down."""
    rank = os.environ["LOCAL_RANK"]
    own = folder / f"rank{rank}"
    own.mkdir(parents=True, exist_ok=True)
    module = remax_module(
        policy,
        rollout=VLLMEngine([url], transfer_dir=str(folder / "weights"), restart_timeout=20.0, transfer_timeout=60.0),
        loss=LossConfig(mismatch=MismatchConfig("tis")),
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    keep = Keep()
    options = {"max_steps": STEPS, "max_epochs": STEPS, "devices": 2, "strategy": make_strategy(strategy)}
    make_trainer(folder, [keep], **options).fit(module, prompt_data(own, policy, batch_size=4, val_path=None))
    if rank == "0":
        torch.save({"weights": keep.weights[-1], "logged": keep.logged}, folder / "end.pt")
