"""Every mistake in a configuration is one message that names the key, before anything is trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_model
from helpers.chat_templates import with_turn_token
from helpers.training import CharacterReward, fit, make_trainer, prompt_data, remax_module, save_policy

from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig
from remax_lightning.modules import AdvantageConfig, KLConfig, LossConfig, WarmupCosine, WarmupLinear
from remax_lightning.rewards import WeightedReward
from remax_lightning.rollout import SamplingConfig
from remax_lightning.training.config_checks import warn_of_turn_end
from remax_lightning.training.objective import Objective
from remax_lightning.training.resume import select_rank_state
from remax_lightning.training.rollouts import updates_per_rollout


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize(("make", "value", "message"), [
    (lambda v: KLConfig(clamp=v), 0.0, r"model\.kl\.clamp must be null or above 0, got 0\.0"),
    (lambda v: KLConfig(loss_coef=v), -1.0, r"model\.kl\.loss_coef must be 0 or more, got -1\.0"),
    (lambda v: KLConfig(reference_batch_size=v), 0,
     r"model\.kl\.reference_batch_size must be null or at least 1, got 0"),
    (lambda v: AdvantageConfig(gamma=v), 0.0, r"model\.advantage\.gamma must be above 0 and at most 1, got 0\.0"),
    (lambda v: AdvantageConfig(gamma=v), 1.1, r"model\.advantage\.gamma .* got 1\.1"),
    (lambda v: AdvantageConfig(reward_clip=v), 0.0, r"model\.advantage\.reward_clip must be null or above 0, got 0"),
    (lambda v: AdvantageConfig(truncation_penalty=v), -0.5, r"model\.advantage\.truncation_penalty .* got -0\.5"),
    (lambda v: AdvantageConfig(overlong="soft", overlong_cache=v), 0,
     r"model\.advantage\.overlong_cache must be null or at least 1, got 0"),
    (lambda v: AdvantageConfig(overlong="penalize", overlong_cache=v), 8,
     r"overlong_cache must be null where advantage\.overlong is penalize; only soft reads it, got 8"),
    (lambda v: AdvantageConfig(overlong="soft", overlong_cache=v).soft_cache(256), 257,
     r"overlong_cache must be at most model\.sampling\.max_response_length 256, got 257"),
    (lambda v: LossConfig(clip_range=v), 0.0, r"model\.loss\.clip_range must be above 0 and below 1, got 0\.0"),
    (lambda v: LossConfig(clip_range=v), 1.0, r"model\.loss\.clip_range .* got 1\.0"),
    (lambda v: LossConfig(dual_clip=v), 1.0, r"model\.loss\.dual_clip must be null or above 1, got 1\.0"),
])  # fmt: skip
def test_values_out_of_range(make: Any, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(value)


@pytest.mark.parametrize(("advantage", "message"), [
    (AdvantageConfig("leave_one_out"), r"normalize std .* needs model\.advantage\.baseline greedy, got leave_one_out"),
    (AdvantageConfig("none"), r"model\.reward\.init_args\.normalize std .* got none"),
    (AdvantageConfig(reward_clip=1.0, reward_clip_at="before_baseline"),
     r"normalize std .* set model\.advantage\.reward_clip_at to after_baseline"),
])  # fmt: skip
def test_parts_are_normalized_above_greedy_values_only(advantage: AdvantageConfig, message: str) -> None:
    reward = WeightedReward({"characters": CharacterReward()}, normalize="std")
    sampling = SamplingConfig(num_samples=2)
    with pytest.raises(UserError, match=message):
        remax_module("policy", reward=reward, advantage=advantage, sampling=sampling)
    remax_module("policy", reward=reward, advantage=AdvantageConfig(reward_clip=1.0, whiten=True), sampling=sampling)


@pytest.mark.parametrize("kind", [WarmupCosine, WarmupLinear])
@pytest.mark.parametrize(("options", "message"), [
    ({"warmup_steps": -1}, r"model\.lr_scheduler\.init_args\.warmup_steps must be 0 or more, got -1"),
    ({"min_ratio": 1.5}, r"model\.lr_scheduler\.init_args\.min_ratio must be between 0 and 1, got 1\.5"),
    ({"min_ratio": -0.1}, r"min_ratio .* got -0\.1"),
])  # fmt: skip
def test_schedules_out_of_range(kind: Any, options: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(UserError, match=message):
        kind(optimizer, **options)


@pytest.mark.parametrize(("kl", "advantage", "samples", "message"), [
    (KLConfig(), AdvantageConfig(baseline="leave_one_out"), 1,
     r"model\.advantage\.baseline leave_one_out needs model\.sampling\.num_samples of at least 2, got 1"),
    (KLConfig(), AdvantageConfig(baseline="group_mean"), 1, r"baseline group_mean needs .* got 1"),
    (KLConfig(in_baseline=True), AdvantageConfig(), 2, r"model\.kl\.in_baseline needs .* got greedy"),
    (KLConfig(in_baseline=True), AdvantageConfig(baseline="none"), 2, r"model\.kl\.in_baseline needs .* got none"),
    (KLConfig(in_baseline=True, credit="none"), AdvantageConfig(baseline="group_mean"), 2,
     r"model\.kl\.in_baseline needs model\.kl\.credit"),
])  # fmt: skip
def test_choices_that_contradict_each_other(
    kl: KLConfig, advantage: AdvantageConfig, samples: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Objective(kl, advantage, LossConfig(), samples)


@pytest.mark.parametrize("options", [{"kl_coef": 0.05}, {"kl_coef": 0.0, "kl": KLConfig(loss_coef=0.1)}])
def test_the_kl_is_measured_to_the_start_of_the_policy_where_there_is_one(options: dict[str, Any], policy: str) -> None:
    assert remax_module(policy, reference=None, **options).reference_source.path == policy
    with pytest.raises(UserError, match=r"model\.reference\.path: the KL needs a reference"):
        remax_module(ModelConfig(policy, from_scratch=True), reference=None, **options)


def test_a_negative_kl_coefficient_is_refused(policy: str) -> None:
    with pytest.raises(UserError, match=r"model\.kl_coef must be 0 or more, got -0\.1"):
        remax_module(policy, kl_coef=-0.1)


def refused(module: Any, data: Any, folder: Path, message: str, **options: Any) -> None:
    """Training must end with the message before any reward is asked for."""
    with pytest.raises(UserError, match=message):
        fit(module, data, folder, **options)
    assert module.reward.scored == []


@pytest.mark.slow(0.3)
def test_reference_of_another_vocabulary(policy: str, tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=100).save_pretrained(tmp_path / "reference")
    module = remax_module(policy, str(tmp_path / "reference"))
    message = r"model\.reference .* has a vocabulary of 100, the policy .* one of 96"
    refused(module, prompt_data(tmp_path, policy), tmp_path, message)


def test_tokenizer_with_more_tokens_than_the_policy(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    tiny_model("llama", vocab_size=50).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    message = rf"model\.tokenizer .* has {len(make_tokenizer())} tokens, the policy .* only 50"
    refused(remax_module(str(folder)), prompt_data(tmp_path, str(folder)), tmp_path, message)


@pytest.mark.slow(0.3)
def test_more_tokens_than_positions(policy: str, tmp_path: Path) -> None:
    message = r"data\.max_prompt_length 251 \+ model\.sampling\.max_response_length 6 is more than the 256 positions"
    refused(remax_module(policy), prompt_data(tmp_path, policy, max_prompt_length=251), tmp_path, message)
    fit(remax_module(policy), prompt_data(tmp_path, policy, max_prompt_length=250), tmp_path)


def test_a_run_without_batches_says_that_it_trains_nothing(policy: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="limit_train_batches is 0: nothing is trained"):
        trainer = fit(remax_module(policy), prompt_data(tmp_path, policy), tmp_path, limit_train_batches=0)
    assert trainer.logged == []


@pytest.mark.slow(0.3)
def test_a_step_that_reaches_into_the_next_rollout(policy: str, tmp_path: Path) -> None:
    data = prompt_data(tmp_path, policy, micro_batch_size=4)
    message = r"trainer\.accumulate_grad_batches is 3, but a rollout batch comes in 2 micro-batches"
    refused(remax_module(policy), data, tmp_path, message, accumulate_grad_batches=3)
    message = r"trainer\.accumulate_grad_batches is 4"
    refused(remax_module(policy), data, tmp_path, message, accumulate_grad_batches=4)


def test_an_epoch_that_ends_within_a_rollout(policy: str, tmp_path: Path) -> None:
    data = prompt_data(tmp_path, policy, batch_size=4, micro_batch_size=2)
    message = r"trainer\.limit_train_batches ends the epoch after 3 micro-batches.*multiple of 2"
    refused(remax_module(policy), data, tmp_path, message, accumulate_grad_batches=2, limit_train_batches=3)


def test_several_updates_need_the_clipped_loss(policy: str, tmp_path: Path) -> None:
    data = prompt_data(tmp_path, policy, micro_batch_size=2)
    message = (
        r"accumulate_grad_batches 2 with 4 micro-batches per rollout makes 2 updates.*model\.loss\.kind to clipped"
    )
    refused(remax_module(policy), data, tmp_path, message, accumulate_grad_batches=2)


def test_updates_per_rollout() -> None:
    assert updates_per_rollout(1, 1, "reinforce") == 1
    assert updates_per_rollout(4, 4, "reinforce") == 1
    assert updates_per_rollout(4, 2, "clipped") == 2
    assert updates_per_rollout(4, 1, "clipped") == 4


def test_missing_policy_folder(tmp_path: Path, policy: str) -> None:
    module = remax_module(str(tmp_path / "nowhere"))
    refused(module, prompt_data(tmp_path, policy), tmp_path, r"model\.policy\.path: there is no folder")


def test_sampling_is_checked_where_it_is_made() -> None:
    with pytest.raises(UserError, match=r"model\.sampling\.temperature must be above 0"):
        SamplingConfig(temperature=0.0)


def test_lightnings_own_deepspeed_strategy_is_refused_where_it_divides_twice() -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy

    from remax_lightning.strategies import ReMaxDeepSpeedStrategy
    from remax_lightning.training.config_checks import check_deepspeed

    check_deepspeed(DeepSpeedStrategy(stage=2), 1)
    check_deepspeed(ReMaxDeepSpeedStrategy(stage=2), 4)
    with pytest.raises(UserError, match=r"trainer\.strategy is DeepSpeedStrategy, .*accumulate_grad_batches 4"):
        check_deepspeed(DeepSpeedStrategy(stage=2), 4)


def test_a_half_used_rollout_of_other_processes_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(UserError, match=r"trainer\.devices x num_nodes must be 2, got 1"):
        select_rank_state([{"part": 1}, {"part": 2}], trainer)
    assert select_rank_state([None, None], trainer) is None
    assert select_rank_state(None, trainer) is None  # as 0.1.0 saved it
    assert select_rank_state([{"part": 1}], trainer) == {"part": 1}


def test_a_turn_end_that_ends_no_response_is_told() -> None:
    tokenizer = with_turn_token()
    turn_id = tokenizer.convert_tokens_to_ids("<turn>")
    data = SimpleNamespace(turn_end_id=lambda: turn_id)
    with pytest.warns(UserWarning, match=rf"ends a turn with '<turn>' \({turn_id}\), which ends no response"):
        warn_of_turn_end(tokenizer, [2], data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_turn_end(tokenizer, [2, turn_id], data)
        warn_of_turn_end(tokenizer, [2], SimpleNamespace(turn_end_id=lambda: None))
        warn_of_turn_end(tokenizer, [2], None)
