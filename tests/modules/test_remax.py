"""What a training step of `ReMaxModule` does and leaves undone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from helpers.chat_templates import AS_TEXT, STRICT_ROLES, user
from helpers.training import (
    PROMPTS,
    CharacterReward,
    FixedEngine,
    Recorder,
    distance,
    fit,
    make_trainer,
    prompt_data,
    remax_module,
    save_policy,
    write_rows,
)
from lightning.pytorch import Callback
from oracles import policies
from oracles.estimates import kl_estimate
from torch import Tensor

from remax_lightning.data import PromptDataModule
from remax_lightning.errors import DataError, UserError
from remax_lightning.modules import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.rewards import ClassifierReward, FunctionReward
from remax_lightning.rollout import PairedEngine, SamplingConfig
from remax_lightning.types import PromptBatch

EOS = 2


class Watch(Callback):
    """Counts passes of the policy over whole responses, and keeps the gradient of its logits."""

    def __init__(self) -> None:
        self.passes: list[bool] = []
        self.logit_gradients: list[Tensor] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.policy.register_forward_pre_hook(self._count, with_kwargs=True)
        pl_module.policy.lm_head.register_forward_hook(self._keep)

    def _count(self, module: Any, inputs: Any, options: dict[str, Any]) -> None:
        # With a cache it is a step of decoding; in eval mode, whether rows can be packed is tried once.
        if not options["use_cache"] and module.training:
            self.passes.append(torch.is_grad_enabled())

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self.logit_gradients.append)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("reference"), noise=0.02)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy that only the end-of-sequence token ends, which is also what it pads with."""
    return save_policy(tmp_path_factory.mktemp("plain"), ends=(EOS,), pad_is_eos=True)


@pytest.mark.slow(0.3)
def test_a_rollout_finds_no_gradients_of_the_step_before(policy: str, tmp_path: Path) -> None:
    """They would take the memory of a policy beside keys and values."""

    class Watched(PairedEngine):
        def generate(self, model: Any, request: Any) -> Any:
            found.append(sum(parameter.grad is not None for parameter in model.parameters()))
            return super().generate(model, request)

    found: list[int] = []
    fit(remax_module(policy, rollout=Watched()), prompt_data(tmp_path, policy), tmp_path, max_steps=3)
    assert found == [0, 0, 0]


# KL


@pytest.mark.slow(0.3)
def test_kl_is_zero_where_the_strategy_casts_the_policy_to_bfloat16(policy: str, tmp_path: Path) -> None:
    module, data = remax_module(policy, policy), prompt_data(tmp_path, policy)
    trainer = make_trainer(tmp_path, precision="bf16-true", limit_val_batches=1)
    (found,) = trainer.validate(module, data, verbose=False)
    assert next(module.policy.parameters()).dtype == torch.bfloat16
    assert found["val/kl"] == 0


@pytest.mark.slow(0.3)
def test_kl_starts_at_zero_where_reference_is_policy(policy: str, tmp_path: Path) -> None:
    recorder = fit(remax_module(policy, policy), prompt_data(tmp_path, policy), tmp_path, max_steps=2)
    first, second = (output["kl"].abs().max() for output in recorder.outputs)
    assert first < 1e-6
    assert recorder.logged[0]["train/kl"] == pytest.approx(0, abs=1e-6)
    assert second > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_and_reference_log_probs_equal_the_oracle(
    estimator: Any, policy: str, reference: str, tmp_path: Path
) -> None:
    sampling = SamplingConfig(max_response_length=6, temperature=0.7)
    module = remax_module(policy, reference, sampling=sampling, kl=KLConfig(estimator))
    (output,) = fit(module, prompt_data(tmp_path, policy), tmp_path).outputs
    own, other = policies.load(policy), policies.load(reference)
    for i, (prompt, response) in enumerate(policies.rows(output["rollout"])):
        now = [value.item() for value in policies.log_probs(own, prompt, response, 0.7)]
        before = [value.item() for value in policies.log_probs(other, prompt, response, 0.7)]
        length = len(response)
        assert output["rollout"].reference_log_probs[i, :length].tolist() == pytest.approx(before, abs=2e-5)
        expected = [kl_estimate(a - b, estimator) for a, b in zip(now, before, strict=True)]
        assert output["kl"][i].tolist() == pytest.approx(expected + [0.0] * (6 - length), abs=5e-5)


@pytest.mark.slow(0.3)
def test_log_probs_need_not_be_scaled_by_the_temperature(policy: str, reference: str, tmp_path: Path) -> None:
    sampling = SamplingConfig(max_response_length=6, temperature=0.7, scale_log_probs=False)
    (output,) = fit(remax_module(policy, reference, sampling=sampling), prompt_data(tmp_path, policy), tmp_path).outputs
    prompt, response = policies.rows(output["rollout"])[1]
    expected = [value.item() for value in policies.log_probs(policies.load(reference), prompt, response)]
    found = output["rollout"].reference_log_probs[1, : len(response)].tolist()
    assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.slow
def test_kl_loss_adds_the_gradient_of_k2(policy: str, reference: str, tmp_path: Path) -> None:
    def step(**options: Any) -> Recorder:
        module = remax_module(policy, reference, kl_coef=0.0, **options)
        return fit(module, prompt_data(tmp_path, policy), tmp_path)

    without, with_term = step(), step(kl=KLConfig(credit="none", loss_coef=0.7))
    own, other = policies.load(policy), policies.load(reference)
    terms: list[Tensor] = []
    for prompt, response in policies.rows(without.outputs[0]["rollout"]):
        now, before = policies.log_probs(own, prompt, response), policies.log_probs(other, prompt, response)
        terms += [(a - b.detach()) ** 2 / 2 for a, b in zip(now, before, strict=True)]
    (0.7 * sum(terms) / len(terms)).backward()
    expected = {name: value + without.step()[name] for name, value in policies.gradient(own).items()}
    assert distance(with_term.step(), expected) < 1e-5
    assert distance(without.step(), expected) > 1e-3


# Ends of responses


def three_prompts(folder: Path, policy: str, **options: Any) -> Any:
    return prompt_data(folder, policy, PROMPTS[:3], **options)


ENDED = [[10, 11, EOS, EOS], [EOS, EOS, EOS, EOS], [12, 13, 14, 15]]
GREEDY = [[30, EOS, EOS, EOS], [11, 12, 33, 20], [13, 14, 15, 16]]


def test_end_of_sequence_is_trained_when_it_is_the_padding_too(plain: str, tmp_path: Path) -> None:
    watch = Watch()
    module = remax_module(plain, rollout=FixedEngine(ENDED, GREEDY), sampling=SamplingConfig(max_response_length=4))
    recorder = fit(module, three_prompts(tmp_path, plain), tmp_path, callbacks=[watch])
    (output,), (gradient,) = recorder.outputs, watch.logit_gradients
    rollout = output["rollout"]
    assert rollout.sampled.response_mask.tolist() == [[True] * 3 + [False], [True] + [False] * 3, [True] * 4]
    assert rollout.sampled.truncated.tolist() == [False, False, True]
    assert rollout.greedy.truncated.tolist() == [False, True, True]
    assert rollout.greedy.response_mask.sum(-1).tolist() == [2, 4, 4]
    own = policies.load(plain)
    for row, last in ((0, 2), (1, 0)):
        prompt, response = policies.rows(rollout)[row]
        probability = math.exp(policies.log_probs(own, prompt, response)[last].item())
        expected = -float(rollout.reward[row] - rollout.baseline_reward[row]) * (1 - probability) / 8
        place = int(rollout.sampled.response_mask[:row].sum()) + last  # among the counted tokens, row by row
        assert float(gradient[0, place, EOS]) == pytest.approx(expected, rel=1e-4)
        assert abs(expected) > 1e-3
    assert gradient.shape[:2] == (1, 8)  # nothing behind the ends has logits


def truncated(plain: str, folder: Path, how: Any, **options: Any) -> tuple[Any, Tensor, Recorder]:
    watch = Watch()
    module = remax_module(
        plain,
        rollout=FixedEngine(ENDED, GREEDY),
        sampling=SamplingConfig(max_response_length=4),
        advantage=AdvantageConfig(overlong=how, truncation_penalty=1.5, **options),
    )
    recorder = fit(module, three_prompts(folder, plain), folder, callbacks=[watch])
    return recorder.outputs[0], watch.logit_gradients[0], recorder


@pytest.mark.slow(0.3)
def test_truncated_responses_can_be_kept_or_masked(plain: str, tmp_path: Path) -> None:
    kept, kept_gradient, _ = truncated(plain, tmp_path, "keep")
    masked, masked_gradient, recorder = truncated(plain, tmp_path, "mask")
    assert float(kept_gradient[0, 4:].abs().max()) > 1e-3  # the third response, behind those of 3 and 1 tokens
    assert masked_gradient.shape[1] == 4  # the third is not even run
    assert torch.equal(masked["rollout"].reward, kept["rollout"].reward)
    assert masked["advantages"][2].tolist() == [0.0] * 4
    # The other four tokens share the whole weight: eight tokens were counted before.
    torch.testing.assert_close(masked_gradient, 2 * kept_gradient[:, :4])
    assert recorder.logged[0]["train/truncation_rate"] == pytest.approx(1 / 3)


def test_nothing_is_trained_where_all_responses_are_masked(plain: str, tmp_path: Path) -> None:
    module = remax_module(
        plain,
        rollout=FixedEngine([[4, 5, 6, 7]] * 3, GREEDY),
        sampling=SamplingConfig(max_response_length=4),
        advantage=AdvantageConfig(overlong="mask", whiten=True),
    )
    recorder = fit(module, three_prompts(tmp_path, plain), tmp_path)
    assert all(float(value.abs().max()) == 0 for value in recorder.step().values())
    assert recorder.logged[0]["train/loss"] == 0


@pytest.mark.slow(0.3)
def test_truncated_responses_can_be_penalized(plain: str, tmp_path: Path) -> None:
    kept, _, _ = truncated(plain, tmp_path, "keep")
    penalized, gradient, _ = truncated(plain, tmp_path, "penalize")
    lost = torch.tensor([0.0, 0.0, 1.5])
    torch.testing.assert_close(penalized["rollout"].reward, kept["rollout"].reward - lost)
    lost = torch.tensor([0.0, 1.5, 1.5])
    torch.testing.assert_close(penalized["rollout"].baseline_reward, kept["rollout"].baseline_reward - lost)
    assert float(gradient[0, 4:].abs().max()) > 1e-3


@pytest.mark.slow
def test_long_responses_can_be_penalized_softly(plain: str, tmp_path: Path) -> None:
    kept, _, _ = truncated(plain, tmp_path, "keep")
    soft, _, _ = truncated(plain, tmp_path, "soft", overlong_cache=3)
    for name, responses in (("reward", "sampled"), ("baseline_reward", "greedy")):
        lengths = getattr(kept["rollout"], responses).response_mask.sum(-1)
        lost = torch.tensor([max(0.0, (length - 1) / 3) * 1.5 for length in lengths.tolist()])
        torch.testing.assert_close(getattr(soft["rollout"], name), getattr(kept["rollout"], name) - lost)
        assert len(set(lost.tolist())) > 1


# What is run, and how often


@pytest.mark.slow
def test_one_pass_with_gradients_per_micro_batch_and_no_other(policy: str, tmp_path: Path) -> None:
    watch, reward = Watch(), CharacterReward()
    data = prompt_data(tmp_path, policy, micro_batch_size=2)
    module = remax_module(policy, policy, reward=reward)
    recorder = fit(module, data, tmp_path, callbacks=[watch], accumulate_grad_batches=4, max_steps=2, max_epochs=2)
    assert watch.passes == [True] * 8
    assert reward.loaded == 1
    assert reward.scored == [16, 16]  # sampled and greedy responses in one pass, once per rollout
    assert [output["closes_step"] for output in recorder.outputs] == [False, False, False, True] * 2
    made = [output["times"]["rollout"] > 0 for output in recorder.outputs]
    assert made == [True, False, False, False] * 2
    assert len(recorder.logged) == 2


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "none"])
def test_other_baselines_make_no_greedy_responses(baseline: Any, policy: str, tmp_path: Path) -> None:
    reward = CharacterReward()
    sampling = SamplingConfig(max_response_length=6, num_samples=3)
    module = remax_module(policy, reward=reward, sampling=sampling, advantage=AdvantageConfig(baseline=baseline))
    recorder = fit(module, prompt_data(tmp_path, policy), tmp_path)
    rollout = recorder.outputs[0]["rollout"]
    assert rollout.greedy is None
    assert rollout.baseline_reward is None
    assert reward.scored == [24]
    assert "train/baseline_reward" not in recorder.logged[0]
    groups = rollout.reward.view(8, 3).tolist()
    expected = {
        "leave_one_out": [r - (sum(group) - r) / 2 for group in groups for r in group],
        "group_mean": [r - sum(group) / 3 for group in groups for r in group],
        "none": [r for group in groups for r in group],
    }
    assert recorder.outputs[0]["advantages"][:, 0].tolist() == pytest.approx(expected[baseline], abs=1e-5)
    assert max(float(value.abs().max()) for value in recorder.step().values()) > 1e-3


@pytest.mark.slow
def test_several_updates_per_rollout(policy: str, reference: str, tmp_path: Path) -> None:
    watch, reward = Watch(), CharacterReward()
    data = prompt_data(tmp_path, policy, micro_batch_size=2)
    module = remax_module(policy, reference, reward=reward, loss=LossConfig("clipped", clip_range=0.1))
    recorder = fit(module, data, tmp_path, callbacks=[watch], accumulate_grad_batches=2, max_steps=2)
    assert reward.scored == [16]
    assert watch.passes == [False] * 4 + [True] * 4  # the old log-probs, then the updates
    assert [output["closes_step"] for output in recorder.outputs] == [False, True, False, True]
    assert recorder.logged[0]["train/clip_fraction"] == 0
    assert recorder.logged[1]["train/clip_fraction"] > 0

    sampled_from, trained = policies.load(policy), policies.load(policy, recorder.weights[1])
    objective, tokens, clipped, far = torch.zeros(()), 0, 0, 0.0
    for output in recorder.outputs[2:]:
        for i, (prompt, response) in enumerate(policies.rows(output["rollout"])):
            old = [value.item() for value in policies.log_probs(sampled_from, prompt, response)]
            found = output["rollout"].log_probs[i, : len(response)].tolist()
            assert found == pytest.approx(old, abs=2e-5)
            for t, now in enumerate(policies.log_probs(trained, prompt, response)):
                ratio, advantage = (now - old[t]).exp(), float(output["advantages"][i, t])
                best = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
                objective, tokens = objective + best, tokens + 1
                clipped, far = clipped + bool(best != ratio * advantage), max(far, abs(ratio.item() - 1))
    (-objective / tokens).backward()
    assert far > 0.01
    assert recorder.logged[1]["train/clip_fraction"] == pytest.approx(clipped / tokens)
    assert distance(recorder.step(1), policies.gradient(trained)) < 1e-5


def test_a_later_part_without_its_rollout_is_refused(policy: str) -> None:
    batch = PromptBatch(
        torch.tensor([[5]]), torch.tensor([[True]]), ["a"], [{}], micro_batch_index=1, num_micro_batches=2
    )
    with pytest.raises(UserError, match="part 1 of a rollout batch came first"):
        remax_module(policy).training_step(batch, 0)


def test_a_role_that_the_reward_model_does_not_know_stops_the_run_before_models_are_loaded(tmp_path: Path) -> None:
    """There is no policy at all, so that loading it would fail first."""
    make_tokenizer(chat_template=AS_TEXT).save_pretrained(tmp_path / "policy")
    make_tokenizer(chat_template=STRICT_ROLES).save_pretrained(tmp_path / "reward")
    tiny_config("llama").save_pretrained(tmp_path / "reward")
    rows = [{"prompt": [user("1+1=")]}, {"prompt": [{"role": "system", "content": "be brief"}, user("2+2=")]}]
    data = PromptDataModule(write_rows(tmp_path / "rows.jsonl", rows), str(tmp_path / "policy"), batch_size=2)
    module = remax_module(str(tmp_path / "policy"), reward=ClassifierReward(str(tmp_path / "reward")))
    message = r"rows\.jsonl, line 2: the chat template of the reward model .* refuses message 0 \(role 'system'\)"
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path).fit(module, data)


@pytest.mark.parametrize("place", ["train", "val"])
def test_right_answers_are_checked_before_any_model_is_loaded(tmp_path: Path, place: str) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    good, bad = [{"prompt": "2+2=", "response": 4}] * 4, {"prompt": "2+3=", "response": "5 or 6"}
    rows = {name: [*good, bad] if name == place else good for name in ("train", "val")}
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", values) for name, values in rows.items()}
    data = PromptDataModule(paths["train"], str(tmp_path / "tokenizer"), paths["val"], batch_size=4)
    reward = FunctionReward("remax_lightning.rewards.verifiers.numeric_answer")
    module = remax_module(str(tmp_path / "no_policy"), reward=reward)
    with pytest.raises(UserError, match=rf"column 'response', got '5 or 6' for .*{place}.jsonl, line 5;"):
        fit(module, data, tmp_path)
