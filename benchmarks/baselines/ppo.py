"""PPO of TRL on the dialogues: `.venv-ppo/bin/python -m benchmarks.baselines.ppo --seconds 3600`.

It runs in the environment of the last TRL that has a PPOTrainer (`make .venv-ppo/.installed`): from the same policy,
with the same reward model, prompts and held-out prompts, and as many responses a step as the arms of the study. The
value model starts from the reward model, as is usual. Learning rates are tuned as theirs. `--time` measures its steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.records import (
    RUNS,
    SECONDS,
    Cell,
    Evaluation,
    PeakMemory,
    append,
    machine,
    read_curves,
    replace,
)
from benchmarks.baselines.runs import load_average, wanted_cells
from benchmarks.baselines.tasks import DIALOGUES, FOLDER, PPO, prepared, working_folder
from benchmarks.machine import PACKAGES, installed
from remax_lightning.data import LoadingConfig, PromptDataModule

POLICY, REWARD, TASK = Path("runs/pipeline/sft/last"), Path("runs/pipeline/reward_model/best"), DIALOGUES
LENGTH, KL_COEF = 48, 0.05
"""Of the task's configuration."""


def prompts() -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of the training and of the held-out prompts: those of the other arms."""
    data = PromptDataModule(
        "runs/pipeline/task/preferences.jsonl",
        str(POLICY),
        val_path="runs/pipeline/task/val.jsonl",
        max_prompt_length=24,
        loading=LoadingConfig(stage_split=(2, 4, 4)),
    )
    data.setup()
    train, held_out = (
        [example.prompt_ids for example in dataset.examples] for dataset in (data._train, data._val) if dataset
    )
    return train, held_out


def make_trainer(rate: float, seed: int, steps: int, train: Sequence[list[int]]) -> Any:
    """Return the trainer of a run. One epoch over the responses and one minibatch, as the other arms update once."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PrinterCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    args = PPOConfig(
        output_dir="ppo",
        seed=seed,
        per_device_train_batch_size=TASK.responses,
        total_episodes=steps * TASK.responses,
        num_ppo_epochs=1,
        num_mini_batches=1,
        local_rollout_forward_batch_size=TASK.responses,
        response_length=LENGTH,
        stop_token="eos",
        temperature=1.0,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        kl_coef=KL_COEF,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(POLICY, padding_side="left")
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(POLICY),
        ref_model=AutoModelForCausalLM.from_pretrained(POLICY),
        reward_model=AutoModelForSequenceClassification.from_pretrained(REWARD),
        value_model=AutoModelForSequenceClassification.from_pretrained(REWARD),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in train]),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class HeldOut:
    """Measures the policy of a trainer on the held-out prompts, with the same random numbers each time.

    Args:
        trainer: has policy, reference and reward model.
        ids: of the prompts.
    """

    def __init__(self, trainer: Any, ids: Sequence[list[int]]) -> None:
        tokenizer = trainer.processing_class
        self.policy, self.reference, self.reward = trainer.policy_model, trainer.ref_model, trainer.reward_model
        # As ClassifierReward normalizes scores, for the other arms; TRL trains on those that lack the constant.
        config = self.reward.config
        self.mean, self.std = float(getattr(config, "mean", 0.0)), float(getattr(config, "std", 1.0))
        self.pad, self.eos = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
        width = max(map(len, ids))
        self.prompts = torch.tensor([[self.pad] * (width - len(row)) + row for row in ids])  # [B, P]

    @torch.no_grad()
    def measure(self, seed: int) -> dict[str, float]:
        """Return mean reward, and KL to the start in nats per response (sum of log-ratios)."""
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        mask = (self.prompts != self.pad).long()
        options = {"max_new_tokens": LENGTH, "do_sample": True, "top_k": 0, "pad_token_id": self.pad}
        whole = self.policy.generate(self.prompts, attention_mask=mask, eos_token_id=self.eos, **options)  # [B, T]
        torch.set_rng_state(state)
        start = self.prompts.shape[1]
        response = whole[:, start:]
        ended = (response == self.eos).cumsum(1)
        real = (ended == 0) | ((ended == 1) & (response == self.eos))  # [B, R], EOS included
        mask = torch.cat([mask, real.long()], 1)
        whole = torch.cat([self.prompts, response.masked_fill(~real, self.pad)], 1)
        ratio = self._log_probs(self.policy, whole, mask) - self._log_probs(self.reference, whole, mask)
        kl = (ratio[:, start - 1 :] * real).sum(1)
        logits = self.reward(whole, attention_mask=mask, position_ids=_positions(mask)).logits
        reward = (float(logits.mean()) - self.mean) / self.std
        return {"reward": reward, "kl_per_response": float(kl.mean())}

    def _log_probs(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        logits = model(ids, attention_mask=mask, position_ids=_positions(mask)).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def train(cell: Cell, steps: int, on_step: Callable[[int, Any], None], ids: Sequence[list[int]]) -> None:
    """Train a run, and call `on_step` with the number of steps, 0 before the first, and the trainer."""
    from transformers import TrainerCallback

    trainer = make_trainer(cell.rate, cell.seed, steps, ids)

    class _OnStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            on_step(state.global_step, trainer)

    trainer.add_callback(_OnStep())
    on_step(0, trainer)
    trainer.train()


def run(cell: Cell, results: Path, train_ids: Sequence[list[int]], held_out: Sequence[list[int]]) -> None:
    """Compute a run from its start to its end, and write its evaluations."""
    described = machine()
    measure: list[HeldOut] = []

    def on_step(step: int, trainer: Any) -> None:
        if step % TASK.every:
            return
        if not measure:
            measure.append(HeldOut(trainer, held_out))
        figures = {name: round(value, 6) for name, value in measure[0].measure(cell.seed).items()}
        evaluation = Evaluation(step, step * TASK.responses, 0, figures, {})
        append(results, {**cell._asdict(), **evaluation._asdict(), **(described if step == 0 else {})})

    train(cell, TASK.steps, on_step, train_ids)


def step_figures(train_ids: Sequence[list[int]], steps: int, warmup: int = 3) -> dict[str, float]:
    """Return the medians of wall and processor seconds of a step, and the memory of steps."""
    marks: list[tuple[float, float]] = []
    memory: list[PeakMemory] = []

    def on_step(step: int, trainer: Any) -> None:  # noqa: ARG001
        if step == 0:
            memory.append(PeakMemory())  # the models are loaded
        marks.append((time.perf_counter(), time.process_time()))

    train(Cell(TASK.name, PPO.name, TASK.rates[0], 0), warmup + steps, on_step, train_ids)
    marks = marks[warmup:]
    wall, processor = (
        statistics.median(later - earlier for earlier, later in pairwise(column)) for column in zip(*marks, strict=True)
    )
    figures = {"seconds": round(wall, 5), "processor_seconds": round(processor, 5), "steps": steps}
    return figures | {"load": load_average(), "peak_over_base_gb": memory[0].gigabytes()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute runs until the time is over or nothing is left; or measure steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after this many")
    parser.add_argument("--time", action="store_true", help="measure the seconds and the memory of a step")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RUNS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    end, results = time.monotonic() + options.seconds, options.results.resolve()
    with working_folder(prepared(TASK, options.folder.resolve())):
        train_ids, held_out = prompts()
        if options.time:
            versions = {"versions": installed(*PACKAGES, "trl")}
            line = {
                "task": TASK.name,
                "kind": PPO.kind,
                "greedy": False,
                **step_figures(train_ids, 10),
                **machine(),
                **versions,
            }
            replace(SECONDS, [line], ("task", "kind", "greedy"))
            print(line)
            return 0
        while time.monotonic() < end:
            cell = next(wanted_cells(TASK, [PPO], read_curves([results])), None)
            if cell is None:
                print("nothing is left to compute")
                break
            run(cell, results, train_ids, held_out)
            print(f"{cell} ended", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
