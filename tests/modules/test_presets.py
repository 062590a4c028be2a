"""The shipped presets against `parity.md`: their choices, and the numbers that these make of a random rollout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracles import advantages as oracle
from oracles import cases, estimates
from torch import Tensor

from remax_lightning.functional import TokenStatistics
from remax_lightning.modules import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.rollout import SamplingConfig
from remax_lightning.training.experience import Experience
from remax_lightning.training.objective import Objective
from remax_lightning.types import PromptBatch, Responses, Rollout

FOLDER = Path(__file__).parents[2] / "configs" / "presets"
NAMES = ("reference", "model_card", "verl", "openrlhf", "openrlhf_script")
Matrix = list[list[float]]


def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"]["init_args"]


def objective(name: str) -> Objective:
    loaded = settings(name)
    samples = SamplingConfig(**loaded["sampling"]).num_samples
    return Objective(
        KLConfig(**loaded["kl"]), AdvantageConfig(**loaded["advantage"]), LossConfig(**loaded["loss"]), samples
    )


def random_rollout(num_samples: int, seed: int) -> tuple[Rollout, Tensor]:
    """A rollout of six prompts whose old log-probs differ from the policy's, and the policy's."""
    case = cases.make(num_samples, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    now = -3 * torch.rand(case.mask.shape, generator=generator, dtype=torch.float64)
    drift = torch.randn(case.mask.shape, generator=generator, dtype=torch.float64)
    ids, some = torch.zeros(case.mask.shape, dtype=torch.long), torch.zeros(len(case.reward), dtype=torch.bool)
    prompt = PromptBatch(ids[:6, :1], case.mask[:6, :1], [""] * 6, [{}] * 6)
    sampled = Responses(ids, case.mask, some, [""] * len(case.reward))
    rollout = Rollout(prompt, sampled, None, case.reward, case.baseline_reward, {}, now - case.log_ratio, now - drift)
    return rollout, now


def random_full_kl(seed: int) -> Tensor:
    """A KL over the vocabulary, which no log-probs of sampled tokens tell."""
    shape = cases.make(1, seed=seed).mask.shape
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)


def expected_advantages(name: str, rollout: Rollout, now: Tensor, full_kl: Tensor) -> Matrix:
    reward, mask = rollout.reward.tolist(), rollout.sampled.response_mask.tolist()
    kl = (now - rollout.reference_log_probs).tolist()
    greedy = oracle.greedy(rollout.baseline_reward.tolist(), rollout.num_samples)
    if name == "reference":
        return oracle.reference_implementation(reward, greedy, kl, mask, beta=0.05, gamma=0.99, bound=5.0)
    if name == "model_card":
        full = full_kl.tolist()
        return oracle.reference_implementation(reward, greedy, full, mask, beta=0.1, gamma=0.99, bound=1.0)
    if name == "verl":
        return oracle.verl(reward, greedy, kl, mask, beta=0.001)
    if name == "openrlhf_script":
        nothing = [[0.0] * len(row) for row in kl]
        return oracle.openrlhf(reward, oracle.group_mean(reward, 8), nothing, mask, beta=0.0, bound=10.0)
    clamped = [[estimates.kl_estimate(value, "k1", 10.0) for value in row] for row in kl]
    return oracle.openrlhf(reward, oracle.group_mean(reward, 4), clamped, mask, beta=0.01, bound=10.0)


def advantages_of(ours: Objective, rollout: Rollout, stats: TokenStatistics, kl_coef: float) -> Tensor:
    experience = Experience(rollout, torch.tensor([100.0]))
    advantages = ours.with_advantages(experience, stats, kl_coef, lambda values: values).advantages
    assert advantages is not None
    return advantages


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_advantages_and_loss(name: str, seed: int) -> None:
    ours = objective(name)
    rollout, now = random_rollout(settings(name)["sampling"]["num_samples"], seed)
    full_kl = random_full_kl(seed)
    stats = TokenStatistics(now, kl=full_kl if name == "model_card" else None)
    found = advantages_of(ours, rollout, stats, settings(name)["kl_coef"])
    expected = expected_advantages(name, rollout, now, full_kl)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)

    normalizer = torch.tensor(100.0)  # the tokens of an optimizer step of which this rollout is a part
    loss, clip_fraction = ours.loss(
        now.clone().requires_grad_(), Experience(rollout, normalizer[None], found), normalizer
    )
    mask = rollout.sampled.response_mask.tolist()
    if name in ("reference", "model_card"):
        own_tokens = sum(map(sum, mask))
        wanted, clipped = estimates.reinforce_loss(now.tolist(), expected, mask, own_tokens), 0.0
    else:
        dual = 3.0 if name == "verl" else None
        old = rollout.log_probs.tolist()
        wanted, clipped = estimates.clipped_surrogate(now.tolist(), old, expected, mask, 100.0, 0.2, dual)
        assert 0 < clipped < 1
    if name == "openrlhf_script":  # the mean over tokens of k2, clamped, beside the surrogate
        ratios = (now - rollout.reference_log_probs).tolist()
        pairs = [pair for rows in zip(ratios, mask, strict=True) for pair in zip(*rows, strict=True)]
        wanted += 1e-5 * sum(estimates.kl_estimate(ratio, "k2", 10.0) for ratio, counts in pairs if counts) / 100.0
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    assert clip_fraction.item() == pytest.approx(clipped)


@pytest.mark.parametrize("name", ["verl", "openrlhf"])
def test_first_update_of_a_clipped_preset_is_plain_reinforce(name: str) -> None:
    ours = objective(name)
    rollout, now = random_rollout(settings(name)["sampling"]["num_samples"], 0)
    leaf = now.clone().requires_grad_()
    advantages = advantages_of(ours, rollout, TokenStatistics(now), 0.01)
    loss, clip_fraction = ours.loss(
        leaf, Experience(rollout._replace(log_probs=None), torch.tensor([50.0]), advantages), torch.tensor(50.0)
    )
    loss.backward()
    torch.testing.assert_close(leaf.grad, -advantages / 50)
    assert clip_fraction == 0


# Rows 1 to 18 of parity.md, as far as a preset can say them.
GOLDEN: dict[str, dict[str, Any]] = {
    "reference": {
        "advantage.baseline": "greedy", "kl.in_baseline": False, "kl.credit": "one_step", "kl.estimator": "k1",
        "kl.clamp": None, "kl_coef": 0.05, "advantage.gamma": 0.99, "advantage.reward_clip": 5.0,
        "advantage.reward_clip_at": "after_baseline", "advantage.whiten": False, "loss.kind": "reinforce",
        "loss.normalizer": "micro_batch", "sampling.temperature": 1.0, "sampling.top_p": 0.9, "sampling.top_k": 50,
        "sampling.scale_log_probs": False, "sampling.num_samples": 1, "sampling.min_p": 0.0,
    },
    "model_card": {
        "advantage.baseline": "greedy", "kl.credit": "one_step", "kl.estimator": "full", "kl.clamp": None,
        "kl_coef": 0.1, "advantage.gamma": 0.99,
        "advantage.reward_clip": 1.0, "advantage.reward_clip_at": "after_baseline", "loss.kind": "reinforce",
        "loss.normalizer": "micro_batch", "sampling.temperature": 0.7, "sampling.top_p": 0.9, "sampling.top_k": 50,
        "sampling.scale_log_probs": False, "sampling.max_response_length": 384, "optimizer.init_args.lr": 5e-7,
    },
    "verl": {
        "advantage.baseline": "greedy", "kl.in_baseline": False, "kl.credit": "to_go", "kl.estimator": "k1",
        "kl.clamp": None, "kl_coef": 0.001, "advantage.gamma": 1.0, "advantage.reward_clip": None,
        "advantage.whiten": False, "loss.kind": "clipped", "loss.clip_range": 0.2, "loss.dual_clip": 3.0,
        "loss.normalizer": "tokens", "sampling.temperature": 1.0, "sampling.top_p": 1.0, "sampling.top_k": 0,
        "sampling.scale_log_probs": True, "sampling.num_samples": 4, "sampling.min_p": 0.0,
    },
    "openrlhf": {
        "advantage.baseline": "group_mean", "kl.in_baseline": False, "kl.credit": "to_go", "kl.clamp": 10.0,
        "kl.estimator": "k1",
        "kl_coef": 0.01, "advantage.gamma": 1.0, "advantage.reward_clip": 10.0,
        "advantage.reward_clip_at": "after_baseline", "advantage.whiten": True, "loss.kind": "clipped",
        "loss.clip_range": 0.2, "loss.dual_clip": None, "loss.normalizer": "tokens", "sampling.temperature": 1.0,
        "sampling.top_p": 1.0, "sampling.top_k": 0, "sampling.scale_log_probs": True, "sampling.min_p": 0.0,
    },
    "openrlhf_script": {
        "advantage.baseline": "group_mean", "kl.in_baseline": False, "kl.credit": "none", "kl.clamp": 10.0,
        "kl.estimator": "k1",
        "kl_coef": 0.0, "kl.loss_coef": 1e-5, "kl.loss_estimator": "k2", "sampling.num_samples": 8,
        "optimizer.init_args.lr": 5e-7, "advantage.gamma": 1.0, "advantage.reward_clip": 10.0,
        "advantage.reward_clip_at": "after_baseline", "advantage.whiten": True, "loss.kind": "clipped",
        "loss.clip_range": 0.2, "loss.dual_clip": None, "loss.normalizer": "tokens", "sampling.temperature": 1.0,
        "sampling.top_p": 1.0, "sampling.top_k": 0, "sampling.scale_log_probs": True, "sampling.min_p": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_choices_are_those_of_the_implementation(name: str) -> None:
    loaded = settings(name)
    made = {
        "kl": KLConfig(**loaded["kl"]),
        "advantage": AdvantageConfig(**loaded["advantage"]),
        "loss": LossConfig(**loaded["loss"]),
        "sampling": SamplingConfig(**loaded["sampling"]),
    }
    for key, expected in GOLDEN[name].items():
        group, _, field = key.partition(".")
        found = getattr(made[group], field) if group in made else loaded[group]
        for step in field.split(".") if group == "optimizer" else ():
            found = found[step]
        assert found == expected, key
    assert made["kl"].loss_coef == GOLDEN[name].get("kl.loss_coef", 0)
    assert made["advantage"].overlong == "keep"


def test_every_preset_is_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(NAMES)


def test_model_card_names_its_prompt_length() -> None:
    loaded = yaml.safe_load((FOLDER / "model_card.yaml").read_text())
    assert loaded["data"]["init_args"]["max_prompt_length"] == 384


def test_the_default_is_unbiased() -> None:
    ours = Objective(KLConfig(), AdvantageConfig(), LossConfig(), 1)
    rollout, now = random_rollout(1, 0)
    found = advantages_of(ours, rollout, TokenStatistics(now), 0.05)
    kl = (now - rollout.reference_log_probs).tolist()
    mask = rollout.sampled.response_mask.tolist()
    expected = oracle.verl(rollout.reward.tolist(), rollout.baseline_reward.tolist(), kl, mask, beta=0.05)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    assert not SamplingConfig().truncates
    assert SamplingConfig().scale_log_probs
