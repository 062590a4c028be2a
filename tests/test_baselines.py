"""Baselines as classes: by name and by class, their memory, what they refuse, and how a run uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.cli import changed, misread, remax_parser, small_config, write_config
from helpers.training import CharacterReward, fit, prompt_data, remax_module, save_policy
from torch import Tensor

from remax_lightning.baselines import (
    BASELINES,
    Auto,
    Baseline,
    BaselineInputs,
    BaselineName,
    CachedGreedy,
    CalibratedGreedy,
    Tracker,
    baseline_from_dict,
    baseline_to_dict,
    checked_values,
    make_baseline,
)
from remax_lightning.config import AdvantageConfig, LossConfig, config_from_dict
from remax_lightning.data.collate import MicroBatchSampler
from remax_lightning.errors import UserError
from remax_lightning.functional import calibrated_greedy
from remax_lightning.modules import ReMaxModule
from remax_lightning.rollout import SamplingConfig


def inputs(
    reward: list[float], greedy: list[float] | None = None, prompts: list[int] | None = None, num_samples: int = 1
) -> BaselineInputs:
    values = torch.tensor(reward, dtype=torch.float64)
    greedy_reward = None if greedy is None else torch.tensor(greedy, dtype=torch.float64)
    return BaselineInputs(values, num_samples, greedy_reward, torch.arange(1.0, len(reward) + 1).double(), prompts)


WITHOUT_GRADIENTS: list[Any] = [name for name in BASELINES if not make_baseline(name).reads_gradients]  # type: ignore[arg-type]


class Half(Baseline):
    """A user's own: half of the greedy reward."""

    greedy = "always"

    def values(self, inputs: BaselineInputs) -> Tensor:
        return 0.5 * inputs.greedy.repeat_interleave(inputs.num_samples)


# By name


def test_every_name_has_a_class() -> None:
    assert set(get_args(BaselineName)) == set(BASELINES)
    scores = inputs([1.0, 0.0, 2.0, 5.0], [1.0, 3.0], [7, 9], num_samples=2)
    norms = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 2.0], [2.0, 2.0]], dtype=torch.float64)
    per_token = make_baseline("optimal_per_token").values(scores._replace(squared_norms=norms))
    assert per_token[:, 0].tolist() == pytest.approx([12 / 5, 13 / 4, 11 / 5, 3 / 4])  # weights 1, 2, 1, 2
    assert per_token[:, 1].tolist() == pytest.approx([26 / 9, 27 / 8, 21 / 7, 7 / 6])  # weights 1, 2, 3, 4
    found = {name: checked_values(make_baseline(name), scores).tolist() for name in WITHOUT_GRADIENTS}
    assert found["greedy"] == [1.0, 1.0, 3.0, 3.0]
    assert found["none"] == [0.0] * 4
    assert found["leave_one_out"] == [0.0, 1.0, 5.0, 2.0]
    assert found["group_mean"] == [0.5, 0.5, 3.5, 3.5]
    assert found["greedy_and_samples"] == [0.5, 1.0, 4.0, 2.5]
    assert found["tracker"] == found["cached_greedy"] == found["auto"] == found["greedy"]  # at the first visit
    assert found["batch_mean"] == pytest.approx([7 / 3, 8 / 3, 2.0, 1.0])
    assert found["optimal_constant"] == pytest.approx([26 / 9, 27 / 8, 21 / 7, 7 / 6])  # weights 1, 2, 3, 4


def test_what_is_no_baseline() -> None:
    with pytest.raises(UserError, match=r"model\.advantage\.baseline must be one of greedy, none, .* got 'gredy'"):
        make_baseline("gredy")  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["tracker", CalibratedGreedy(ridge=2.5), Tracker(0.5), CachedGreedy(renew_every=3)])
def test_a_checkpoint_holds_a_baseline_as_text_and_numbers(source: Any) -> None:
    config = AdvantageConfig(baseline=source)
    restored = config_from_dict(AdvantageConfig, config.as_dict())
    assert baseline_to_dict(restored.baseline) == baseline_to_dict(source)
    assert type(restored.baseline) is type(source)


def test_a_checkpoint_imports_no_class_of_its_own() -> None:
    with pytest.raises(UserError, match=r"is .*test_baselines\.Half, a class of your own: pass advantage="):
        baseline_from_dict(baseline_to_dict(Half()))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a class of your own"):
        baseline_from_dict({"class_path": "os.system", "init_args": {"command": "true"}})


# With a memory


def test_a_tracker_starts_at_the_greedy_reward_and_moves_to_the_samples() -> None:
    tracker = Tracker(decay=0.5, greedy_weight=1.0)
    first = inputs([1.0, 3.0, 0.0, 0.0], [4.0, 1.0], [10, 20], num_samples=2)
    assert tracker.needs_greedy([10, 20])
    assert tracker.values(first).tolist() == [4.0, 4.0, 1.0, 1.0]
    tracker.observe(first)
    # weight 0.5 * 1 + 2 = 2.5; 4 + (2 - 4) * 2 / 2.5, and 1 + (0 - 1) * 2 / 2.5
    second = inputs([0.0, 0.0], None, [20], num_samples=2)
    assert not tracker.needs_greedy([20, 10])
    assert tracker.needs_greedy([20, 30])
    assert tracker.values(second).tolist() == pytest.approx([0.2, 0.2])
    restored = Tracker(decay=0.5)
    restored.load_state_dict(tracker.state_dict())
    for each in (tracker, restored):
        each.observe(second)  # weight 0.5 * 2.5 + 2 = 3.25
    expected = [0.2 - 0.2 * 2 / 3.25] * 2
    assert tracker.values(second).tolist() == restored.values(second).tolist() == pytest.approx(expected)


def test_a_cached_greedy_reward_is_renewed() -> None:
    cached = CachedGreedy(renew_every=2)
    needed = []
    for visit in range(5):
        needs = cached.needs_greedy([3])
        needed.append(needs)
        scores = inputs([1.0], [float(visit)] if needs else None, [3])
        assert cached.values(scores).tolist() == [float(visit - visit % 2)]
        cached.observe(scores)
    assert needed == [True, False, True, False, True]


def test_prompts_that_an_epoch_leaves_out_do_not_renew_all_others() -> None:
    """Of 50 prompts, batches of 8 leave out 2 in each epoch, others in each, so that visits differ."""
    cached, sampler = CachedGreedy(), MicroBatchSampler(50, 8)
    needed = []
    for epoch in range(24):
        order = sampler.order(epoch)
        for start in range(0, len(order), 8):
            prompts = order[start : start + 8]
            needed.append(cached.needs_greedy(prompts))
            scores = inputs([0.0] * 8, [1.0] * 8 if needed[-1] else None, prompts)
            assert cached.values(scores).tolist() == [1.0] * 8
            cached.observe(scores)
    later = needed[4 * 6 :]
    assert sum(later) / len(later) == pytest.approx(cached.greedy_share, abs=0.05)


def test_a_memory_needs_to_know_the_prompts() -> None:
    with pytest.raises(UserError, match="Tracker remembers prompts, and the data loader does not tell their places"):
        Tracker().values(inputs([1.0], [1.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tracker(decay=1.5), "baseline.decay must be between 0 and 1, got 1.5"),
        (lambda: Tracker(greedy_weight=0.0), "baseline.greedy_weight must be above 0, got 0"),
        (lambda: CachedGreedy(renew_every=0), "baseline.renew_every must be at least 1"),
        (lambda: CalibratedGreedy(ridge=-1.0), "baseline.ridge must be 0 or more, got -1"),
    ],
)
def test_arguments_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


class Wrong(Baseline):
    def __init__(self, result: Any) -> None:
        self.result = result

    def values(self, inputs: BaselineInputs) -> Tensor:
        return self.result


@pytest.mark.parametrize(
    ("result", "got"),
    [(torch.zeros(3), r"shape \[3\]"), (None, "NoneType"), (torch.tensor([0.0, float("nan")]), "nan")],
)
def test_values_that_cannot_be_trained_on(result: Any, got: str) -> None:
    with pytest.raises(UserError, match=f"baseline Wrong must return .*2 finite numbers.*got {got}"):
        checked_values(Wrong(result), inputs([1.0, 2.0]))


# In a run


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def run(policy: str, folder: Path, baseline: Any, *, num_samples: int = 1, steps: int = 1, **data: Any) -> Any:
    sampling = SamplingConfig(max_response_length=6, num_samples=num_samples)
    module = remax_module(policy, advantage=AdvantageConfig(baseline=baseline), sampling=sampling)
    return fit(module, prompt_data(folder, policy, **data), folder, max_steps=steps)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("baseline", [CalibratedGreedy(ridge=0.5), Half(), "shrinkage", "batch_mean"])
def test_advantages_are_rewards_above_the_baseline(baseline: Any, policy: str, tmp_path: Path) -> None:
    (output,) = run(policy, tmp_path, baseline, num_samples=2).outputs
    rollout, made = output["rollout"], make_baseline(baseline)
    assert (rollout.greedy is not None) == (made.greedy == "always")
    reward = rollout.reward.double()
    greedy = None if rollout.baseline_reward is None else rollout.baseline_reward.double()
    lengths = rollout.sampled.response_mask.sum(1).double()
    expected = reward - made.values(BaselineInputs(reward, 2, greedy, lengths, None))
    torch.testing.assert_close(output["advantages"][:, 0].double(), expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.1


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("loss", [LossConfig(), LossConfig("clipped")], ids=["one update", "several"])
def test_each_token_has_its_own_baseline(loss: LossConfig, policy: str, tmp_path: Path) -> None:
    advantage = AdvantageConfig(baseline="optimal_per_token")
    module = remax_module(policy, advantage=advantage, loss=loss)
    module.norm_askers.append(lambda *, is_free: True)
    data = {"micro_batch_size": 2}
    accumulate = 4 if loss.kind == "reinforce" else 2
    outputs = fit(module, prompt_data(tmp_path, policy, **data), tmp_path, accumulate_grad_batches=accumulate).outputs
    advantages, norms, masks = (
        torch.cat([torch.nn.functional.pad(part[name], (0, 6 - part[name].shape[1])) for part in outputs])
        for name in ("advantages", "squared_norm", "entropy_mask")
    )
    whole = outputs[0]["rollout"]
    rewards = torch.cat([part["rollout"].reward for part in outputs])
    assert whole.greedy is None
    if loss.kind == "clipped":  # of the second update there are no advantages here, and other rewards count
        assert len(advantages) == 4
        assert advantages.abs().max() > 0.1
        return
    weights = norms.double().cumsum(1)
    for i in range(8):
        others = [k for k in range(8) if k != i]
        expected = (weights[others] * rewards[others, None]).sum(0) / weights[others].sum(0)
        difference = (rewards[i] - expected)[masks[i]]
        torch.testing.assert_close(advantages[i][masks[i]].double(), difference, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_overflow_skips_a_step_with_a_baseline_of_gradients_as_well(policy: str, tmp_path: Path) -> None:
    class Overflowing(ReMaxModule):
        """Its passes over the first rollout return NaN for one response."""

        def token_statistics(self, *arguments: Any, **options: Any) -> Any:
            stats = super().token_statistics(*arguments, **options)
            if self.global_step:
                return stats
            factor = torch.ones(len(stats.log_probs), 1).index_fill(0, torch.tensor([1]), torch.nan)
            columns = {name: getattr(stats, name) for name in ("log_probs", "squared_norm")}
            return stats._replace(**{name: column * factor for name, column in columns.items() if column is not None})

    advantage, sampling = AdvantageConfig(baseline="optimal_per_token"), SamplingConfig(max_response_length=6)
    module = Overflowing(policy, CharacterReward(), kl_coef=0.0, advantage=advantage, sampling=sampling)
    with pytest.warns(UserWarning, match="Optimizer step 1 is skipped: its gradient is not finite"):
        fit(module, prompt_data(tmp_path, policy), tmp_path, max_steps=2)
    assert module.skipped_steps.total == 1


def test_a_baseline_of_gradients_needs_a_pass_of_its_own(policy: str) -> None:
    with pytest.raises(UserError, match=r"old_log_probs must be recompute where .* optimal_per_token, got rollout"):
        remax_module(
            policy,
            advantage=AdvantageConfig(baseline="optimal_per_token"),
            loss=LossConfig("clipped", old_log_probs="rollout"),
        )


@pytest.mark.slow(0.3)
def test_micro_batches_share_the_baseline_of_the_whole_batch(policy: str, tmp_path: Path) -> None:
    whole = run(policy, tmp_path, "calibrated_greedy").outputs[0]
    parts = fit(
        remax_module(policy, advantage=AdvantageConfig(baseline="calibrated_greedy")),
        prompt_data(tmp_path, policy, micro_batch_size=2),
        tmp_path,
        accumulate_grad_batches=4,
    ).outputs
    assert len(parts) == 4
    rollout = whole["rollout"]
    expected = rollout.reward - calibrated_greedy(rollout.reward, 1, rollout.baseline_reward)
    advantages = torch.cat([part["advantages"][:, 0] for part in parts])
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_tracker_decodes_greedily_in_the_first_epoch_only(policy: str, tmp_path: Path) -> None:
    outputs = run(policy, tmp_path, "tracker", steps=5, batch_size=4).outputs  # two steps to an epoch
    assert [output["rollout"].greedy is not None for output in outputs] == [True, True, False, False, False]


def test_too_few_samples_are_refused(policy: str) -> None:
    with pytest.raises(UserError, match=r"baseline shrinkage needs model\.sampling\.num_samples of at least 2, got 1"):
        remax_module(policy, advantage=AdvantageConfig(baseline="shrinkage"))
    # Of `auto`, those that are named; of all there are, those that the run can have.
    with pytest.raises(UserError, match=r"baseline Auto needs model\.sampling\.num_samples of at least 2, got 1"):
        remax_module(policy, advantage=AdvantageConfig(baseline=Auto(["leave_one_out", "batch_mean"])))
    assert remax_module(policy, advantage=AdvantageConfig(baseline="auto")).objective.needs_greedy


# On the command line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("tracker", "tracker"),
        ({"class_path": "Tracker", "init_args": {"decay": 0.5}}, {"decay": 0.5, "greedy_weight": 1.0}),
        ({"class_path": "remax_lightning.baselines.CalibratedGreedy"}, {"ridge": 1.0}),
    ],
    ids=["name", "class", "path"],
)
def test_yaml_names_a_baseline(value: Any, expected: Any, policy: str, tmp_path: Path) -> None:
    config = changed(small_config(tmp_path, policy), model__advantage={"baseline": value})
    parsed = remax_parser().parse_args(["fit", "--config", write_config(tmp_path / "run.yaml", config)])
    baseline = parsed.fit.model.init_args.advantage.baseline
    assert (baseline if isinstance(baseline, str) else vars(baseline.init_args)) == expected


@pytest.mark.slow
def test_a_misspelt_baseline_is_named(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = changed(small_config(tmp_path, policy), model__advantage={"baseline": "gredy"})
    said = misread(config, tmp_path, capsys)
    assert "model.advantage.baseline" in said
    assert "gredy" in said
    assert "greedy" in said


def test_a_baseline_says_what_it_needs_later_on() -> None:
    shares = {name: make_baseline(name).greedy_share for name in BASELINES if name != "auto"}  # type: ignore[arg-type]
    assert {name for name, share in shares.items() if share == 1} == {
        *("greedy", "greedy_and_samples", "calibrated_greedy"),
    }
    assert shares["cached_greedy"] == 0.25
    assert shares["tracker"] == shares["none"] == 0.0
