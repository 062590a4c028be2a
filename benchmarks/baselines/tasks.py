"""The tasks of the study, with what each prepares once: data, and the policy that all of its runs start from."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "docs" / "recipes.md"
FOLDER = ROOT / "runs" / "baselines"
"""Where tasks are prepared and pieces end; the results lie elsewhere."""

QUIET = """
trainer: {logger: false, enable_checkpointing: false, enable_progress_bar: false, enable_model_summary: false,
          max_epochs: -1, check_val_every_n_epoch: null}
gradient_variance: {window: 20, every_n_rollouts: 1}
samples: {every_n_steps: 0}
export: {best: false, last: false}
"""
"""What no run of the study needs is off. The monitor measures every rollout, and forgets those before the last 20."""


class Task(NamedTuple):
    """What the policies of the study learn.

    Args:
        name: in results and commands.
        title: in tables and pictures.
        config: YAML text over the defaults of every run, paths relative to the task's folder.
        responses: trained responses of an optimizer step, whatever the samples per prompt.
        steps: optimizer steps of a run.
        every: steps between evaluations on the held-out prompts.
        rates: learning rates that tuning starts with, a factor of 2 apart.
        prepare: writes data and start into the current folder; called once.
        seeds: of the runs that count.
        tuning_seeds: of the runs that choose learning rates; none of them counts.
        common_rate: a learning rate that every arm runs at, too, where single runs differ so much that what is chosen
            by a few of them may suit no other.
    """

    name: str
    title: str
    config: str
    responses: int
    steps: int
    every: int
    rates: tuple[float, ...]
    prepare: Callable[[], None]
    seeds: tuple[int, ...] = (1, 2, 3)
    tuning_seeds: tuple[int, ...] = (100,)
    common_rate: float | None = None


# ---- Preparing ----


@contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    """Make a folder the current one, as the shipped configurations name their files relative to it."""
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def prepared(task: Task, folder: Path) -> Path:
    """Return the folder of a task, made ready if it is not."""
    target = folder / task.name
    if not (target / "ready").exists():
        shutil.rmtree(target, ignore_errors=True)  # what an interrupted preparation left
        with working_folder(target):
            task.prepare()
        (target / "ready").touch()
    return target


def _fit(config: str, *more: str) -> None:
    """Run a stage of a shipped configuration in this process."""
    from remax_lightning.cli_run import run
    from remax_lightning.shipped_configs import shipped_config

    run(["fit", "--config", str(shipped_config(config)), "--trainer.logger", "false", *more])


def _write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _prepare_demo() -> None:
    from remax_lightning.tasks.addition import write_addition_task

    write_addition_task(Path("runs/demo/task"))
    _fit("demo_sft")
    # Few enough that a run sees its prompts several times: some baselines remember them.
    lines = Path("runs/demo/task/train.jsonl").read_text(encoding="utf-8").splitlines()[:4096]
    Path("prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _prepare_dialogues() -> None:
    from remax_lightning.tasks.dialogues import write_dialogue_task

    write_dialogue_task(Path("runs/pipeline/task"))
    _fit("pipeline_sft")
    _fit("pipeline_reward_model")


def _model() -> Path:
    sys.path.insert(0, str(ROOT / "tests"))
    from real.fetch import fetch

    return fetch("smollm2")


def _prepare_sentiment() -> None:
    Path("model").symlink_to(_model())
    blocks = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", RECIPE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    script = dict(blocks)["write_prompts.py"]
    exec(compile(script, "write_prompts.py", "exec"), {})


EXAMPLE = "7 * 3 = 21\n"
"""Before each calculation: the model answers three in ten right then, and in a chat one in twenty."""


def _prepare_sums() -> None:
    Path("model").symlink_to(_model())
    source, rows = random.Random(0), {}
    while len(rows) < 448:
        a, b, c = source.randint(2, 60), source.randint(2, 60), source.randint(2, 9)
        small = a % 20 + 2
        kinds = (f"{a} + {b}", a + b), (f"{max(a, b)} - {min(a, b)}", abs(a - b)), (f"{small} * {c}", small * c)
        question, answer = kinds[source.randrange(3)]
        rows[question] = {"prompt": f"{EXAMPLE}{question} =", "response": str(answer)}
    values = list(rows.values())
    _write_rows(Path("prompts.jsonl"), values[64:])
    _write_rows(Path("val.jsonl"), values[:64])


# ---- The tasks ----

DEMO = Task(
    "demo",
    "additions, reward 0 or 1",
    """
trainer: {accelerator: cpu, gradient_clip_val: 1.0}
model:
  policy: {path: runs/demo/sft/last}
  reference: {path: runs/demo/sft/last}
  kl_coef: 0.01
  reward: {class_path: FunctionReward, init_args: {function: remax_lightning.rewards.exact_match}}
  sampling: {max_response_length: 5}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 5.0e-4}}
  lr_scheduler: {class_path: WarmupCosine, init_args: {min_ratio: 0.1}}
data: {path: prompts.jsonl, val_path: runs/demo/task/val.jsonl, max_prompt_length: 16}
""",
    responses=128,
    steps=240,
    every=20,
    rates=(5e-4, 1e-3, 2e-3),
    prepare=_prepare_demo,
    seeds=(1, 2, 3, 4, 5, 6),
)
DIALOGUES = Task(
    "dialogues",
    "dialogues, learned reward",
    """
trainer: {accelerator: cpu, gradient_clip_val: 1.0}
model:
  policy: {path: runs/pipeline/sft/last}
  reference: {path: runs/pipeline/sft/last}
  kl_coef: 0.05
  reward:
    class_path: WeightedReward
    init_args:
      parts:
        learned: {class_path: ClassifierReward, init_args: {path: runs/pipeline/reward_model/best, batch_size: 64}}
        true_score:
          {class_path: FunctionReward, init_args: {function: remax_lightning.tasks.dialogues.true_score}}
      weights: {true_score: 0.0}
  sampling: {max_response_length: 48}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 2.0e-4}}
  lr_scheduler: {class_path: WarmupCosine, init_args: {warmup_steps: 10, min_ratio: 0.1}}
data:
  path: runs/pipeline/task/preferences.jsonl
  val_path: runs/pipeline/task/val.jsonl
  max_prompt_length: 24
  loading: {stage_split: [2, 4, 4]}
""",
    responses=64,
    steps=100,
    every=10,
    rates=(2e-4, 4e-4, 8e-4),
    prepare=_prepare_dialogues,
)
SENTIMENT = Task(
    "sentiment",
    "SmolLM2-135M, sentiment from -1 to 1",
    """
trainer: {accelerator: cpu, gradient_clip_val: 1.0}
model:
  policy: {path: model, lora: {r: 8, alpha: 16}}
  kl_coef: 0.02
  reward: benchmarks.baselines.rewards.sentiment
  sampling: {max_response_length: 16}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data: {path: prompts.jsonl, val_size: 32, max_prompt_length: 64}
collapse: {max_truncation_rate: null}
""",
    responses=16,
    steps=24,
    every=6,
    rates=(5e-4, 1e-3, 2e-3),
    prepare=_prepare_sentiment,
    common_rate=1e-3,
)
SUMS = Task(
    "sums",
    "SmolLM2-135M, calculations, reward 0 or 1",
    """
trainer: {accelerator: cpu, gradient_clip_val: 1.0}
model:
  policy: {path: model, lora: {r: 8, alpha: 16}}
  kl_coef: 0.02
  reward: {class_path: FunctionReward, init_args: {function: remax_lightning.rewards.numeric_answer}}
  sampling: {max_response_length: 6, stop_strings: ["\\n"]}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data: {path: prompts.jsonl, val_path: val.jsonl, max_prompt_length: 64}
collapse: {max_truncation_rate: null}
""",
    responses=16,
    steps=30,
    every=6,
    rates=(2.5e-4, 5e-4, 1e-3),
    prepare=_prepare_sums,
)
TASKS = {task.name: task for task in (DEMO, DIALOGUES, SENTIMENT, SUMS)}


# ---- What is compared ----


class Arm(NamedTuple):
    """What a run does with its responses.

    Args:
        name: in results, tables and pictures.
        baseline: `model.advantage.baseline`.
        samples: `n`, responses per prompt; a step has `responses / n` prompts.
        options: further arguments of `remax fit`.
    """

    name: str
    baseline: str
    samples: int = 1
    options: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What the seconds of a step depend on, beside greedy responses."""
        # A pass of its own, and a model of its own: the others cost what their responses cost.
        return self.name if self.baseline in ("optimal_per_token", "critic") else f"n={self.samples}"


PPO = Arm("ppo", "critic")
"""TRL's; `ppo.py` runs it, in another environment."""
ARMS = {
    arm.name: arm
    for arm in (
        Arm("greedy", "greedy"),
        Arm("none", "none"),
        Arm("batch_mean", "batch_mean"),
        Arm("leave_one_out", "leave_one_out", 2),
        Arm("group_mean", "group_mean", 4),
        Arm("calibrated_greedy", "calibrated_greedy"),
        Arm("tracker", "tracker"),
        Arm("cached_greedy", "cached_greedy"),
        Arm("shrinkage", "shrinkage", 2),
        Arm("optimal_per_token", "optimal_per_token"),
        Arm("auto", "auto"),
        Arm("skip_uninformative", "greedy", options=("--data.selection.skip_uninformative=2",)),
        Arm("oversample", "greedy", options=("--data.selection.oversample=3",)),
        Arm("curriculum", "greedy", options=("--data.selection.curriculum=0.2",)),
    )
}
"""The arms by name."""
DEFAULT_ARMS = ("greedy", "none", "batch_mean", "leave_one_out", "group_mean", "calibrated_greedy", "tracker")


def arguments(task: Task, arm: Arm, rate: float, seed: int) -> list[str]:
    """Return the arguments of `remax fit` for a run, which is started in the folder of the task."""
    return [
        *("--config", QUIET, "--config", task.config),
        f"--seed_everything={seed}",
        f"--trainer.max_steps={task.steps}",
        f"--trainer.val_check_interval={task.every}",
        f"--model.advantage.baseline={arm.baseline}",
        f"--model.sampling.num_samples={arm.samples}",
        f"--model.optimizer.init_args.lr={rate}",
        f"--data.batch_size={task.responses // arm.samples}",
        f"--data.seed={seed}",
        *arm.options,
    ]
