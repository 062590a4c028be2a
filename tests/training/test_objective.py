"""The objective: what is charged, compared and trained on, by hand; and the gradient, by enumeration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from remax_lightning.config import AdvantageConfig, KLConfig, LossConfig, SamplingConfig
from remax_lightning.functional import reinforce_loss, token_statistics
from remax_lightning.models.sampling import SuppressedTokens, make_sampling_mask
from remax_lightning.training.objective import Objective
from remax_lightning.types import PromptBatch, Responses, Rollout


def two_responses(lengths: tuple[int, int], truncated: tuple[bool, bool]) -> tuple[Rollout, Tensor]:
    """One prompt with two samples of reward 1, and their response mask."""
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    prompt = PromptBatch(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool), [""], [{}])
    ids = torch.ones(2, 5, dtype=torch.long)
    sampled = Responses(ids, mask, torch.tensor(truncated), [""] * 2)
    return Rollout(prompt, sampled, None, torch.ones(2), None, {}, -torch.ones(2, 5), None), mask


@pytest.mark.parametrize("overlong", ["keep", "mask"])
def test_a_masked_sibling_pays_its_kl_in_the_baseline(overlong: str) -> None:
    """1 nat per token at 0.1: the other sample's reward minus KL is 1 - 0.5, whether it is trained on or not."""
    rollout, mask = two_responses((3, 5), (False, True))
    config = AdvantageConfig("leave_one_out", overlong=overlong)
    objective = Objective(KLConfig(in_baseline=True), config, LossConfig(), num_samples=2)
    advantages = objective.advantages(rollout, mask.float(), 0.1, lambda x: x)
    assert advantages[0].tolist() == pytest.approx([0.5 - 0.3, 0.5 - 0.2, 0.5 - 0.1, 0, 0])
    assert (advantages[1] == 0).all() == (overlong == "mask")


def test_whitening_counts_trained_tokens_alone() -> None:
    rollout, mask = two_responses((3, 5), (False, True))
    rollout = rollout._replace(reward=torch.tensor([1.0, 9.0]))
    config = AdvantageConfig("leave_one_out", overlong="mask", whiten=True)
    objective = Objective(KLConfig(credit="to_go"), config, LossConfig(), num_samples=2)
    advantages = objective.advantages(rollout, mask.float(), 0.1, lambda x: x)
    assert advantages[0, :3].mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages[0, :3].square().mean().item() == pytest.approx(1, abs=1e-5)


def test_normalized_parts_are_trained_on_and_the_plain_sum_is_kept() -> None:
    """Two prompts with a sample each: the parts are 3 and -1 above their greedy values, and 0 and 40."""
    rollout, mask = two_responses((3, 5), (False, True))
    prompt = PromptBatch(torch.ones(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool), ["", ""], [{}, {}])
    rollout = rollout._replace(
        prompt=prompt,
        greedy=rollout.sampled,
        reward_parts={"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([7.0, 50.0]), "b/inner": torch.zeros(2)},
        baseline_parts={"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([7.0, 10.0]), "b/inner": torch.zeros(2)},
    )
    objective = Objective(KLConfig(), AdvantageConfig(reward_clip=2.0), LossConfig(), num_samples=1)
    penalty = torch.tensor([0.25, 0.0])
    normalized = objective.normalize(rollout, {"a": 1.0, "b": 0.5}, penalty, lambda sums: sums)
    # sigma_a = sqrt((9 + 1) / 2), sigma_b = sqrt((0 + 1600) / 2)
    expected = torch.tensor([3 / 5**0.5 - 0.25, -1 / 5**0.5 + 0.5 * 40 / 800**0.5])
    assert normalized.normalized_reward is not None
    torch.testing.assert_close(normalized.normalized_reward, expected)
    torch.testing.assert_close(normalized.reward, rollout.reward)
    advantages = objective.advantages(normalized, None, 0.0, lambda x: x)
    torch.testing.assert_close(advantages, expected[:, None] * mask)
    # A bound is one of the normalized sum.
    tight = Objective(KLConfig(), AdvantageConfig(reward_clip=0.3), LossConfig(), num_samples=1)
    clipped = tight.advantages(normalized, None, 0.0, lambda x: x)
    torch.testing.assert_close(clipped, expected.clamp(-0.3, 0.3)[:, None] * mask)
    # A micro-batch keeps the scale of the whole.
    second = normalized.micro_batch(1, 2)
    torch.testing.assert_close(objective.advantages(second, None, 0.0, lambda x: x), advantages[1:])
    assert second.baseline_parts is not None
    assert second.baseline_parts["b"].tolist() == [10.0]


@pytest.mark.parametrize("leaves_out", [True, False])
def test_a_blocked_eos_gains_nothing(leaves_out: bool) -> None:
    """The exact gradient of the first token over what can be drawn, EOS (id 0) being blocked there.

    Only where the trained softmax leaves the blocked EOS out is the gradient that of the expected reward. Otherwise
    EOS, which no sample can punish, moves with every step.
    """
    logits = torch.tensor([1.0, 0.3, -0.4, 0.2], dtype=torch.float64, requires_grad=True)
    suppressed = SuppressedTokens((), (0,), 1) if leaves_out else SuppressedTokens()
    mask = make_sampling_mask(SamplingConfig(), suppressed, torch.tensor([0]))
    drawn = logits.detach()[1:].softmax(-1)
    gradient = torch.zeros(4, dtype=torch.float64)
    for token, reward in zip((1, 2, 3), (0.5, -1.0, 0.25), strict=True):
        stats = token_statistics(logits.view(1, 1, 4), torch.tensor([[token]]), sampling_mask=mask)
        loss = reinforce_loss(
            stats.log_probs, torch.full((1, 1), reward, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool), 1.0
        )
        gradient += drawn[token - 1] * torch.autograd.grad(loss, logits)[0]
    # The policy gradient of E[reward] under what is drawn.
    free = logits.detach().clone().requires_grad_()
    value = (free[1:].softmax(-1) * torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64)).sum()
    (expected,) = torch.autograd.grad(-value, free)
    assert torch.allclose(gradient, expected, atol=1e-12) == leaves_out
    assert (gradient[0].abs().item() < 1e-12) == leaves_out
