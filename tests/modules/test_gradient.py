"""The gradient of an optimizer step: whatever the split and the padding, and against an oracle written as loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import PROMPTS, Recorder, distance, fit, prompt_data, remax_module, save_policy
from lightning.pytorch import Callback
from oracles import policies
from oracles.advantages import whiten

from remax_lightning.data import PromptDataModule
from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig
from remax_lightning.modules import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.rollout import SamplingConfig
from remax_lightning.types import PromptBatch

Options = dict[str, Any]
TOLERANCE = 1e-5
"""Of the largest entry of the gradient, in float32."""

VARIANTS: dict[str, Options] = {
    "tokens": {},
    "responses": {"loss": LossConfig(normalizer="responses")},
    "clipped": {"loss": LossConfig("clipped")},
    "clipped_responses": {"loss": LossConfig("clipped", "responses")},
    "whitened": {"advantage": AdvantageConfig(whiten=True)},
    "whitened_clipped": {"advantage": AdvantageConfig(whiten=True), "loss": LossConfig("clipped")},
    "masked": {"advantage": AdvantageConfig(overlong="mask")},
    "discounted": {"advantage": AdvantageConfig(gamma=0.9, reward_clip=1.0), "kl": KLConfig(credit="one_step")},
    "kl_loss": {"kl": KLConfig(credit="none", loss_coef=0.3, loss_estimator="k3")},
    "two_samples": {
        "sampling": SamplingConfig(max_response_length=6, num_samples=2, temperature=0.8),
        "advantage": AdvantageConfig(baseline="leave_one_out"),
    },
}


class PaddedPrompts(PromptDataModule):
    """Puts more columns of padding on the left than the prompts need."""

    def _collate(self, num_micro_batches: int) -> Callable[..., PromptBatch]:
        collate = super()._collate(num_micro_batches)

        def padded(items: Any) -> PromptBatch:
            batch = collate(items)
            return batch._replace(
                prompt_ids=torch.nn.functional.pad(batch.prompt_ids, (9, 0), value=3),
                prompt_mask=torch.nn.functional.pad(batch.prompt_mask, (9, 0)),
            )

        return padded


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return save_policy(folder / "policy"), save_policy(folder / "reference", noise=0.02)


def one_step(folders: tuple[str, str], folder: Path, splits: int, padded: bool = False, **options: Any) -> Recorder:
    module = remax_module(*folders, **options)
    kind = PaddedPrompts if padded else PromptDataModule
    data = prompt_data(folder, folders[0], kind=kind, micro_batch_size=len(PROMPTS) // splits)
    return fit(module, data, folder, accumulate_grad_batches=splits)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_split_and_padding_leave_the_gradient(variant: str, folders: tuple[str, str], tmp_path: Path) -> None:
    whole = one_step(folders, tmp_path, 1, **VARIANTS[variant])
    lengths = whole.outputs[0]["rollout"].sampled.response_mask.sum(-1)
    assert lengths.min() < lengths.max()
    assert max(float(value.abs().max()) for value in whole.step().values()) > 1e-2
    for splits in (2, 4):
        parts = one_step(folders, tmp_path, splits, **VARIANTS[variant])
        assert len(parts.outputs) == splits
        assert distance(parts.step(), whole.step()) < TOLERANCE
        for name in ("train/loss", "train/reward", "train/advantage", "train/kl"):
            assert parts.logged[0][name] == pytest.approx(whole.logged[0][name], abs=2e-5)
    padded = one_step(folders, tmp_path, 2, padded=True, **VARIANTS[variant])
    assert distance(padded.step(), whole.step()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tokens", "whitened", "clipped_responses", "two_samples"])
def test_a_budget_of_tokens_leaves_the_gradient(variant: str, folders: tuple[str, str], tmp_path: Path) -> None:
    whole = one_step(folders, tmp_path, 1, **VARIANTS[variant])
    samples = whole.outputs[0]["rollout"].num_samples
    options = {"max_prompt_length": 30, "tokens_per_micro_batch": 36 * samples}
    data, passes = prompt_data(tmp_path, folders[0], **options), []

    class Count(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            passes.append(loss)

    cut = fit(remax_module(*folders, **VARIANTS[variant]), data, tmp_path, callbacks=[Count()])
    assert len(passes) >= 3
    assert distance(cut.step(), whole.step()) < TOLERANCE
    assert cut.logged[0] == pytest.approx(whole.logged[0], abs=2e-5)
    for name in ("advantages", "kl", "entropy", "entropy_mask"):
        torch.testing.assert_close(cut.outputs[0][name], whole.outputs[0][name], atol=1e-5, rtol=0)


@pytest.mark.slow(0.3)
def test_what_a_budget_of_tokens_cannot_be_combined_with(folders: tuple[str, str], tmp_path: Path) -> None:
    options = {"max_prompt_length": 30, "tokens_per_micro_batch": 36}
    data = prompt_data(tmp_path, folders[0], **options)
    with pytest.raises(UserError, match=r"accumulate_grad_batches must be 1 with data\.tokens_per_micro_batch, got 2"):
        fit(remax_module(*folders), data, tmp_path, accumulate_grad_batches=2)
    with pytest.raises(UserError, match=r"model\.loss\.normalizer must be tokens or responses"):
        fit(remax_module(*folders, loss=LossConfig(normalizer="micro_batch")), data, tmp_path)
    with pytest.raises(UserError, match="must be at least 36, got 35"):
        fit(
            remax_module(*folders),
            prompt_data(tmp_path, folders[0], **{**options, "tokens_per_micro_batch": 35}),
            tmp_path,
        )


@pytest.mark.slow
def test_mean_over_each_micro_batch_depends_on_the_split(folders: tuple[str, str], tmp_path: Path) -> None:
    options = {"loss": LossConfig(normalizer="micro_batch")}
    whole = one_step(folders, tmp_path, 1, **options).step()
    assert distance(one_step(folders, tmp_path, 1).step(), whole) < TOLERANCE  # one micro-batch: the same as `tokens`
    assert distance(one_step(folders, tmp_path, 4, **options).step(), whole) > 0.01


def oracle(folders: tuple[str, str], recorder: Recorder, *, beta: float, white: bool, per_response: bool) -> Any:
    """The gradient of `-Σ A log π / normalizer` in double precision, one unpadded response after the other."""
    policy, reference = map(policies.load, folders)
    taken, advantages = [], []
    for part in (output["rollout"] for output in recorder.outputs):
        for (prompt, response), reward, baseline in zip(
            policies.rows(part), part.reward.tolist(), part.baseline_reward.tolist(), strict=True
        ):
            taken.append(policies.log_probs(policy, prompt, response))
            other = policies.log_probs(reference, prompt, response)
            ratios = [a.item() - b.item() for a, b in zip(taken[-1], other, strict=True)]
            advantages.append([reward - baseline - beta * sum(ratios[t:]) for t in range(len(ratios))])
    if white:
        advantages = whiten(advantages, [[True] * len(row) for row in advantages])
    tokens = sum(map(len, taken))
    loss = -sum(a * lp for row, lps in zip(advantages, taken, strict=True) for a, lp in zip(row, lps, strict=True))
    (loss / (len(taken) if per_response else tokens)).backward()
    return policies.gradient(policy)


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("variant", "white", "per_response"), [
    ("tokens", False, False),
    ("responses", False, True),
    ("clipped", False, False),
    ("whitened", True, False),
])  # fmt: skip
def test_equals_the_oracle(
    variant: str, white: bool, per_response: bool, splits: int, folders: tuple[str, str], tmp_path: Path
) -> None:
    recorder = one_step(folders, tmp_path, splits, kl_coef=0.3, **VARIANTS[variant])
    expected = oracle(folders, recorder, beta=0.3, white=white, per_response=per_response)
    assert distance(recorder.step(), expected) < TOLERANCE
    without_kl = oracle(folders, recorder, beta=0.0, white=white, per_response=per_response)
    assert distance(recorder.step(), without_kl) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt"])
def test_equals_the_oracle_in_every_family(family: str, tmp_path: Path) -> None:
    folders = save_policy(tmp_path / "policy", family), save_policy(tmp_path / "reference", family, noise=0.02)
    recorder = one_step(folders, tmp_path, 2, padded=True, kl_coef=0.3)
    expected = oracle(folders, recorder, beta=0.3, white=False, per_response=False)
    assert distance(recorder.step(), expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_recomputes_and_changes_nothing(
    checkpointing: bool, passes: int, folders: tuple[str, str], tmp_path: Path
) -> None:
    policy, reference = folders
    module = remax_module(ModelConfig(policy, gradient_checkpointing=checkpointing), reference)
    counted: list[bool] = []

    class Count(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            layer = pl_module.policy.model.layers[0].mlp
            layer.register_forward_pre_hook(lambda module, inputs: counted.append(torch.is_grad_enabled()))

    recorder = fit(module, prompt_data(tmp_path, policy), tmp_path, callbacks=[Count()])
    assert sum(counted) == passes
    assert distance(recorder.step(), one_step(folders, tmp_path, 1).step()) < TOLERANCE
