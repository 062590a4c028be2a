from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from callbacks.fakes import FakeModule, make_output, make_prompt, make_trainer, scalars

from remax_lightning.callbacks import Throughput


class SlowModule(FakeModule):
    """Spends 20 ms in each training step beyond what the outputs say of rollout and reward."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        times = self.train_outputs[batch_idx]["times"]
        time.sleep(times["rollout"] + times["reward"] + 0.02)
        return super().training_step(batch, batch_idx)


def part(seed: int, split: int, num_micro_batches: int, *, closes: bool, rollout: float, reward: float = 0.0) -> Any:
    output = make_output(seed, closes=closes)
    prompt = make_prompt(output["rollout"].prompt.prompts, split, num_micro_batches)
    output["rollout"] = output["rollout"]._replace(prompt=prompt)
    output["times"] = {"rollout": rollout, "reward": reward}
    return output


def tokens(*outputs: Any) -> int:
    """Response tokens, sampled and greedy."""
    return sum(
        int(rollout.sampled.response_mask.sum()) + int(rollout.greedy.response_mask.sum())
        for rollout in (output["rollout"] for output in outputs)
    )


def test_phases_of_a_step_in_two_parts(tmp_path: Path) -> None:
    first = part(0, 0, 2, closes=False, rollout=0.05, reward=0.01)
    second = part(1, 1, 2, closes=True, rollout=0.0)
    make_trainer(tmp_path, [Throughput()], accumulate_grad_batches=2).fit(SlowModule([first, second]))
    assert scalars(tmp_path, "time/rollout_s") == pytest.approx([0.05])
    assert scalars(tmp_path, "time/reward_s") == pytest.approx([0.01])
    (train_s,), (step_s,) = scalars(tmp_path, "time/train_s"), scalars(tmp_path, "time/step_s")
    assert 0.04 <= train_s < 1.0
    assert step_s == pytest.approx(0.06 + train_s)
    assert scalars(tmp_path, "throughput/tokens_per_s") == pytest.approx([tokens(first, second) / step_s], rel=1e-4)
    rate = scalars(tmp_path, "throughput/rollout_tokens_per_s")
    assert rate == pytest.approx([tokens(first, second) / 0.05], rel=1e-4)


def test_a_rollout_batch_over_two_optimizer_steps_has_one_rate(tmp_path: Path) -> None:
    parts = [
        part(0, 0, 2, closes=True, rollout=0.02),
        part(1, 1, 2, closes=True, rollout=0.0),
        part(2, 0, 2, closes=True, rollout=0.04),
        part(3, 1, 2, closes=True, rollout=0.0),
    ]
    make_trainer(tmp_path, [Throughput()]).fit(SlowModule(parts))
    assert scalars(tmp_path, "time/rollout_s") == pytest.approx([0.02, 0.0, 0.04, 0.0])
    rates = scalars(tmp_path, "throughput/rollout_tokens_per_s")
    whole = [tokens(*parts[:2]) / 0.02, tokens(*parts[2:]) / 0.04]
    assert rates == pytest.approx([whole[0], whole[0], whole[1]], rel=1e-4)  # nothing known at the first step
