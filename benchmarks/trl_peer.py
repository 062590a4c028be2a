"""TRL's RLOOTrainer with two generations per prompt on the benchmarks' models; imported where TRL is installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import Shape, tokenizer
from torch import Tensor

MISSING = "TRL is left out: it is not installed (pip install '.[bench]')"


def make_trainer(
    model: Any, reward: Any, shape: Shape, rows: list[dict[str, str]], folder: Path, kl_coef: float, bfloat16: bool
) -> Any:
    """Return a trainer that takes all prompts in one step, of which `train` does one each time it is called.

    Two of TRL's defaults are off, since nobody else here has them on: gradient checkpointing, which would make its
    training pass slower, and bfloat16 on a CPU.

    Args:
        model: the policy.
        reward: a sequence classifier, or a function of TRL's kind.
        shape: what it is made for.
        rows: the prompts.
        folder: where it may write.
        kl_coef: weight of the KL; 0 does without a reference, otherwise it is read from where the policy came from.
        bfloat16: whether the weights are bfloat16.
    """
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    args = RLOOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=2 * shape.prompts,
        num_generations=2,
        max_completion_length=shape.response,
        beta=kl_coef,
        max_steps=1,
        gradient_checkpointing=False,
        bf16=bfloat16,
        use_cpu=next(model.parameters()).device.type == "cpu",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        log_level="error",
        logging_steps=10_000,
        dataloader_pin_memory=False,
    )
    return RLOOTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(shape),
        reward_processing_classes=tokenizer(shape) if isinstance(reward, torch.nn.Module) else None,
    )


def generate(trainer: Any, prompt_ids: Tensor) -> list[list[int]]:
    """Return two sampled responses per prompt, made as TRL's training step makes them."""
    twice = prompt_ids.repeat_interleave(2, 0).tolist()
    responses: list[list[int]] = trainer._generate_single_turn(twice, None, {})
    return responses


def timed_step(trainer: Any, begin: Callable[[], None]) -> Callable[[int], dict[str, float]]:
    """Return a function that takes one step of the trainer and returns its seconds by phase."""
    from transformers import TrainerCallback

    times: dict[str, float] = {}

    def add(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            times[phase] = time.perf_counter() - start
            return result

        return timed

    class _Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            begin()
            times["start"] = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times["end"] = time.perf_counter()

    trainer._generate_single_turn = add("rollout", trainer._generate_single_turn)
    trainer._generate_and_score_completions = add("experience", trainer._generate_and_score_completions)
    trainer.add_callback(_Clock())

    def step(turn: int) -> dict[str, float]:  # noqa: ARG001 (its data set has one batch of prompts)
        times.clear()
        trainer.train()
        total = times["end"] - times["start"]
        return {
            "rollout": times["rollout"],
            "scoring": times["experience"] - times["rollout"],
            "training": total - times["experience"],
        }

    return step
