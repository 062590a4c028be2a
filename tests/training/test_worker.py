"""The worker that ReMax, SFT and doctor share: stop strings, penalties and the seconds of its phases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_model
from helpers.training import CharacterReward, FixedEngine, make_trainer, save_policy, write_rows

from remax_lightning.config import AdvantageConfig, KLConfig, LossConfig
from remax_lightning.data import SFTDataModule
from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig
from remax_lightning.modules import SFTModule
from remax_lightning.rewards.base import Reward
from remax_lightning.rollout import AutoEngine, SamplingConfig
from remax_lightning.training.objective import Objective
from remax_lightning.training.worker import RolloutWorker
from remax_lightning.types import PromptBatch


def prompt(count: int = 2) -> PromptBatch:
    ids = torch.full((count, 3), 20)
    return PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), ["aaa"] * count, [{} for _ in range(count)])


def worker(engine: Any, **options: Any) -> RolloutWorker:
    made = RolloutWorker(engine, options.pop("sampling", SamplingConfig(max_response_length=4)), **options)
    made.prepare(make_tokenizer(), [2], torch.device("cpu"))
    return made


def test_a_truncated_response_loses_the_penalty_sampled_or_greedy() -> None:
    engine = FixedEngine([[20, 2, 3, 3], [20, 20, 20, 20]], [[20, 20, 20, 20], [21, 2, 3, 3]])
    plain, penalized = (
        worker(engine, reward=CharacterReward(), truncation_penalty=penalty).roll_out(
            tiny_model(), prompt(), torch.Generator(), greedy=True
        )
        for penalty in (0.0, 2.0)
    )
    assert plain.sampled.truncated.tolist() == [False, True]
    assert (plain.reward - penalized.reward).tolist() == [0.0, 2.0]
    assert plain.baseline_reward is not None
    assert penalized.baseline_reward is not None
    assert (plain.baseline_reward - penalized.baseline_reward).tolist() == [2.0, 0.0]


def test_a_soft_penalty_grows_over_the_last_tokens_before_the_limit() -> None:
    # Of at most 4 tokens, EOS included, the last 2 cost half of the penalty each.
    engine = FixedEngine([[20, 2, 3, 3], [20, 20, 2, 3], [20, 20, 20, 2]], [[2, 3, 3, 3], [20, 20, 2, 3], [20] * 4])
    plain, soft = (
        worker(engine, reward=CharacterReward(), truncation_penalty=3.0 * (cache > 0), overlong_cache=cache).roll_out(
            tiny_model(), prompt(3), torch.Generator(), greedy=True
        )
        for cache in (0, 2)
    )
    assert plain.baseline_reward is not None
    assert soft.baseline_reward is not None
    torch.testing.assert_close(plain.reward - soft.reward, torch.tensor([0.0, 1.5, 3.0]))
    torch.testing.assert_close(plain.baseline_reward - soft.baseline_reward, torch.tensor([0.0, 1.5, 3.0]))


class PerToken(Reward):
    """Pays a token its place, from 1; every token of the ids that it was shown."""

    def score(self, prompts: Sequence[str], responses: Sequence[Any], rows: Sequence[dict[str, Any]]) -> Any:
        self.shown = [response.token_ids for response in responses]
        return [[place + 1.0 for place, _ in enumerate(ids)] for ids in self.shown]


def test_rewards_of_tokens_are_as_wide_as_the_ids_and_sum_up_to_the_reward() -> None:
    """The penalty of a truncated response stands on its last token; the greedy ids may be narrower."""
    engine = FixedEngine([[20, 2, 3, 3], [20, 21, 20, 20]], [[20, 2], [2, 3]])
    reward = PerToken()
    rollout = worker(engine, reward=reward, truncation_penalty=5.0).roll_out(
        tiny_model(), prompt(), torch.Generator(), greedy=True
    )
    assert reward.shown == [(20, 2), (20, 21, 20, 20), (20, 2), (2,)]
    assert rollout.token_rewards is not None
    assert rollout.token_rewards.tolist() == [[1.0, 2.0, 0.0, 0.0], [1.0, 2.0, 3.0, -1.0]]
    assert rollout.reward.tolist() == [3.0, 5.0]
    assert rollout.baseline_token_rewards is not None
    assert rollout.baseline_token_rewards.tolist() == [[1.0, 2.0], [1.0, 0.0]]
    assert rollout.baseline_reward is not None
    assert rollout.baseline_reward.tolist() == [3.0, 1.0]
    # G_t - b_t: 3 - 3, 2 - 2; 5 - 1, 4 - 1, 2 - 1, -1 - 1
    objective = Objective(KLConfig(), AdvantageConfig(), LossConfig(), num_samples=1)
    advantages = objective.advantages(rollout, None, 0.0, lambda x: x)
    assert advantages.tolist() == [[0.0, 0.0, 0.0, 0.0], [4.0, 3.0, 1.0, -2.0]]
    assert torch.equal(objective.advantages(rollout.micro_batch(1, 2), None, 0.0, lambda x: x), advantages[1:])
    clip = AdvantageConfig(reward_clip=1.0, reward_clip_at="before_baseline")
    with pytest.raises(UserError, match=r"model\.advantage\.reward_clip_at must be after_baseline where model\.reward"):
        Objective(KLConfig(), clip, LossConfig(), num_samples=1).advantages(rollout, None, 0.0, lambda x: x)
    group = AdvantageConfig("leave_one_out")
    with pytest.raises(UserError, match=r"model\.kl\.in_baseline needs a reward that is one number per response"):
        Objective(KLConfig(in_baseline=True), group, LossConfig(), num_samples=2).advantages(
            rollout, rollout.token_rewards, 0.1, lambda x: x
        )


def test_seconds_are_counted_once_and_start_again() -> None:
    made = worker(FixedEngine([[20, 2, 3, 3]] * 2), reward=CharacterReward())
    made.roll_out(tiny_model(), prompt(), torch.Generator(), greedy=False)
    seconds = made.timer.pop()
    assert set(seconds) == {"rollout", "reward"}
    assert min(seconds.values()) > 0
    assert made.timer.pop() == {"rollout": 0.0, "reward": 0.0}


def test_the_reward_is_loaded_once_for_a_device() -> None:
    reward = CharacterReward()
    made = worker(FixedEngine([[20, 2, 3, 3]]), reward=reward)
    made.prepare(make_tokenizer(), [2], torch.device("cpu"))
    assert reward.loaded == 1


class Texts(Reward):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        self.texts += responses
        return [0.0] * len(responses)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("strings", [(), ("e",)])
def test_stop_strings_end_the_responses_of_supervised_validation_too(strings: tuple[str, ...], tmp_path: Path) -> None:
    policy, reward = save_policy(tmp_path / "policy", ends=()), Texts()
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}+{i}=", "response": "x"} for i in range(8)])
    sampling = SamplingConfig(max_response_length=24, stop_strings=strings)
    module = SFTModule(ModelConfig(policy), reward=reward, rollout=AutoEngine(), sampling=sampling)
    data = SFTDataModule(path, policy, val_path=path, batch_size=8)
    make_trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)
    cut = [text for text in reward.texts if "e" in text]
    assert cut  # the random policy writes the letter
    assert all(text.endswith("e") and text.count("e") == 1 for text in cut) == bool(strings)


@pytest.mark.parametrize(("skip", "read"), [(True, "aaaa"), (False, "a<s>aaa")])
def test_the_reward_reads_special_tokens_where_it_is_told_to(skip: bool, read: str) -> None:
    a = make_tokenizer().convert_tokens_to_ids("a")
    reward, sampling = Texts(), SamplingConfig(max_response_length=8, skip_special_tokens=skip)
    engine = FixedEngine([[a, 1, a, a, a, 2, 3, 3]] * 2)
    worker(engine, reward=reward, sampling=sampling).roll_out(tiny_model(), prompt(), torch.Generator(), greedy=False)
    assert reward.texts == [read] * 2
