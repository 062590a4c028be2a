"""Second moments of a run's responses under every baseline, against formulas and against true gradients."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callbacks.fakes import FakeModule, make_output, make_trainer, scalars
from helpers.training import PROMPTS, fit, prompt_data, remax_module, save_policy
from lightning.pytorch import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM

from remax_lightning.baselines import KINDS, Auto, BaselineInputs, Comparison, Measurement
from remax_lightning.callbacks import GradientVariance, gradient_variance
from remax_lightning.config import AdvantageConfig, KLConfig, LossConfig, SamplingConfig
from remax_lightning.errors import UserError
from remax_lightning.evaluation.statistics import percentile_interval, resampled_ratios
from remax_lightning.rollout import GenerationOutput, GenerationRequest, PairedEngine
from remax_lightning.training.objective import Objective
from remax_lightning.training.worker import PhaseTimer


class NoRollouts:
    """A worker whose rollouts take no time."""

    ahead = 0

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
        self.norm_askers: list[Any] = []


def with_norms(seed: int, *, greedy: bool = True, closes: bool = True, prompts: int = 3) -> Any:
    output = make_output(seed, greedy=greedy, closes=closes, prompts=prompts)
    norms = torch.rand(output["entropy"].shape, generator=torch.Generator().manual_seed(seed)) * output["entropy_mask"]
    return {**output, "squared_norm": norms}


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


@pytest.mark.slow(0.3)
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
    assert scalars(tmp_path, "train/variance_seconds/none") == []  # what greedy responses cost is not known yet
    assert scalars(tmp_path, "train/gradient_variance/group_mean") == []  # leave_one_out times a number


@pytest.mark.slow(0.3)
def test_without_greedy_responses_only_others_are_compared(tmp_path: Path) -> None:
    module = Compared([with_norms(seed, greedy=False) for seed in range(7)], "batch_mean")
    make_trainer(tmp_path, [GradientVariance()]).fit(module)
    assert scalars(tmp_path, "train/gradient_variance/batch_mean") == [1.0] * 7
    # Nobody has greedy responses, so the seconds are the same for all. They are told once 16 groups of prompts tell.
    costs, moments = (scalars(tmp_path, f"train/{name}/none") for name in ("variance_seconds", "gradient_variance"))
    assert len(moments) == 7
    assert costs == pytest.approx(moments[5:])
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


def test_several_updates_on_a_rollout_are_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy responses take 1 of the 2 seconds of decoding, and each of the two updates a second."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(gradient_variance, "FIRST_PRICE", 0)
    monkeypatch.setattr(gradient_variance, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(gradient_variance, "_seconds_without_greedy", lambda *_: 1.0)
    outputs = [with_norms(0, prompts=9), with_norms(1, prompts=9)]
    for index, output in enumerate(outputs):
        rollout = output["rollout"]
        prompt = rollout.prompt._replace(micro_batch_index=index, num_micro_batches=2)
        output.update(rollout=rollout._replace(prompt=prompt), times={"rollout": 2.0 * (index == 0), "reward": 0.0})

    class Timed(Compared):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            clock.now += 1 + 2 * (batch.micro_batch_index == 0)
            return super().training_step(batch, batch_idx)

    make_trainer(tmp_path, [GradientVariance()]).fit(Timed(outputs + outputs))
    moment, cost = (
        scalars(tmp_path, f"train/{key}/batch_mean")[-1] for key in ("gradient_variance", "variance_seconds")
    )
    assert cost == pytest.approx(moment * 3 / 4)  # of seconds of a step
    rewards = torch.cat([output["rollout"].reward for output in outputs]).double()
    norms = torch.cat([output["squared_norm"].sum(1) for output in outputs]).double()
    others = (rewards.sum() - rewards) / (len(rewards) - 1)  # of the whole rollout
    expected = float(((rewards - others) ** 2 * norms).mean()) / second_moment(outputs, "greedy")
    assert moment == pytest.approx(expected, rel=1e-5)


def test_rewards_of_tokens_ask_for_no_further_norms(tmp_path: Path) -> None:
    asked = []

    class Asked(Compared):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            asked.append([asks(is_free=True) for asks in self.norm_askers])
            return super().training_step(batch, batch_idx)

    output = with_norms(0)
    tokens = output["rollout"]._replace(token_rewards=output["squared_norm"])
    make_trainer(tmp_path, [GradientVariance()]).fit(Asked([{**output, "rollout": tokens}] * 6))
    assert asked == [[True]] + [[]] * 5


def test_a_value_of_each_token_is_compared(tmp_path: Path) -> None:
    outputs = [with_norms(seed, greedy=False) for seed in range(2)]
    make_trainer(tmp_path, [GradientVariance(window=1)]).fit(Compared(outputs, "batch_mean"))
    rewards, norms = outputs[1]["rollout"].reward.double(), outputs[1]["squared_norm"].double()
    weights = norms.cumsum(1)
    total = 0.0
    for i in range(6):
        others = [k for k in range(6) if k != i]
        values = (weights[others] * rewards[others, None]).sum(0) / weights[others].sum(0)
        total += float(((rewards[i] - values) ** 2 * norms[i]).nansum())
    expected = total / 6 / second_moment(outputs[1:], "batch_mean")
    assert scalars(tmp_path, "train/gradient_variance/optimal_per_token")[-1] == pytest.approx(expected, rel=1e-5)
    assert scalars(tmp_path, "train/variance_seconds/optimal_per_token") == []  # the price of its pass is not known


@pytest.mark.slow
def test_a_clear_answer_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_variance, "FIRST_PRICE", 2)
    outputs = []
    for seed in range(12):
        output = with_norms(seed)
        # Greedy rewards that say nothing, far from the sampled ones, which are alike.
        rollout = output["rollout"]._replace(
            reward=1 + 0.01 * output["rollout"].reward, baseline_reward=10 * output["rollout"].baseline_reward - 15
        )
        outputs.append({**output, "rollout": rollout})
    told = r"On this run the baseline \w+ needs 0\.\d+ of the seconds of greedy for a gradient of .* \(95.%: 0"
    with pytest.warns(UserWarning, match=told):
        make_trainer(tmp_path, [GradientVariance()]).fit(Compared(outputs))


def test_rollouts_that_are_not_measured_are_left_out(tmp_path: Path) -> None:
    outputs = [with_norms(0), make_output(1)]
    make_trainer(tmp_path, [GradientVariance()]).fit(Compared(outputs))
    logged = scalars(tmp_path, "train/gradient_variance/none")
    none, greedy = (second_moment(outputs[:1], name) for name in ("none", "greedy"))
    assert logged[0] == pytest.approx(none / greedy, rel=1e-5)
    assert set(logged) == {logged[0]}


@pytest.mark.slow
def test_figures_are_logged_again_once_an_eighth_is_new(tmp_path: Path) -> None:
    outputs = [with_norms(seed) for seed in range(24)]
    make_trainer(tmp_path, [GradientVariance()]).fit(Compared(outputs))
    logged = scalars(tmp_path, "train/gradient_variance/none")
    # Lightning repeats a value until there is a new one.
    logged = [value for number, value in enumerate(logged) if value not in logged[:number]]
    steps = [*range(1, 9), 10, 12, 14, 16, 19, 22]
    none, greedy = ([second_moment(outputs[:step], name) for step in steps] for name in ("none", "greedy"))
    assert logged == pytest.approx([a / b for a, b in zip(none, greedy, strict=True)], rel=1e-5)


def test_intervals_are_those_of_a_bootstrap_over_groups_of_prompts() -> None:
    comparison = Comparison({"none": KINDS["none"](), "batch_mean": KINDS["batch_mean"]()}, window=30)
    generator = torch.Generator().manual_seed(0)
    moments = []
    for _ in range(40):
        reward, norms = torch.rand(2, 8, generator=generator, dtype=torch.float64)
        others = (reward.sum() - reward) / 7
        moments.append(torch.stack([(reward - others).square() * norms, reward.square() * norms], 1))
        comparison.observe(BaselineInputs(reward, 1, None, torch.ones(8), None))
        comparison.measure(Measurement(norms, 1.0, None))
    table = torch.cat(moments[10:])  # [240, 2]
    value, low, high = comparison.figures("none")["batch_mean"].variance
    assert value == pytest.approx(float(table[:, 0].sum() / table[:, 1].sum()))
    drawn = resampled_ratios(table[:, :1], table[:, 1:], 4000, seed=0)
    assert (low, high) == pytest.approx(percentile_interval(drawn)[0].tolist(), rel=0.02)
    assert comparison.figures("none")["none"].variance == (1.0, 1.0, 1.0)


def test_it_asks_for_every_fourth_rollout_and_without_a_kl_for_every_thirty_second() -> None:
    monitor = GradientVariance()
    asked: dict[bool, list[int]] = {True: [], False: []}
    for number in range(65):
        monitor._rollouts = number + 1
        for is_free, numbers in asked.items():
            if monitor.needs_norms(is_free=is_free):
                numbers.append(number)
    assert asked == {True: [*range(0, 65, 4)], False: [0, 32, 64]}


def test_turned_off_it_asks_for_nothing(tmp_path: Path) -> None:
    module = Compared([with_norms(0)])
    make_trainer(tmp_path, [GradientVariance(every_n_rollouts=0)]).fit(module)
    assert scalars(tmp_path, "train/gradient_variance/none") == []
    assert module.norm_askers == []


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


@pytest.mark.slow
@pytest.mark.parametrize("has_kl", [True, False])
def test_a_run_measures_what_greedy_responses_cost_and_trains_the_same(
    has_kl: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_variance, "FIRST_PRICE", 2)
    monkeypatch.setattr(gradient_variance, "IDLE_EVERY", 1)
    policy = save_policy(tmp_path / "policy")
    reference = save_policy(tmp_path / "reference", noise=0.02) if has_kl else None
    weights = []
    for callbacks in ([], [GradientVariance(every_n_rollouts=1)]):
        engine = Requests()
        module = remax_module(policy, reference, rollout=engine)
        recorder = fit(module, prompt_data(tmp_path, policy), tmp_path, callbacks=callbacks, max_steps=4)
        weights.append(recorder.weights[-1])
        asked = ["squared_norm" in output for output in recorder.outputs]
        assert asked == [bool(callbacks)] * 4
        if callbacks:
            assert engine.greedy == [True, True, False, True, True]  # once more, before the third step
            logged = recorder.logged[-1]
            assert 0 < logged["train/variance_seconds/batch_mean"] <= logged["train/gradient_variance/batch_mean"]
            assert all((output["squared_norm"].sum(1) > 0).all() for output in recorder.outputs)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow(0.3)
def test_a_resumed_run_goes_on_comparing(tmp_path: Path) -> None:
    outputs = [with_norms(seed) for seed in range(4)]
    whole, first, rest = (GradientVariance() for _ in range(3))
    make_trainer(tmp_path / "whole", [whole]).fit(Compared(outputs))
    make_trainer(tmp_path / "first", [first]).fit(Compared(outputs[:2]))
    rest.load_state_dict(first.state_dict())
    make_trainer(tmp_path / "rest", [rest]).fit(Compared(outputs[2:]))
    for name in ("none", "tracker", "leave_one_out"):
        expected = scalars(tmp_path / "whole", f"train/gradient_variance/{name}")
        assert scalars(tmp_path / "rest", f"train/gradient_variance/{name}") == pytest.approx(expected[2:])


class Shown(Callback):
    """Keeps what `auto` knows and what is logged, at the end of each step."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, float | None]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        logged = trainer.callback_metrics.get("train/variance_seconds_high/greedy")
        self.pairs.append((pl_module.objective.baseline.figures.get("greedy"), logged))


@pytest.mark.slow
def test_auto_is_shown_as_it_decides(tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy")
    advantage = AdvantageConfig(baseline=Auto(["greedy", "batch_mean"], window=8, compare_every=2, greedy_price=0.5))
    module, data = remax_module(policy, advantage=advantage), prompt_data(tmp_path, policy)
    shown = Shown()
    fit(module, data, tmp_path, callbacks=[GradientVariance(), shown], max_steps=6)
    figure, logged = shown.pairs[-1]
    assert logged == pytest.approx(figure.cost[2])
    assert module.norm_askers == []


@pytest.mark.slow
def test_norms_of_logits_are_those_of_gradients(tmp_path: Path) -> None:
    """Of a run's own step, by autograd at the logits of the same tokens."""
    policy = save_policy(tmp_path / "policy")
    module = remax_module(policy, save_policy(tmp_path / "reference", noise=0.02))
    module.norm_askers.append(lambda *, is_free: is_free)
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
