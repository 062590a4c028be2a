from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callbacks.fakes import FakeModule, make_output, make_prompt, make_trainer, scalars
from conftest import tiny_config
from transformers import AutoModelForCausalLM

from remax_lightning.callbacks import Throughput, throughput
from remax_lightning.callbacks.throughput import ForwardFlops, count_forward_flops, step_flops


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
    began = time.perf_counter()
    make_trainer(tmp_path, [Throughput()], accumulate_grad_batches=2).fit(SlowModule([first, second]))
    took = time.perf_counter() - began
    assert scalars(tmp_path, "time/rollout_s") == pytest.approx([0.05])
    assert scalars(tmp_path, "time/reward_s") == pytest.approx([0.01])
    (train_s,), (step_s,) = scalars(tmp_path, "time/train_s"), scalars(tmp_path, "time/step_s")
    assert 0.04 <= train_s <= took - 0.06  # without rollout and reward
    assert step_s == pytest.approx(0.06 + train_s)
    assert scalars(tmp_path, "throughput/tokens_per_s") == pytest.approx([tokens(first, second) / step_s], rel=1e-4)
    rate = scalars(tmp_path, "throughput/rollout_tokens_per_s")
    assert rate == pytest.approx([tokens(first, second) / 0.05], rel=1e-4)


@pytest.mark.slow(0.3)
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


# Operations


def empty(family: str = "llama") -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_operations_are_those_of_weights_and_attention(family: str) -> None:
    """Two per weight and token; keys times queries, and their weights times values, two per pair and feature each."""
    model = empty(family)
    forward, config = count_forward_flops(lambda: empty(family)), model.config
    matrices = [each.weight for name, each in model.base_model.named_modules() if "Linear" in type(each).__name__]
    matrices += [each.weight for each in model.modules() if type(each).__name__ == "Conv1D"]
    assert forward.per_token == pytest.approx(2 * sum(weight.numel() for weight in matrices), rel=0.01)
    assert forward.per_square == pytest.approx(2 * 2 * config.num_hidden_layers * config.hidden_size, rel=0.01)
    assert forward.per_logits == 2 * config.vocab_size * config.hidden_size


def test_real_tokens_count_once_for_every_pass() -> None:
    output = make_output(0, prompts=2, n=2)
    rollout, forward = output["rollout"], ForwardFlops(1.0, 0.0, 1000.0)
    written, greedy = (int(part.response_mask.sum()) for part in (rollout.sampled, rollout.greedy))
    prompts = 2 * 3
    generated = prompts + written + greedy + 1000 * (written + greedy)
    trained = 2 * prompts + written + 1000 * written
    assert step_flops(forward, output, backward=2) == generated + 3 * trained
    output["rollout"] = rollout._replace(reference_log_probs=torch.zeros(()))
    assert step_flops(forward, output, backward=1) == generated + 2 * trained + trained
    output["entropy_mask"] = torch.zeros_like(output["entropy_mask"])  # nothing had an advantage
    assert step_flops(forward, output, backward=2) == generated + trained


@pytest.mark.slow
@pytest.mark.parametrize("peak", [None, 1e6])
def test_the_share_of_the_peak_is_logged_where_the_peak_is_known(
    peak: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "get_available_flops", lambda device, dtype: peak)
    output = part(0, 0, 1, closes=True, rollout=0.0)
    module = SlowModule([output])
    module.policy_source = SimpleNamespace(lora=None, empty_model=lambda key, dtype: empty())
    make_trainer(tmp_path, [Throughput()]).fit(module)
    logged = scalars(tmp_path, "throughput/mfu")
    if peak is None:
        assert logged == []
        return
    (step_s,) = scalars(tmp_path, "time/step_s")
    assert logged == pytest.approx([step_flops(count_forward_flops(empty), output, 2) / step_s / peak], rel=1e-4)
