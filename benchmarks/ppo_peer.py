"""TRL's PPOTrainer on the benchmarks' models; imported in an environment with the last TRL that has one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shapes import Shape, prompts, tokenizer

MISSING = (
    "TRL's PPO is left out: TRL 1.12 was the last to have it, so it runs in an environment of its own "
    "(pip install '.[bench-ppo]', which `make bench-step` does) whose interpreter --ppo-python must name"
)


def make_trainer(folder: Path, shape: Shape) -> Any:
    """Return a trainer that takes all prompts in one step, of which `train` does one each time it is called.

    The value model starts from the reward model, as is usual. One epoch over the responses instead of TRL's four is in
    PPO's favor. The temperature is 1, and gradient checkpointing and bfloat16 are off, as for everybody else here.

    Args:
        folder: where `shapes.save` wrote, and where it may write.
        shape: what was written.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PrinterCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    args = PPOConfig(
        output_dir=str(folder / "trl_ppo"),
        per_device_train_batch_size=shape.prompts,
        total_episodes=shape.prompts,
        num_ppo_epochs=1,
        num_mini_batches=1,
        response_length=shape.response,
        stop_token="eos",
        temperature=1.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        kl_coef=0.05,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer(shape),
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        ref_model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        reward_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward"),
        value_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward"),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in prompts(shape, 0).tolist()]),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def timed_step(trainer: Any, begin: Callable[[], None]) -> Callable[[int], dict[str, float]]:
    """Return a function that takes one step of the trainer and returns its seconds by phase.

    TRL collects garbage before it makes the advantages: whatever the models' size, about 0.2 s of `scoring`.
    """
    from transformers import TrainerCallback
    from trl.experimental.ppo import ppo_trainer

    marks: dict[str, float] = {}
    generation, accumulate = ppo_trainer.batch_generation, trainer.accelerator.accumulate

    def timed_generation(*args: Any, **kwargs: Any) -> Any:
        result = generation(*args, **kwargs)
        marks["generated"] = time.perf_counter()
        return result

    def timed_accumulate(*args: Any) -> Any:
        marks["scored"] = time.perf_counter()  # entered once: there is one epoch of one mini-batch
        return accumulate(*args)

    class _Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            begin()
            marks["start"] = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks["end"] = time.perf_counter()

    ppo_trainer.batch_generation = timed_generation
    trainer.accelerator.accumulate = timed_accumulate
    trainer.add_callback(_Clock())

    def step(turn: int) -> dict[str, float]:  # noqa: ARG001 (its data set has one batch of prompts)
        marks.clear()
        trainer.train()
        return {
            "rollout": marks["generated"] - marks["start"],
            "scoring": marks["scored"] - marks["generated"],
            "training": marks["end"] - marks["scored"],
        }

    return step
