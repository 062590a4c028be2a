"""One optimizer step from the same global batch under every strategy; run by test_invariance.py on two ranks."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers.training import PromptEngine, make_trainer, prompt_data, remax_module
from lightning.pytorch import Callback
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from remax_lightning.models.hf_export import policy_weights
from remax_lightning.modules import LossConfig
from remax_lightning.strategies import ReMaxDeepSpeedStrategy, ReMaxFSDP2Strategy

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": partial(torch.optim.SGD, lr=1.0)},  # the change of the weights is the gradient
    # Two steps, so that the state counts. The large eps keeps Adam from blowing the rounding of tiny gradients up.
    "adamw": {"optimizer": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, eps=0.1), "max_steps": 2},
    "clipped": {"optimizer": partial(torch.optim.SGD, lr=1.0), "gradient_clip_val": 0.05},
    # Two updates per rollout: the pass before the first has no gradients.
    "updates": {
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "loss": LossConfig("clipped"),
        "accumulate_grad_batches": 1,
        "max_steps": 2,
    },
    # A budget of tokens cuts each rank's rollout otherwise, and that of one process not at all. Two steps, so that
    # gradients of the first would show in the second.
    "budget": {"optimizer": partial(torch.optim.SGD, lr=0.1), "max_steps": 2},
}


def make_strategy(name: str) -> Strategy | str:
    """The strategy, set so that ZeRO-3 spreads even the small parameters of a tiny model; `-layerwise` may follow."""
    name, _, gather = name.partition("-")
    options: Any = {"gather": gather} if gather else {}
    if name == "fsdp2":
        return ReMaxFSDP2Strategy(**options)
    if not name.startswith("zero"):
        return name
    strategy = ReMaxDeepSpeedStrategy(stage=int(name[-1]), **options)
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return strategy


class Keep(Callback):
    """Keeps the whole weights before and after training, and the figures."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.logged: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(whole_weights(pl_module.policy))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(whole_weights(pl_module.policy))
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}


def whole_weights(policy: Any) -> dict[str, Tensor]:
    """Copies of the whole weights on rank 0; every rank has to ask."""
    weights = policy_weights(policy, keep=True)
    return {name: value.detach().cpu().clone() for name, value in (weights or policy.state_dict()).items()}


def change(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Weights before minus after: with a learning rate of 1 the gradient."""
    before, after = weights
    return {name: before[name] - after[name] for name in before}


def run(name: str, optimizer: str, policy: str, reference: str, folder: Path, ranks: int) -> dict[str, Any]:
    """Train for one step of two micro-batches per rank; the responses depend on the prompts alone."""
    options = dict(OPTIMIZERS[optimizer])
    chosen = {key: options.pop(key) for key in ("optimizer", "loss") if key in options}
    module = remax_module(policy, reference, rollout=PromptEngine(), **chosen)
    folder.mkdir(parents=True, exist_ok=True)
    cut: dict[str, Any] = {"micro_batch_size": 4 // ranks}
    options = {"accumulate_grad_batches": 2, **options}
    if optimizer == "budget" and ranks > 1:
        cut = {"max_prompt_length": 30, "tokens_per_micro_batch": 36}
        options["accumulate_grad_batches"] = 1
    data = prompt_data(folder, policy, batch_size=8 // ranks, **cut)
    keep = Keep()
    torch.manual_seed(0)
    trainer = make_trainer(folder, [keep], devices=ranks, strategy=make_strategy(name), **options)
    trainer.fit(module, data)
    return {"weights": keep.weights, "logged": keep.logged}


def main(strategy: str, optimizer: str, folder: Path) -> None:
    rank, paths = int(os.environ["LOCAL_RANK"]), (str(folder / "policy"), str(folder / "reference"))
    result = run(strategy, optimizer, *paths, folder / f"data{rank}", ranks=2)
    assert torch.distributed.get_world_size() == 2
    torch.save(result, folder / f"{strategy}-{optimizer}-{rank}.pt")
