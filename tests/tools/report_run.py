"""The folder of a run, written without training: planted curves, and samples whose numbers are known."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> & <b>bold</b> {{data}}"
"""What would run, or show as markup, wherever a text is taken for HTML."""

CONFIG = """\
model:
  class_path: remax_lightning.modules.remax.ReMaxModule
  init_args:
    policy:
      path: runs/demo/sft/last
    reward:
      class_path: remax_lightning.rewards.function.FunctionReward
      init_args:
        function: remax_lightning.rewards.exact_match
data:
  class_path: remax_lightning.data.prompts.PromptDataModule
  init_args:
    path: prompts.jsonl # <i>not markup</i>
"""


def write_events(folder: Path, curves: Mapping[str, Iterable[tuple[int, float]]]) -> None:
    """Write scalars as TensorBoard does."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for key, points in curves.items():
            for step, value in points:
                writer.add_scalar(key, value, step)


def planted_curves(steps: int = 200, seed: int = 0) -> dict[str, list[tuple[int, float]]]:
    """Curves under every name that a ReMax run with a reference and validation logs."""
    chance = random.Random(seed)
    curves: dict[str, list[tuple[int, float]]] = {}

    def plant(name: str, start: float, end: float, noise: float, every: int = 1) -> None:
        curves[name] = [
            (step, start + (end - start) * (1 - math.exp(-3 * step / steps)) + chance.gauss(0, noise))
            for step in range(every - 1, steps, every)
        ]

    for stage, every in (("train", 1), ("val", 50)):
        noise = 0.03 if stage == "train" else 0.003
        plant(f"{stage}/reward", 0.4, 0.85, noise, every)
        plant(f"{stage}/baseline_reward", 0.55, 0.9, noise, every)
        plant(f"{stage}/kl", 0.001, 0.05, noise / 20, every)
        plant(f"{stage}/entropy", 0.6, 0.2, noise, every)
        plant(f"{stage}/response_length", 4.4, 4.0, noise, every)
        plant(f"{stage}/truncation_rate", 0.1, 0.01, noise / 10, every)
    plant("train/kl_per_response", 0.005, 0.2, 0.01)
    plant("train/kl_max", 0.1, 2.0, 0.2)
    plant("train/reward_variance_ratio", 0.9, 1.1, 0.1)
    compared = {"greedy": (1.0, 1.0), "batch_mean": (0.9, 0.62), "tracker": (0.8, 0.7), "none": (5.0, 4.0)}
    for name, (start, end) in compared.items():
        width = 0.0 if name == "greedy" else 0.2
        for kind, factor in (("gradient_variance", 1.0), ("variance_seconds", 1.0 if name == "greedy" else 0.9)):
            plant(f"train/{kind}/{name}", factor * start, factor * end, 0.0)
            plant(f"train/{kind}_low/{name}", factor * start - width, factor * end - width, 0.0)
            plant(f"train/{kind}_high/{name}", factor * start + width, factor * end + width, 0.0)
    plant("train/baseline_correlation", 0.3, 0.4, 0.1)
    plant("train/greedy_win_rate", 0.3, 0.1, 0.03)
    plant("train/zero_advantage_share", 0.5, 0.8, 0.03)
    plant("train/eos_rate", 0.9, 0.99, 0.01)
    plant("train/distinct_share", 0.8, 0.7, 0.03)
    plant("train/length_correlation", 0.1, 0.2, 0.1)
    plant("train/kl_slope", 0.001, 0.0, 0.0003)
    curves["train/collapse_alarms"] = [(step, 0.0) for step in range(steps)]
    for name, seconds in (("time/rollout_s", 0.2), ("time/reward_s", 0.05), ("time/train_s", 0.1)):
        plant(name, seconds, seconds, seconds / 10)
    plant("throughput/tokens_per_s", 3000, 3100, 90)
    plant("throughput/rollout_tokens_per_s", 6000, 6100, 90)
    plant("train/loss", 0.1, -0.1, 0.02)
    plant("train/lr", 1e-6, 1e-7, 0.0)
    plant("train/grad_norm", 2.0, 1.0, 0.1)
    return curves


def sample(number: int, **changes: Any) -> dict[str, Any]:
    """A line of a sample dump. Reward is `number / 10`; the tokens are the letters of the response and the end."""
    response = f"answer {number}"
    length = len(response) + 1
    line: dict[str, Any] = {
        "step": 10 * (1 + number // 8),
        "stage": "train",
        "prompt": f"question {number}?",
        "response": response,
        "greedy_response": f"greedy {number}",
        "reward": number / 10,
        "baseline_reward": 1.0,
        "advantage": number / 10 - 1.0,
        "kl": 0.01 * length,
        "response_length": length,
        "truncated": False,
        "parts": {},
        "tokens": [*response, ""],
        "token_kl": [0.01 * (-1) ** i for i in range(length)],
        "token_advantages": [number / 10 - 1.0] * length,
    }
    return line | changes


def write_samples(folder: Path, lines: Sequence[Mapping[str, Any]], stage: str = "train") -> None:
    path = folder / "samples" / f"{stage}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_run(folder: Path, samples: int = 64) -> Path:
    """A whole run with everything that a page can show; sample 7 and the configuration hold markup."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    write_events(folder, planted_curves())
    hostile = {"response": HOSTILE, "prompt": HOSTILE, "greedy_response": HOSTILE, "tokens": [*HOSTILE]}
    size = {"token_kl": [0.5] * len(HOSTILE), "token_advantages": [-0.3] * len(HOSTILE)}
    write_samples(folder, [sample(i, **(hostile | size if i == 7 else {})) for i in range(samples)])
    write_samples(folder, [sample(i, stage="validation", step=100) for i in range(5)], "validation")
    figure = {"value": 0.87, "low": 0.85, "high": 0.89, "n": 512}
    small = {"value": 0.0004366, "low": -0.0009336, "high": 0.001907, "n": 1024}
    figures = {"reward": figure, "reward_part/true_score": small, "win_rate_reference": small}
    (folder / "evaluation.json").write_text(json.dumps({"figures": figures}))
    return folder
