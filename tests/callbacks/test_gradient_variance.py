"""Second moments of a run's responses under every baseline, against formulas and against true gradients."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.fakes import FakeModule, make_output, make_trainer, scalars
from helpers.training import PROMPTS, fit, prompt_data, remax_module, save_policy
from torch import Tensor
from transformers import AutoModelForCausalLM

from remax_lightning.callbacks import GradientVariance
from remax_lightning.config import AdvantageConfig, KLConfig, LossConfig, SamplingConfig
from remax_lightning.errors import UserError
from remax_lightning.rollout import GenerationOutput, GenerationRequest, PairedEngine
from remax_lightning.training.objective import Objective
from remax_lightning.training.worker import PhaseTimer


class NoRollouts:
    """A worker whose rollouts take no time."""

    def __init__(self) -> None:
        self.timer = PhaseTimer()

    def generate_responses(self, *_: Any, **__: Any) -> None:
        pass

    def free_gradients(self) -> None:
        pass


class Compared(FakeModule):
    """A fake module that says which baseline it has."""

    def __init__(self, train: list[Any], baseline: str = "greedy", n: int = 2) -> None:
        super().__init__(train)
        self.objective = Objective(KLConfig(), AdvantageConfig(baseline=baseline), LossConfig(), n)  # type: ignore[arg-type]
        self.sampling = SamplingConfig(num_samples=n)
        self.policy, self.worker, self.rollouts = None, NoRollouts(), NoRollouts()


def with_norms(seed: int, *, greedy: bool = True, closes: bool = True) -> Any:
    output = make_output(seed, greedy=greedy, closes=closes)
    norms = torch.rand(output["entropy"].shape, generator=torch.Generator().manual_seed(seed)) * output["entropy_mask"]
    # With a KL, as every response is then run.
    rollout = output["rollout"]._replace(reference_log_probs=torch.zeros(norms.shape))
    return {**output, "rollout": rollout, "squared_norm": norms}


def second_moment(outputs: list[Any], baseline: str) -> float:
    """Mean of (r - b)^2 w, response by response."""
    total = []
    for output in outputs:
        rollout = output["rollout"]
        rewards = rollout.reward.tolist()
        norms = output["squared_norm"].sum(1).tolist()
        for i, reward in enumerate(rewards):
            if baseline == "none":
                b = 0.0
            elif baseline == "greedy":
                b = float(rollout.baseline_reward[i // 2])
            elif baseline == "leave_one_out":
                b = rewards[i ^ 1]
            else:
                b = (sum(rewards) - reward) / (len(rewards) - 1)
            total.append((reward - b) ** 2 * norms[i])
    return sum(total) / len(total)


def test_figures_are_those_of_the_window(tmp_path: Path) -> None:
    outputs = [with_norms(seed) for seed in range(4)]
    make_trainer(tmp_path, [GradientVariance(window=2)]).fit(Compared(outputs))
    for name in ("none", "batch_mean", "leave_one_out", "greedy"):
        expected = [
            second_moment(outputs[max(0, last - 1) : last + 1], name)
            / second_moment(outputs[max(0, last - 1) : last + 1], "greedy")
            for last in range(4)
        ]
        logged = scalars(tmp_path, f"train/gradient_variance/{name}")
        assert logged == pytest.approx(expected, rel=1e-5), name
        ends = [scalars(tmp_path, f"train/gradient_variance_{end}/{name}") for end in ("low", "high")]
        for low, value, high in zip(ends[0], logged, ends[1], strict=True):
            assert low <= value * 1.0001
            assert value <= high * 1.0001
    assert scalars(tmp_path, "train/gradient_variance/greedy") == [1.0] * 4
    assert scalars(tmp_path, "train/variance_seconds/greedy") == [1.0] * 4
    assert scalars(tmp_path, "train/gradient_variance/group_mean") == []  # leave_one_out times a number


def test_without_greedy_responses_only_others_are_compared(tmp_path: Path) -> None:
    module = Compared([with_norms(seed, greedy=False) for seed in range(2)], "batch_mean")
    make_trainer(tmp_path, [GradientVariance()]).fit(module)
    assert scalars(tmp_path, "train/gradient_variance/batch_mean") == [1.0, 1.0]
    assert len(scalars(tmp_path, "train/gradient_variance/none")) == 2
    for name in ("greedy", "calibrated_greedy", "tracker", "cached_greedy"):
        assert scalars(tmp_path, f"train/gradient_variance/{name}") == []


def test_parts_of_a_step_are_one_batch(tmp_path: Path) -> None:
    parts = [with_norms(0, closes=False), with_norms(1)]
    make_trainer(tmp_path, [GradientVariance()], accumulate_grad_batches=2).fit(Compared(parts))
    rewards = torch.cat([part["rollout"].reward for part in parts]).double()
    norms = torch.cat([part["squared_norm"].sum(1) for part in parts]).double()
    greedy = torch.cat([part["rollout"].baseline_reward.repeat_interleave(2) for part in parts]).double()
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    expected = ((rewards - others) ** 2 * norms).sum() / ((rewards - greedy) ** 2 * norms).sum()
    assert scalars(tmp_path, "train/gradient_variance/batch_mean") == pytest.approx([float(expected)], rel=1e-5)


def test_a_clear_answer_is_told_once(tmp_path: Path) -> None:
    outputs = []
    for seed in range(12):
        output = with_norms(seed)
        # Greedy rewards that say nothing, far from the sampled ones, which are alike.
        rollout = output["rollout"]._replace(
            reward=1 + 0.01 * output["rollout"].reward, baseline_reward=10 * output["rollout"].baseline_reward - 15
        )
        outputs.append({**output, "rollout": rollout})
    told = r"On this run the baseline \w+ would have needed 0\.\d+ of the seconds of greedy"
    with pytest.warns(UserWarning, match=told):
        make_trainer(tmp_path, [GradientVariance()]).fit(Compared(outputs))


def test_responses_that_were_not_run_end_the_comparison(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = with_norms(0)
    output["rollout"] = output["rollout"]._replace(reference_log_probs=None)
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, [GradientVariance()]).fit(Compared([output, with_norms(1)]))
    assert scalars(tmp_path, "train/gradient_variance/none") == []
    assert caplog.text.count("gradient_variance compares no baselines: without a KL") == 1


def test_rewards_that_are_their_baselines_end_without_an_answer(tmp_path: Path) -> None:
    output = with_norms(0)
    rollout = output["rollout"]
    equal = rollout._replace(reward=rollout.baseline_reward.repeat_interleave(2))
    make_trainer(tmp_path, [GradientVariance()], log_every_n_steps=0).fit(Compared([{**output, "rollout": equal}]))


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="window must be at least 1"):
        GradientVariance(window=0)


# In a run


class Requests(PairedEngine):
    """Keeps whether greedy responses were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.greedy: list[bool] = []

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        self.greedy.append(request.greedy)
        return super().generate(model, request)


def test_a_run_measures_what_greedy_responses_cost_and_trains_the_same(tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy")
    reference = save_policy(tmp_path / "reference", noise=0.02)
    weights = []
    for callbacks in ([], [GradientVariance()]):
        engine = Requests()
        module = remax_module(policy, reference, rollout=engine)
        recorder = fit(module, prompt_data(tmp_path, policy), tmp_path, callbacks=callbacks, max_steps=4)
        weights.append(recorder.weights[-1])
        assert ("squared_norm" in recorder.outputs[0]) == bool(callbacks)
        if callbacks:
            assert engine.greedy == [True, True, False, False, True, True]  # two more, before the third step
            logged = recorder.logged[-1]
            assert 0 < logged["train/variance_seconds/batch_mean"] <= logged["train/gradient_variance/batch_mean"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_norms_of_logits_are_those_of_gradients(tmp_path: Path) -> None:
    """Of a run's own step, by autograd at the logits of the same tokens."""
    policy = save_policy(tmp_path / "policy")
    module = remax_module(policy, save_policy(tmp_path / "reference", noise=0.02))
    module.reports_squared_norm = True
    (output,) = fit(module, prompt_data(tmp_path, policy, PROMPTS[:4]), tmp_path).outputs
    prompt, sampled = output["rollout"].prompt, output["rollout"].sampled
    model = AutoModelForCausalLM.from_pretrained(policy)  # as it was before the step
    for row in range(2):
        mask = sampled.response_mask[row]
        ids = torch.cat([prompt.prompt_ids[row][prompt.prompt_mask[row]], sampled.response_ids[row][mask]])
        start = len(ids) - int(mask.sum())
        logits: Tensor = model(ids[None]).logits[0, start - 1 : -1].detach().requires_grad_()
        chosen = logits.log_softmax(-1).gather(1, ids[start:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, logits)
        assert output["squared_norm"][row][mask].tolist() == pytest.approx(gradient.square().sum(1).tolist(), abs=1e-4)
