"""`model.loss.mismatch` in a run: the gradient, what is logged, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import PromptEngine, distance, fit, prompt_data, remax_module, save_policy
from oracles import policies

from remax_lightning.config import LossConfig, MismatchConfig
from remax_lightning.errors import UserError
from remax_lightning.rollout import GenerationOutput, GenerationRequest
from remax_lightning.training.experience import Experience
from remax_lightning.training.rollouts import RolloutBuffer


class RoundingEngine(PromptEngine):
    """Draws with other log-probs than the policy's: those of a policy moved by noise, token by token."""

    def __init__(self, noise: float = 0.5) -> None:
        self.noise = noise

    def generate(self, model: Any, request: GenerationRequest) -> GenerationOutput:
        output = super().generate(model, request)
        if not request.return_log_probs:
            return output
        rows = []
        for row, mask, response in zip(request.prompt_ids, request.prompt_mask, output.sampled_ids, strict=True):
            ids = torch.cat([row[mask], response])[None]
            log_probs = model(ids).logits[0, mask.sum() - 1 : -1].log_softmax(-1)
            noise = torch.randn(len(response), generator=torch.Generator().manual_seed(int(response.sum())))
            rows.append(log_probs.gather(-1, response[:, None]).squeeze(-1) + self.noise * noise)
        return output._replace(log_probs=torch.stack(rows))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def fitted(policy: str, folder: Path, splits: int = 1, updates: int = 1, **options: Any) -> Any:
    options = {"rollout": RoundingEngine(), **options}
    data = prompt_data(folder, policy, micro_batch_size=8 // splits)
    return fit(
        remax_module(policy, **options), data, folder, accumulate_grad_batches=splits // updates, max_steps=updates
    )


def expected(policy: str, recorder: Any, config: MismatchConfig) -> tuple[dict[str, Any], dict[str, float]]:
    """The gradient and the figures of the first step, in double precision, one unpadded response after the other."""
    model = policies.load(policy)
    loss, tokens, kls, ratios, cuts = torch.zeros(()), 0, [], [], []
    for part in (output["rollout"] for output in recorder.outputs):
        for i, (prompt, response) in enumerate(policies.rows(part)):
            ours = policies.log_probs(model, prompt, response)
            theirs = part.engine_log_probs[i, : len(response)].tolist()
            advantage = float(part.reward[i] - part.baseline_reward[i])
            row = [math.exp(a.item() - b) for a, b in zip(ours, theirs, strict=True)]
            kls += [ratio - 1 - math.log(ratio) for ratio in row]
            if config.level == "response":
                row = [math.prod(row)] * len(row)
            weights = [weight(ratio, config) for ratio in row]
            loss = loss - sum(advantage * w * value for w, value in zip(weights, ours, strict=True))
            tokens, ratios = tokens + len(row), ratios + row
            row_cuts = [float(w != ratio) for w, ratio in zip(weights, row, strict=True)]
            cuts += row_cuts if config.level == "token" else row_cuts[:1]
    (loss / tokens).backward()
    figures = {
        "train/mismatch_kl": sum(kls) / len(kls),
        "train/mismatch_ratio_max": max(ratios),
        "train/mismatch_clipped": sum(cuts) / len(cuts),
    }
    return policies.gradient(model), figures


def weight(ratio: float, config: MismatchConfig) -> float:
    if config.kind == "tis":
        return ratio if config.cap is None else min(ratio, config.cap)
    return ratio if config.band[0] <= ratio <= config.band[1] else 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kind", "splits"),
    [
        (MismatchConfig("tis", "token", 1.3), "reinforce", 1),
        (MismatchConfig("tis", "response", 1.3), "reinforce", 4),
        (MismatchConfig("tis", "response", None), "clipped", 2),
        (MismatchConfig("mis", "token", band=(0.7, 1.5)), "clipped", 1),
    ],
)
def test_gradient_and_figures_are_those_of_the_oracle(
    config: MismatchConfig, kind: Any, splits: int, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_all(self: Experience, num_micro_batches: int = 1) -> torch.Tensor:
        return torch.ones_like(self.rollout.reward, dtype=torch.bool)

    monkeypatch.setattr(Experience, "active_responses", run_all)  # the figures are means over the rows that ran
    recorder = fitted(policy, tmp_path, splits, loss=LossConfig(kind, mismatch=config))
    gradient, figures = expected(policy, recorder, config)
    assert distance(recorder.step(), gradient) < 1e-5
    assert {name: recorder.logged[0][name] for name in figures} == pytest.approx(figures, abs=1e-4)
    assert (figures["train/mismatch_clipped"] > 0) == (config.cap is not None)
    plain = fitted(policy, tmp_path, splits, loss=LossConfig(kind))
    assert distance(plain.step(), gradient) > 1e-2
    assert "train/mismatch_kl" not in plain.logged[0]


@pytest.mark.slow(0.3)
def test_several_updates_compare_the_engine_with_the_policy_before_the_first(policy: str, tmp_path: Path) -> None:
    loss = LossConfig("clipped", mismatch=MismatchConfig("tis", cap=1.3))
    recorder = fitted(policy, tmp_path, 2, updates=2, loss=loss)
    trained = policies.load(policy, recorder.weights[1])
    objective, tokens = torch.zeros(()), 0
    [output] = recorder.outputs[1:]
    rollout = output["rollout"]
    for i, (prompt, response) in enumerate(policies.rows(rollout)):
        advantages = output["advantages"][i].tolist()
        for t, now in enumerate(policies.log_probs(trained, prompt, response)):
            old, theirs = float(rollout.log_probs[i, t]), float(rollout.engine_log_probs[i, t])
            advantage = advantages[t] * min(math.exp(old - theirs), 1.3)
            ratio = (now - old).exp()
            objective = objective + torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            tokens += 1
    (-objective / tokens).backward()
    assert distance(recorder.step(1), policies.gradient(trained)) < 1e-5


@pytest.mark.slow
def test_an_engine_with_the_policys_log_probs_needs_no_correction(policy: str, tmp_path: Path) -> None:
    loss = LossConfig(mismatch=MismatchConfig("tis"))
    recorder = fitted(policy, tmp_path, rollout=None, loss=loss)
    assert recorder.logged[0]["train/mismatch_kl"] == pytest.approx(0, abs=1e-8)
    assert recorder.logged[0]["train/mismatch_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert recorder.logged[0]["train/mismatch_clipped"] == 0
    assert distance(recorder.step(), fitted(policy, tmp_path, rollout=None).step()) < 1e-5


def test_an_engine_without_log_probs_is_refused(policy: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.loss\.mismatch\.kind is mis, .* PromptEngine returns none"):
        fitted(policy, tmp_path, rollout=PromptEngine(), loss=LossConfig(mismatch=MismatchConfig("mis")))


def test_old_log_probs_of_the_engine_leave_nothing_to_compare_with() -> None:
    with pytest.raises(UserError, match=r"model\.loss\.old_log_probs must be recompute .* got rollout"):
        LossConfig("clipped", old_log_probs="rollout", mismatch=MismatchConfig("tis"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0.5}, "model.loss.mismatch.cap must be null or at least 1, got 0.5"),
        ({"band": (1.2, 2.0)}, "model.loss.mismatch.band must be two numbers around 1"),
        ({"band": (1.0, 1.0)}, "model.loss.mismatch.band must be two numbers around 1"),
        ({"band": (-0.5, 2.0)}, "model.loss.mismatch.band must be two numbers around 1"),
    ],
)
def test_a_value_out_of_its_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MismatchConfig("tis", **options)


@pytest.mark.slow(0.3)
def test_a_checkpoint_between_two_updates_keeps_the_engines_log_probs(policy: str, tmp_path: Path) -> None:
    recorder = fitted(policy, tmp_path, 2, loss=LossConfig(mismatch=MismatchConfig("tis")))
    rollout = recorder.outputs[0]["rollout"]
    saved, restored = RolloutBuffer(), RolloutBuffer()
    saved.experience = Experience(rollout, torch.ones(1))
    restored.load_state_dict(saved.state_dict())
    assert torch.equal(restored.micro_batch(0).rollout.engine_log_probs, rollout.engine_log_probs)
