"""Identities that hold exactly: against enumeration, and between the losses."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from oracles import enumeration as exact
from torch import Tensor

from remax_lightning.functional import (
    clipped_surrogate_loss,
    kl_estimate,
    kl_loss,
    optimal_per_token,
    reinforce_loss,
    remax_advantages,
    response_mask,
    token_statistics,
)

BETA = 0.3
RESPONSES = exact.responses()
PREFIXES = exact.prefixes()


class Problem(NamedTuple):
    table: Tensor
    reference: Tensor
    reward: dict[exact.Response, float]


def make_problem(seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    table, reference = torch.randn(2, len(PREFIXES), exact.VOCABULARY, generator=generator, dtype=torch.float64)
    reward = 2 * torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64) + 1
    return Problem(table, reference, dict(zip(RESPONSES, reward.tolist(), strict=True)))


def log_probs_of(table: Tensor, responses: list[exact.Response]) -> tuple[Tensor, Tensor]:
    """Log-probs and mask `[S, 3]` as training makes them; the padding is EOS, and its logits are NaN."""
    ids = torch.tensor([[*response, *[exact.EOS] * (exact.MAX_LENGTH - len(response))] for response in responses])
    mask = response_mask(ids, [exact.EOS])
    nothing = torch.full((exact.VOCABULARY,), float("nan"), dtype=torch.float64)
    logits = torch.stack(
        [
            torch.stack(
                [table[PREFIXES.index(response[:t])] if t < len(response) else nothing for t in range(exact.MAX_LENGTH)]
            )
            for response in responses
        ]
    )
    return token_statistics(logits, ids).log_probs, mask


def expected_gradient(problem: Problem, num_samples: int, **options: Any) -> Tensor:
    """The gradient of the ReMax objective of one prompt, averaged over all draws of `num_samples` responses."""
    draws = list(product(RESPONSES, repeat=num_samples))
    responses = [response for draw in draws for response in draw]
    table = problem.table.clone().requires_grad_()
    log_probs, mask = log_probs_of(table, responses)
    reference_log_probs, _ = log_probs_of(problem.reference, responses)
    reward = torch.tensor([problem.reward[response] for response in responses], dtype=torch.float64)
    if options.get("baseline", "greedy") == "greedy":
        greedy = problem.reward[exact.greedy_response(problem.table)]
        options["baseline_reward"] = torch.full((len(draws),), greedy, dtype=torch.float64)
    kl = kl_estimate(log_probs - reference_log_probs, options.pop("estimator", "k1"))
    advantages = remax_advantages(reward, mask, num_samples=num_samples, kl=kl, **options)
    probability = torch.where(mask, log_probs.detach(), 0.0).sum(dim=1).exp()
    weight = probability.view(-1, num_samples).prod(dim=1).repeat_interleave(num_samples)
    # The normalizer of one response is 1: the sum over its tokens.
    loss = reinforce_loss(log_probs, advantages * weight[:, None], mask, float(num_samples))
    (gradient,) = torch.autograd.grad(-loss, table)
    return gradient


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_there_are_fifteen_responses_and_their_probabilities_sum_to_one() -> None:
    problem = make_problem(0)
    assert len(RESPONSES) == 15
    assert len(PREFIXES) == 7
    total = sum(exact.log_probability(problem.table, response).exp().item() for response in RESPONSES)
    assert total == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("baseline", ["greedy", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_expected_gradient_is_the_policy_gradient(seed: int, baseline: str) -> None:
    problem = make_problem(seed)
    exact_gradient = exact.exact_gradient(problem.table, problem.reward, problem.reference, beta=0.0)
    assert_same(expected_gradient(problem, 1, baseline=baseline), exact_gradient)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("baseline", ["greedy", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_kl_to_go_gives_the_gradient_of_the_regularized_objective(seed: int, baseline: str, estimator: str) -> None:
    problem = make_problem(seed)
    exact_gradient = exact.exact_gradient(problem.table, problem.reward, problem.reference, BETA)
    actual = expected_gradient(problem, 1, baseline=baseline, kl_coef=BETA, estimator=estimator)
    if estimator == "k1":
        assert_same(actual, exact_gradient)
    else:
        # k3 has the mean of k1 but depends on the policy otherwise: as a reward it has another gradient.
        assert (actual - exact_gradient).abs().max() > 1e-3


def test_one_step_kl_is_biased() -> None:
    problem = make_problem(0)
    exact_gradient = exact.exact_gradient(problem.table, problem.reward, problem.reference, BETA)
    one_step = expected_gradient(problem, 1, kl_coef=BETA, kl_credit="one_step")
    assert (one_step - exact_gradient).abs().max() > 1e-3


@pytest.mark.parametrize("kl_in_baseline", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_leave_one_out_is_unbiased_over_all_pairs(seed: int, kl_in_baseline: bool) -> None:
    problem = make_problem(seed)
    exact_gradient = exact.exact_gradient(problem.table, problem.reward, problem.reference, BETA)
    actual = expected_gradient(problem, 2, baseline="leave_one_out", kl_coef=BETA, kl_in_baseline=kl_in_baseline)
    assert_same(actual, exact_gradient)


def test_greedy_baseline_is_unbiased_over_all_pairs() -> None:
    problem = make_problem(0)
    exact_gradient = exact.exact_gradient(problem.table, problem.reward, problem.reference, BETA)
    assert_same(expected_gradient(problem, 2, kl_coef=BETA), exact_gradient)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("seed", range(2))
def test_a_baseline_of_each_token_is_unbiased_over_all_pairs(seed: int) -> None:
    """Weighted by the other response's gradients; with one's own among the weights it is not."""
    problem = make_problem(seed)
    draws = list(product(RESPONSES, repeat=2))
    responses = [response for draw in draws for response in draw]
    table = problem.table.clone().requires_grad_()
    log_probs, mask = log_probs_of(table, responses)
    norms = torch.where(mask, (1 - log_probs.detach().exp()).square(), 0.0)  # any function of the response
    reward = torch.tensor([problem.reward[response] for response in responses], dtype=torch.float64)
    probability = torch.where(mask, log_probs.detach(), 0.0).sum(dim=1).exp().view(-1, 2).prod(1)
    exact_gradient = exact.exact_gradient(problem.table, problem.reward, problem.reference, beta=0.0)
    for pairs, is_exact in ((optimal_per_token, True), (own_included, False)):
        baseline = torch.cat([pairs(reward[i : i + 2], norms[i : i + 2]) for i in range(0, len(reward), 2)])  # [S, R]
        advantages = remax_advantages(reward, mask, baseline=baseline)
        loss = reinforce_loss(log_probs, advantages * probability.repeat_interleave(2)[:, None], mask, 2.0)
        (gradient,) = torch.autograd.grad(-loss, table, retain_graph=True)
        if is_exact:
            assert_same(gradient, exact_gradient)
        else:
            assert (gradient - exact_gradient).abs().max() > 1e-3


def own_included(reward: Tensor, norms: Tensor) -> Tensor:
    weights = norms.cumsum(1)
    return ((weights * reward[:, None]).sum(0) / weights.sum(0)).expand_as(norms)


def test_group_mean_scales_the_expected_gradient() -> None:
    problem = make_problem(0)
    exact_gradient = exact.exact_gradient(problem.table, problem.reward, problem.reference, beta=0.0)
    assert_same(expected_gradient(problem, 2, baseline="group_mean"), exact_gradient / 2)


# A reward for each token


def token_rewards(seed: int) -> dict[exact.Response, list[float]]:
    """A reward for each token, which depends on the tokens before it."""
    generator = torch.Generator().manual_seed(100 + seed)
    table = torch.randn(len(PREFIXES), exact.VOCABULARY, generator=generator, dtype=torch.float64) + 0.5
    return {
        response: [table[PREFIXES.index(response[:t])][token].item() for t, token in enumerate(response)]
        for response in RESPONSES
    }


def padded(rows: list[list[float]]) -> Tensor:
    width = exact.MAX_LENGTH
    return torch.tensor([row + [float("nan")] * (width - len(row)) for row in rows], dtype=torch.float64)


def expected_token_gradient(problem: Problem, rewards: dict[exact.Response, list[float]], **options: Any) -> Tensor:
    """The gradient for rewards of tokens, averaged over all draws of `num_samples` responses to one prompt."""
    num_samples = options["num_samples"]
    draws = list(product(RESPONSES, repeat=num_samples))
    responses = [response for draw in draws for response in draw]
    table = problem.table.clone().requires_grad_()
    log_probs, mask = log_probs_of(table, responses)
    reference_log_probs, _ = log_probs_of(problem.reference, responses)
    if options["baseline"] == "greedy":
        greedy = exact.greedy_response(problem.table)
        options["baseline_reward"] = padded([rewards[greedy]] * len(draws))
        options["baseline_mask"] = (torch.arange(exact.MAX_LENGTH) < len(greedy)).expand(len(draws), -1)
    kl = kl_estimate(log_probs - reference_log_probs, "k1")
    advantages = remax_advantages(padded([rewards[response] for response in responses]), mask, kl=kl, **options)
    probability = torch.where(mask, log_probs.detach(), 0.0).sum(dim=1).exp()
    weight = probability.view(-1, num_samples).prod(dim=1).repeat_interleave(num_samples)
    loss = reinforce_loss(log_probs, advantages * weight[:, None], mask, float(num_samples))
    (gradient,) = torch.autograd.grad(-loss, table)
    return gradient


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    ("baseline", "num_samples"), [("greedy", 1), ("greedy", 2), ("none", 1), ("leave_one_out", 2), ("group_mean", 2)]
)
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_rewards_of_tokens_give_the_gradient_of_their_expected_sum(
    baseline: str, num_samples: int, beta: float
) -> None:
    for seed in range(3):
        problem, rewards = make_problem(seed), token_rewards(seed)
        assert len({len(exact.greedy_response(make_problem(seed).table)) for seed in range(3)}) > 1  # shorter ones too
        totals = {response: sum(values) for response, values in rewards.items()}
        if baseline == "group_mean":  # its own sample is in the mean; the KL is not
            expected = exact.exact_gradient(problem.table, totals, problem.reference, 0.0) / 2
            expected += exact.exact_gradient(problem.table, dict.fromkeys(totals, 0.0), problem.reference, beta)
        else:
            expected = exact.exact_gradient(problem.table, totals, problem.reference, beta)
        actual = expected_token_gradient(problem, rewards, baseline=baseline, num_samples=num_samples, kl_coef=beta)
        assert_same(actual, expected)


def test_a_token_is_not_charged_with_what_came_before() -> None:
    """Less variance than the whole reward on every token, with the same mean."""
    problem, rewards = make_problem(0), token_rewards(0)
    _, mask = log_probs_of(problem.table, RESPONSES)
    to_go = remax_advantages(padded([rewards[response] for response in RESPONSES]), mask, baseline="none")
    for row, response in zip(to_go.tolist(), RESPONSES, strict=True):
        assert row[: len(response)] == pytest.approx([sum(rewards[response][t:]) for t in range(len(response))])
        assert row[len(response) :] == [0.0] * (exact.MAX_LENGTH - len(response))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("seed", range(3))
def test_mean_estimate_is_the_exact_kl(seed: int, estimator: Any) -> None:
    problem = make_problem(seed)
    log_probs, mask = log_probs_of(problem.table, RESPONSES)
    reference_log_probs, _ = log_probs_of(problem.reference, RESPONSES)
    probability = torch.where(mask, log_probs, 0.0).sum(dim=1).exp()
    kl = torch.where(mask, kl_estimate(log_probs - reference_log_probs, estimator), 0.0).sum(dim=1)
    expected = exact.exact_kl(problem.table, problem.reference).item()
    assert expected > 0.1
    assert (probability * kl).sum().item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_expected_gradient_of_a_kl_loss(estimator: Any) -> None:
    """Over one token: k2 gives that of KL(policy || reference), k3 that of KL(reference || policy)."""
    logits, reference_logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    policy, reference = logits.log_softmax(0), reference_logits.log_softmax(0)
    if estimator == "k2":
        divergence = (policy.exp() * (policy - reference)).sum()
    else:
        divergence = (reference.exp() * (reference - policy)).sum()
    (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    actual = torch.zeros_like(expected)
    for token in range(5):
        loss = kl_loss((policy - reference)[token].view(1, 1), mask, 1.0, estimator)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        actual += policy[token].exp().detach() * gradient
    assert_same(actual, expected)


class Batch(NamedTuple):
    logits: Tensor
    ids: Tensor
    reference_log_probs: Tensor
    reward: Tensor
    baseline_reward: Tensor


def make_batch(prompts: int = 8, length: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(prompts, length, 7, generator=generator)
    ids = torch.randint(0, 7, (prompts, length), generator=generator)
    reference_log_probs = -2 * torch.rand(prompts, length, generator=generator)
    reward, baseline_reward = torch.randn(2, prompts, generator=generator)
    return Batch(logits, ids, reference_log_probs, reward, baseline_reward)


def test_one_step_kl_in_the_reward_has_the_gradient_of_a_k2_loss() -> None:
    batch = make_batch()
    mask = response_mask(batch.ids, [2])
    logits = batch.logits.double().requires_grad_()
    log_probs = token_statistics(logits, batch.ids).log_probs
    log_ratio = log_probs - batch.reference_log_probs
    options: dict[str, Any] = {"baseline_reward": batch.baseline_reward, "gamma": 0.99, "reward_clip": 5.0}
    shaped = remax_advantages(
        batch.reward, mask, kl=kl_estimate(log_ratio, "k1"), kl_coef=0.05, kl_credit="one_step", **options
    )
    plain = remax_advantages(batch.reward, mask, **options)
    in_reward = reinforce_loss(log_probs, shaped, mask, 9.0)
    in_loss = reinforce_loss(log_probs, plain, mask, 9.0) + 0.05 * kl_loss(log_ratio, mask, 9.0, "k2")
    (expected,) = torch.autograd.grad(in_reward, logits, retain_graph=True)
    (actual,) = torch.autograd.grad(in_loss, logits, retain_graph=True)
    (without,) = torch.autograd.grad(reinforce_loss(log_probs, plain, mask, 9.0), logits)
    assert (without - expected).abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_surrogate_at_ratio_one_has_the_gradient_of_reinforce(dual_clip: float | None) -> None:
    batch = make_batch()
    mask = response_mask(batch.ids, [2])
    logits = batch.logits.double().requires_grad_()
    log_probs = token_statistics(logits, batch.ids).log_probs
    advantages = remax_advantages(batch.reward, mask, baseline_reward=batch.baseline_reward)
    surrogate = clipped_surrogate_loss(log_probs, log_probs.detach(), advantages, mask, 9.0, dual_clip=dual_clip)
    (actual,) = torch.autograd.grad(surrogate.loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(reinforce_loss(log_probs, advantages, mask, 9.0), logits)
    assert_same(actual, expected)
    assert surrogate.clip_fraction.item() == 0.0


def step_gradient(batch: Batch, splits: int, padding: int) -> Tensor:
    """Gradient of a float32 step in `splits` parts, each response `padding` tokens longer than it need be."""
    logits = batch.logits.clone().requires_grad_()
    tokens = response_mask(batch.ids, [2]).sum()
    size = batch.ids.shape[0] // splits
    for split in range(splits):
        rows = slice(split * size, (split + 1) * size)
        real = response_mask(batch.ids[rows], [2])
        garbage = torch.full((size, padding), float("nan"))
        mask = torch.cat([real, torch.zeros(size, padding, dtype=torch.bool)], dim=1)
        log_probs = torch.cat([token_statistics(logits[rows], batch.ids[rows]).log_probs, garbage], dim=1)
        log_ratio = log_probs - torch.cat([batch.reference_log_probs[rows], garbage], dim=1)
        advantages = remax_advantages(
            batch.reward[rows],
            mask,
            baseline_reward=batch.baseline_reward[rows],
            kl=kl_estimate(log_ratio, "k1"),
            kl_coef=0.1,
            gamma=0.99,
        )
        old = log_probs.detach() + 0.3 * advantages
        loss = reinforce_loss(log_probs, advantages, mask, tokens)
        loss = loss + clipped_surrogate_loss(log_probs, old, advantages, mask, tokens).loss
        loss = loss + 0.1 * kl_loss(log_ratio, mask, tokens, "k3", clamp=10.0)
        loss.backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("padding", [0, 1, 50])
def test_gradient_depends_on_neither_split_nor_padding(splits: int, padding: int) -> None:
    batch = make_batch()
    torch.testing.assert_close(step_gradient(batch, splits, padding), step_gradient(batch, 1, 0), rtol=1e-5, atol=1e-7)
