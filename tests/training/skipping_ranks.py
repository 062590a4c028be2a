"""A gradient that overflows on one of two ranks, under every strategy; run by test_skipping.py."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed.invariance import make_strategy, whole_weights
from helpers.training import PromptEngine, make_trainer, prompt_data, remax_module
from lightning.pytorch import Callback

from remax_lightning.errors import UserError

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


class Overflow(Callback):
    """Makes entries of the gradient infinite in some optimizer steps, as an overflow in the backward pass does.

    Args:
        steps: numbers of the steps, the first being 1.
        value: what they become.
        rank: the only rank that has them; None is all.
    """

    def __init__(self, steps: Any, value: float = float("inf"), rank: int | None = None) -> None:
        self.steps, self.value, self.rank = set(steps), value, rank

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def plant(gradient: torch.Tensor) -> torch.Tensor:
            changed = gradient.clone()
            changed[..., 0] = self.value  # of every token, because padding has no gradient
            return changed

        def watch(module: Any, inputs: Any, output: torch.Tensor) -> None:
            on_this_rank = self.rank is None or self.rank == trainer.global_rank
            if output.requires_grad and on_this_rank and trainer.global_step + 1 in self.steps:
                output.register_hook(plant)

        pl_module.trained_model.get_input_embeddings().register_forward_hook(watch)


class Weights(Callback):
    """Keeps the whole weights after each step, and the figures."""

    def __init__(self) -> None:
        self.weights: list[Any] = []
        self.skipped: list[float] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(whole_weights(pl_module.trained_model))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(whole_weights(pl_module.trained_model))
        self.skipped.append(float(trainer.callback_metrics["train/skipped_steps"]))
        self.rates.append(float(trainer.callback_metrics["train/lr"]))


def equal(first: Any, second: Any) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def main(policy: str, folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    for name in STRATEGIES:
        data_folder = folder / f"data{rank}"
        data_folder.mkdir(exist_ok=True)
        seen = Weights()
        torch.manual_seed(0)
        module = remax_module(
            policy,
            rollout=PromptEngine(),
            optimizer=partial(torch.optim.AdamW, lr=0.01),
            lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
            max_skipped_steps=2,
        )
        trainer = make_trainer(
            data_folder, [Overflow({2, 4, 5}, rank=1), seen], devices=2, strategy=make_strategy(name), max_steps=9
        )
        data = prompt_data(data_folder, policy, batch_size=4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(UserError) as error:
                trainer.fit(module, data)
        message = str(error.value)
        assert "optimizer step 5" in message, (name, message)
        assert "model.max_skipped_steps: 2" in message, (name, message)
        assert seen.skipped == [0, 1, 1, 2], (name, seen.skipped)
        assert seen.rates == pytest.approx([0.01, 0.005, 0.005, 0.0025]), (name, seen.rates)
        if rank == 0:  # where the whole weights are gathered
            start, first, second, third, fourth = seen.weights
            assert not equal(start, first), name
            assert equal(first, second), name
            assert not equal(second, third), name
            assert equal(third, fourth), name
            assert all(value.isfinite().all() for value in third.values()), name
            told = [str(warning.message) for warning in caught if "is skipped" in str(warning.message)]
            assert [message.split(" is ")[0] for message in told] == ["Optimizer step 2", "Optimizer step 4"], name
        print(name, flush=True)


def float16(policy: str, folder: Path) -> None:
    """DeepSpeed's own loss scale, which it lowers in silence where a gradient overflows.

    DeepSpeed refuses float16 on most CPUs, although torch computes it there.
    """
    from deepspeed.accelerator import get_accelerator

    rank = int(os.environ["LOCAL_RANK"])
    data_folder = folder / f"data{rank}"
    data_folder.mkdir(exist_ok=True)
    for name in ("zero1", "zero2", "zero3"):
        strategy, seen, engine = make_strategy(name), Weights(), Engine()
        strategy.initial_scale_power, strategy.hysteresis = 10, 1
        module = remax_module(policy, rollout=PromptEngine(), optimizer=partial(torch.optim.AdamW, lr=0.01))
        options = {"devices": 2, "strategy": strategy, "precision": "16-true", "max_steps": 5}
        trainer = make_trainer(data_folder, [Overflow({2, 3}, rank=1), seen, engine], **options)
        with patch.object(type(get_accelerator()), "is_fp16_supported", lambda _: True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, prompt_data(data_folder, policy, batch_size=4))
        assert seen.skipped == engine.skipped == [0, 1, 2, 2, 2], (name, seen.skipped, engine.skipped)
        assert engine.scales == [1024, 512, 256, 256, 256], (name, engine.scales)
        if rank == 0:
            changed = [not equal(*pair) for pair in zip(seen.weights, seen.weights[1:], strict=False)]
            assert changed == [True, False, False, True, True], (name, changed)


class Engine(Callback):
    """Keeps what DeepSpeed itself counts."""

    def __init__(self) -> None:
        self.skipped: list[int] = []
        self.scales: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        engine = trainer.strategy.deepspeed_engine
        self.skipped.append(engine.skipped_steps)
        self.scales.append(float(engine.optimizer.loss_scaler.cur_scale))
