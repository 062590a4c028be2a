"""`remax baselines`: figures against formulas and true gradients, and the command as a user calls it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers.cli import changed, in_folder, remax, write_config
from helpers.doctor import healthy, supervised

from remax_lightning.baselines import CachedGreedy, Tracker, make_baseline
from remax_lightning.errors import UserError
from remax_lightning.modules import ReMaxModule
from remax_lightning.tools.baselines import (
    Figure,
    advice,
    compare,
    picture,
    second_moments,
    table,
    tracker_moments,
)
from remax_lightning.tools.doctor import load_context
from remax_lightning.tools.gradient_norms import Sample, Seconds, SquaredNorms, agreement, measure

SECONDS = Seconds(rollout=0.4, greedy=0.2, training=0.4)


def make_sample(num_prompts: int = 200, agreement: float = 0.9, num_samples: int = 2) -> Sample:
    """Rewards that share `agreement` of their variance with the greedy response's."""
    generator = torch.Generator().manual_seed(0)
    greedy, noise = torch.randn(num_prompts * 3, generator=generator, dtype=torch.float64).split(
        [num_prompts, 2 * num_prompts]
    )
    reward = agreement**0.5 * greedy.repeat_interleave(2) + (1 - agreement) ** 0.5 * noise
    norms = 1 + torch.rand(2 * num_prompts, generator=generator, dtype=torch.float64)
    return Sample(reward, greedy, torch.ones_like(reward), norms_of(norms), num_samples)


def norms_of(weights: torch.Tensor) -> SquaredNorms:
    return SquaredNorms(weights, weights, None)


def test_second_moments_are_those_of_the_formula() -> None:
    sample = Sample(
        reward=torch.tensor([1.0, 3.0, 0.0, 2.0]),
        greedy_reward=torch.tensor([2.0, 2.0]),
        lengths=torch.ones(4),
        norms=norms_of(torch.tensor([1.0, 2.0, 3.0, 4.0])),
        num_samples=2,
    )
    assert second_moments(sample, make_baseline("greedy"), 8).tolist() == [(1 + 2) / 2, (4 * 3 + 0) / 2]
    assert second_moments(sample, make_baseline("none"), 8).tolist() == [(1 + 9 * 2) / 2, (0 + 4 * 4) / 2]
    assert second_moments(sample, make_baseline("leave_one_out"), 8).tolist() == [(4 + 8) / 2, (12 + 16) / 2]
    # batch means of 6/4 with one's own left out: 5/3, 1, 2, 4/3
    expected = [(4 / 9 + 2 * 4) / 2, (4 * 3 + 4 / 9 * 4) / 2]
    assert second_moments(sample, make_baseline("batch_mean"), 2).tolist() == pytest.approx(expected)
    # A tracker has seen the first sample with the weight of the greedy one: (0.9 * 2 + 1) / 1.9 and (1.8 + 0) / 1.9
    tracked = [2 * (3 - (2 - 1 / 1.9)) ** 2, 4 * (2 - (2 - 2 / 1.9)) ** 2]
    assert tracker_moments(sample, Tracker(decay=0.9), 2).tolist() == pytest.approx(tracked)


def test_batches_are_those_of_training() -> None:
    sample = make_sample(21)
    apart = [second_moments(_prompts(sample, 0, 11), make_baseline("batch_mean"), 99)]
    apart.append(second_moments(_prompts(sample, 11, 21), make_baseline("batch_mean"), 99))
    torch.testing.assert_close(second_moments(sample, make_baseline("batch_mean"), 10), torch.cat(apart))


def _prompts(sample: Sample, start: int, stop: int) -> Sample:
    rows = slice(2 * start, 2 * stop)
    greedy = sample.greedy_reward[start:stop]
    return Sample(sample.reward[rows], greedy, sample.lengths[rows], norms_of(sample.norms.weights[rows]), 2)


NAMES = ("greedy", "none", "batch_mean", "calibrated_greedy", "leave_one_out", "cached_greedy")


def test_a_greedy_reward_that_says_much_pays() -> None:
    figures = {figure.name: figure for figure in compare(make_sample(agreement=0.95), SECONDS, 50, NAMES)}
    assert figures["greedy"].variance == figures["greedy"].cost == (1.0, 1.0, 1.0)
    assert figures["batch_mean"].cost[1] > 5
    assert figures["calibrated_greedy"].variance[0] == pytest.approx(1.0, abs=0.1)
    # The same variance for a quarter of the greedy decoding: (0.4 + 0.05 + 0.4) / 1.0
    assert figures["cached_greedy"].cost[0] == pytest.approx(0.85)
    assert SECONDS.of(CachedGreedy(renew_every=2)) == pytest.approx(0.9)


def test_a_greedy_reward_that_says_nothing_does_not_pay() -> None:
    figures = compare(make_sample(agreement=0.0), SECONDS, 50, NAMES)
    named = {figure.name: figure for figure in figures}
    assert [figure.cost[0] for figure in figures] == sorted(figure.cost[0] for figure in figures)
    # Var(r - g) is twice Var(r), and greedy responses cost a fifth of the time: 0.5 * 0.8
    assert named["batch_mean"].cost[0] == pytest.approx(0.4, abs=0.08)
    assert named["batch_mean"].cost[1] < named["batch_mean"].cost[0] < named["batch_mean"].cost[2] < 0.6
    assert "needs 0.4" in advice(figures)
    assert f"try model.advantage.baseline: {figures[0].name}" in advice(figures)


def test_what_is_not_clear_is_called_so() -> None:
    # Var(r - g) = (sqrt(1/4) - 1)^2 + 3/4 = 1 = Var(r), and greedy responses cost nothing here.
    figures = compare(make_sample(16, agreement=0.25), Seconds(1.0, 0.0, 1.0), 8, ("greedy", "batch_mean", "none"))
    assert figures[0].cost[2] >= 1
    assert "No baseline is clearly cheaper than the greedy one" in advice(figures)


def test_a_clearly_cheaper_baseline_is_told_behind_one_that_is_not_clear() -> None:
    figures = [
        Figure("none", 1.0, (0.5, 0.2, 1.4), 1.0, (0.5, 0.2, 1.4)),
        Figure("batch_mean", 1.0, (0.6, 0.5, 0.8), 1.0, (0.6, 0.5, 0.8)),
        Figure("greedy", 1.0, (1.0, 1.0, 1.0), 1.0, (1.0, 1.0, 1.0)),
    ]
    assert advice(figures).startswith("For a gradient of the same precision batch_mean needs 0.60")


def test_a_value_for_each_token_has_its_own_second_moment_and_the_price_of_its_pass() -> None:
    sample = make_sample(agreement=0.0)
    # As batch_mean, with gradients of half the size.
    halved = second_moments(sample, make_baseline("batch_mean"), 50).repeat_interleave(2) / 2
    sample = sample._replace(optimal=norms_of(halved))
    names = ("greedy", "batch_mean", "optimal_per_token")
    figures = {figure.name: figure for figure in compare(sample, SECONDS._replace(reading=0.2), 50, names)}
    assert figures["optimal_per_token"].variance[0] == pytest.approx(figures["batch_mean"].variance[0] / 2)
    seconds = [figures[name].seconds for name in names]
    assert seconds == pytest.approx([1.0, 0.8, 1.0])
    listed = {figure.name for figure in compare(sample._replace(optimal=None), SECONDS, 50)}
    assert "optimal_per_token" not in listed, "it was not measured"


@pytest.mark.slow
def test_intervals_cover_the_true_ratio() -> None:
    """Of 40 data sets, the 95 % interval of about 38 holds the ratio of a thousand times as many prompts."""
    truth = compare(make_sample(100_000, 0.5), SECONDS, 100_000, ("greedy", "none"))
    expected = next(figure for figure in truth if figure.name == "none").variance[0]
    whole = make_sample(40 * 64, 0.5)
    covered = 0
    for number in range(40):
        part = _prompts(whole, 64 * number, 64 * number + 64)
        figure = next(found for found in compare(part, SECONDS, 64, ("greedy", "none")) if found.name == "none")
        covered += figure.variance[1] <= expected <= figure.variance[2]
    assert covered >= 34


def test_rewards_without_any_difference_are_refused() -> None:
    sample = make_sample(8)
    with pytest.raises(UserError, match="every sampled response has the reward of its greedy one"):
        compare(sample._replace(reward=sample.greedy_reward.repeat_interleave(2)), SECONDS, 8, NAMES)


def test_table_and_picture_show_every_baseline() -> None:
    figures = compare(make_sample(), SECONDS, 50, NAMES)
    text, drawn = table(figures), ElementTree.fromstring(picture(figures))
    labels = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
    for figure in figures:
        assert f"\n{figure.name} " in text
        assert figure.name in labels
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + len(figures)


@pytest.mark.slow
def test_the_agreement_of_norms() -> None:
    true = torch.tensor([1.0, 8.0, 27.0, 64.0, 125.0, 216.0], dtype=torch.float64)
    same = agreement(true, true.pow(1 / 3), 2)
    assert same.rank_correlation == pytest.approx((1.0, 1.0, 1.0))
    assert same.slope == pytest.approx(3.0)
    ranks = agreement(true, torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0, 5.0]), 1).rank_correlation
    # Ranks 2, 1, 4, 3, 5.5, 5.5 against 1 to 6
    assert ranks[0] == pytest.approx(np.corrcoef([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 5.5, 5.5])[0, 1])
    assert ranks[1] < ranks[0] <= ranks[2]


@pytest.mark.slow(0.3)
def test_norms_of_nothing_leave_the_samples_of_a_prompt_together() -> None:
    """Rank correlations of three prompts, all draws of which are enumerated; a sample of the first has no norm."""
    true = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    cheap = torch.tensor([0.0, 3.0, 2.0, 1.0, 6.0, 5.0], dtype=torch.float64)
    groups = [[1], [2, 3], [4, 5]]
    expected = []
    for draw in product(groups, repeat=3):
        rows = [row for group in draw for row in group]
        differences = [values[rows][:, None] - values[rows] for values in (true, cheap)]
        ranks = [difference.sign().sum(1).numpy() for difference in differences]
        if all(rank.std() > 0 for rank in ranks):
            expected.append(float(np.corrcoef(*ranks)[0, 1]))
    low, high = np.quantile(expected, (0.025, 0.975))
    assert agreement(true, cheap, 2).rank_correlation[1:] == pytest.approx((low, high), abs=1e-6)
    # More samples of a prompt than norms that are left.
    few = torch.tensor([0.0, 1.0, 2.0, 3.0] + [0.0] * 4)
    assert agreement(few, few, 4).rank_correlation == pytest.approx((1.0, 1.0, 1.0))


# With models


@pytest.mark.slow
def test_norms_are_those_of_true_gradients(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", changed(healthy(tmp_path), data__init_args__batch_size=4))
    with in_folder(tmp_path):
        context = load_context(["--config", config], 8)
        context.load_data()
        context.load_models()
        context.load_reward()
        sample, seconds = measure(context, 2, lambda _: None)
        module = cast(ReMaxModule, context.module)
        generator = torch.Generator(module.device).manual_seed(4)  # that of the second batch of four prompts
        prompt = context.prompt
        second = prompt._replace(
            prompt_ids=prompt.prompt_ids[4:],
            prompt_mask=prompt.prompt_mask[4:],
            prompts=prompt.prompts[4:],
            rows=prompt.rows[4:],
        )
        module.worker.sampling = replace(module.worker.sampling, num_samples=2)
        rollout = module.worker.roll_out(module.policy, second, generator, greedy=True)
    assert seconds.rollout > 0
    assert seconds.training > 0
    assert seconds.greedy >= 0  # rounds to 0 on so small a model
    assert sample.reward[8:].tolist() == pytest.approx(rollout.reward.tolist())
    assert sample.greedy_reward[4:].tolist() == pytest.approx(cast(torch.Tensor, rollout.baseline_reward).tolist())
    assert all(weight.grad is None for weight in module.policy.parameters())
    policy: Any = module.policy
    for row in (0, 5):
        # The plain way: prompt and response without padding, and log-softmax of all logits.
        mask = rollout.sampled.response_mask[row]
        ids = second.prompt_ids[row // 2][second.prompt_mask[row // 2]], rollout.sampled.response_ids[row][mask]
        logits = policy(torch.cat(ids)[None]).logits[0, len(ids[0]) - 1 : -1]
        log_prob = logits.log_softmax(-1).gather(1, ids[1][:, None]).sum()
        weights = [weight for weight in policy.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(log_prob, weights)
        expected = sum(float(gradient.square().sum()) for gradient in gradients)
        at_logits = float((torch.nn.functional.one_hot(ids[1], logits.shape[1]) - logits.softmax(-1)).square().sum())
        assert float(sample.norms.logits[8 + row]) == pytest.approx(at_logits, rel=1e-4)
        head = policy.get_output_embeddings().weight  # shared with nothing in this model
        of_head = float(gradients[[id(weight) for weight in weights].index(id(head))].square().sum())
        assert float(cast(torch.Tensor, sample.norms.head)[8 + row]) == pytest.approx(of_head, rel=1e-4)
        states = policy(torch.cat(ids)[None], output_hidden_states=True).hidden_states[-1][0, len(ids[0]) - 1 : -1]
        by_token = torch.nn.functional.one_hot(ids[1], logits.shape[1]) - logits.softmax(-1)
        token_sum = float((by_token.square().sum(1) * states.square().sum(1)).sum())
        assert float(cast(torch.Tensor, sample.norms.head_tokens)[8 + row]) == pytest.approx(token_sum, rel=1e-4)
        assert float(sample.norms.weights[8 + row]) == pytest.approx(expected, rel=1e-4)
    check_optimal_per_token(sample, rollout, policy, second)


def check_optimal_per_token(sample: Sample, rollout: Any, policy: Any, prompt: Any) -> None:
    """The plain way: every token's gradient at the logits, the values by their formula, one gradient of the sum."""
    log_probs, norms = [], torch.zeros(rollout.sampled.response_mask.shape, dtype=torch.float64)
    for row in range(8):
        mask = rollout.sampled.response_mask[row]
        ids = prompt.prompt_ids[row // 2][prompt.prompt_mask[row // 2]], rollout.sampled.response_ids[row][mask]
        logits = policy(torch.cat(ids)[None]).logits[0, len(ids[0]) - 1 : -1]
        at_logits = torch.nn.functional.one_hot(ids[1], logits.shape[1]) - logits.softmax(-1)
        norms[row, : len(ids[1])] = at_logits.square().sum(1).detach()
        log_probs.append(logits.log_softmax(-1).gather(1, ids[1][:, None])[:, 0])
    weights, rewards = norms.cumsum(1), rollout.reward.double()
    for row in (0, 5):
        others = [other for other in range(8) if other != row]
        values = (weights[others] * rewards[others, None]).sum(0) / weights[others].sum(0)
        advantages = (rewards[row] - values)[: len(log_probs[row])]
        trained = [weight for weight in policy.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad((advantages * log_probs[row]).sum(), trained)
        expected = sum(float(gradient.square().sum()) for gradient in gradients)
        assert sample.optimal is not None
        assert float(sample.optimal.weights[8 + row]) == pytest.approx(expected, rel=1e-4)
        at_logits = float((advantages.square() * norms[row, : len(advantages)]).sum())
        assert float(sample.optimal.logits[8 + row]) == pytest.approx(at_logits, rel=1e-4)


@pytest.mark.slow
def test_the_command_prints_writes_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", changed(healthy(tmp_path), data__init_args__batch_size=4))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    files = ["--json", str(tmp_path / "out.json"), "--picture", str(tmp_path / "out.svg")]
    with in_folder(tmp_path):
        outcome = remax(capsys, "baselines", "--config", config, "--num_prompts", "8", *files)
    assert outcome.code == 0, outcome.err
    assert {path for path in tmp_path.rglob("*") if path.is_file()} - before == {
        tmp_path / "out.json",
        tmp_path / "out.svg",
    }
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["num_prompts"] == 8
    names = [line["name"] for line in written["baselines"]]
    assert {"greedy", "batch_mean", "calibrated_greedy", "optimal_per_token", "tracker", "none"} <= set(names)
    assert "Norms at the logits, which a run is monitored by: rank correlation" in outcome.out
    assert -1 <= written["norms_at_logits"]["rank_correlation"][0] <= 1
    assert [line.split()[0] for line in outcome.out.splitlines() if line.startswith(tuple(names))] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_prompts", "3"], "--num_prompts must be at least 8, got 3"),
        (["--json", "nowhere/out.json"], "--json: there is no folder 'nowhere'"),
        (["--json", "/"], "--json must be a file, and / is a folder"),
        (["--picture", "nowhere/out.svg"], "--picture: there is no folder 'nowhere'"),
    ],
)
def test_arguments_that_do_not_fit(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = remax(capsys, "baselines", "--config", "demo", *arguments)
    assert outcome.code == 2
    assert message in outcome.err


@pytest.mark.slow
def test_another_stage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with in_folder(tmp_path):
        outcome = remax(capsys, "baselines", "--config", write_config(tmp_path / "run.yaml", supervised(tmp_path)))
    assert outcome.code == 2
    assert "remax baselines needs ReMaxModule, got SFTModule" in outcome.err
