"""Runs whose prompts are selected by what their responses gave."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import launch
from helpers.training import (
    CharacterReward,
    PromptEngine,
    Recorder,
    fit,
    make_trainer,
    prompt_data,
    remax_module,
    save_policy,
    weights_of,
)
from lightning.pytorch import Callback
from training.selection_ranks import PROMPTS, VARIANTS, LuckyReward, main, prompts_of, selected_run

from remax_lightning.data import SelectionConfig
from remax_lightning.errors import DataError, UserError
from remax_lightning.modules import AdvantageConfig
from remax_lightning.rewards import WeightedReward
from remax_lightning.training.prompt_selection import join_rollouts
from remax_lightning.types import PromptBatch, Responses, Rollout

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def run(policy: str, folder: Path, steps: int = 6, options: dict[str, Any] | None = None, **selection: Any) -> Recorder:
    module = remax_module(policy, reward=LuckyReward(), rollout=PromptEngine(), **(options or {}))
    data = prompt_data(folder, policy, PROMPTS, batch_size=4, selection=SelectionConfig(**selection))
    return fit(module, data, folder, max_steps=steps, max_epochs=-1)


def test_prompts_without_an_advantage_rest(policy: str, tmp_path: Path) -> None:
    recorder = run(policy, tmp_path, steps=12, skip_uninformative=1)
    drawn = prompts_of(recorder)
    # The reward pays for prompts with an even number only; the others have r = b = 0.
    even = sum(int(text) % 2 == 0 for batch in drawn for text in batch)
    assert even > 0.6 * 48
    assert recorder.logged[-1]["data/skipped"] > 0
    assert max(figures["data/resting"] for figures in recorder.logged) > 0
    assert 0 < recorder.logged[0]["data/informative_share"] < 1
    assert sum(int(text) % 2 == 0 for batch in prompts_of(run(policy, tmp_path, steps=12)) for text in batch) < 30


def test_oversampling_fills_the_step_with_prompts_that_have_an_advantage(policy: str, tmp_path: Path) -> None:
    recorder = run(policy, tmp_path, steps=2, oversample=3)
    for batch in prompts_of(recorder):
        assert len(batch) == len(set(batch)) == 4
        assert all(int(text) % 2 == 0 for text in batch)
    assert all(2 <= figures["data/rollout_batches"] <= 3 for figures in recorder.logged)


def test_oversampling_ends_at_its_bound(policy: str, tmp_path: Path) -> None:
    module = remax_module(policy, reward=LuckyReward(pays=False), rollout=PromptEngine())
    data = prompt_data(tmp_path, policy, PROMPTS, batch_size=4, selection=SelectionConfig(oversample=2))
    recorder = fit(module, data, tmp_path, max_steps=1)
    assert recorder.logged[0]["data/rollout_batches"] == 2
    assert len(prompts_of(recorder)[0]) == 4


def test_micro_batches_get_the_prompts_that_were_chosen(policy: str, tmp_path: Path) -> None:
    found = {}
    for micro_batch_size, accumulate in ((4, 1), (2, 2)):
        module = remax_module(policy, reward=LuckyReward(), rollout=PromptEngine())
        options = {"batch_size": 4, "micro_batch_size": micro_batch_size, "selection": SelectionConfig(oversample=3)}
        data = prompt_data(tmp_path, policy, PROMPTS, **options)
        found[accumulate] = fit(module, data, tmp_path, max_steps=1, accumulate_grad_batches=accumulate)
    one, two = found[1], found[2]
    assert list(chain(*prompts_of(two))) == prompts_of(one)[0]
    for name, value in one.step().items():
        torch.testing.assert_close(two.step()[name], value, atol=1e-5, rtol=1e-4)


class SaveAt(Callback):
    """Saves a checkpoint after a step, in the middle of the run."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_trains_on_the_prompts_that_the_other_does(policy: str, tmp_path: Path) -> None:
    selection = SelectionConfig(skip_uninformative=1, oversample=2, curriculum=0.5)
    path, recorders, ends = tmp_path / "step4.ckpt", [Recorder(), Recorder()], []
    for recorder in recorders:
        module = remax_module(policy, reward=LuckyReward(), rollout=PromptEngine())
        data = prompt_data(tmp_path, policy, PROMPTS, batch_size=4, selection=selection)
        trainer = make_trainer(tmp_path, [recorder, SaveAt(4, path)], max_steps=10, max_epochs=-1)
        trainer.fit(module, data, ckpt_path=path if path.exists() else None)
        ends.append(weights_of(module))
    whole, resumed = recorders
    assert len(whole.outputs) == 10
    assert prompts_of(resumed) == prompts_of(whole)[4:]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_two_ranks_draw_alike(policy: str, tmp_path: Path) -> None:
    launch(main, policy, tmp_path)
    for name in VARIANTS:
        one, two = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert one["state"] == two["state"]
        assert one["state"]["skipped"] > 0
        together = [sorted(mine + theirs) for mine, theirs in zip(one["prompts"], two["prompts"], strict=True)]
        assert all(len(set(prompts)) == 4 for prompts in together)
        if name == "left_out":  # each rank fills its own part where it oversamples
            alone = selected_run(policy, tmp_path / "alone", name, ranks=1)
            assert alone["state"] == one["state"]
            assert [sorted(prompts) for prompts in alone["prompts"]] == together


@pytest.mark.parametrize(
    ("selection", "options", "message"),
    [
        ({"skip_uninformative": 2}, {"advantage": AdvantageConfig(baseline="batch_mean")}, "batch_mean hardly one"),
        ({"oversample": 2}, {"advantage": AdvantageConfig(baseline="tracker")}, "oversample asks which .*tracker"),
        ({"oversample": 2}, {"advantage": AdvantageConfig(whiten=True)}, "needs model.advantage.whiten false"),
        (
            {"skip_uninformative": 2},
            {"reward": WeightedReward({"a": CharacterReward(), "b": CharacterReward()}, normalize="std")},
            "needs one reward per response",
        ),
        ({"curriculum": 0.5}, {"reward": CharacterReward()}, "needs rewards from 0 to 1"),
    ],
)
def test_what_has_no_meaning_is_refused(
    selection: dict[str, Any], options: dict[str, Any], message: str, policy: str, tmp_path: Path
) -> None:
    module = remax_module(policy, **({"reward": LuckyReward()} | options))
    data = prompt_data(tmp_path, policy, PROMPTS, batch_size=4, selection=SelectionConfig(**selection))
    with pytest.raises(UserError, match=message):
        fit(module, data, tmp_path, max_steps=3)


def test_loaders_that_lightning_replaces_are_refused(policy: str, tmp_path: Path) -> None:
    module = remax_module(policy, reward=LuckyReward())
    data = prompt_data(tmp_path, policy, PROMPTS, batch_size=4, selection=SelectionConfig(curriculum=0.5))
    with pytest.raises(UserError, match=r"needs trainer\.overfit_batches 0"):
        fit(module, data, tmp_path, overfit_batches=1)


def test_more_prompts_than_there_are_are_refused(policy: str, tmp_path: Path) -> None:
    data = prompt_data(tmp_path, policy, PROMPTS, batch_size=8, selection=SelectionConfig(oversample=4))
    with pytest.raises(DataError, match=r"oversample=4 may draw 32 prompts in a step, and there are 16"):
        fit(remax_module(policy, reward=LuckyReward()), data, tmp_path)


def test_joined_rollouts_are_padded_to_the_longest() -> None:
    def part(prompts: int, prompt_width: int, width: int, start: float) -> Rollout:
        def responses(rows: int) -> Responses:
            ids = torch.full((rows, width), 7)
            truncated = torch.zeros(rows, dtype=torch.bool)
            return Responses(ids, torch.ones_like(ids, dtype=torch.bool), truncated, ["t"] * rows)

        ids = torch.full((prompts, prompt_width), 5)
        mask = torch.ones_like(ids, dtype=torch.bool)
        batch = PromptBatch(ids, mask, ["p"] * prompts, [{}] * prompts, indices=[1] * prompts)
        reward = start + torch.arange(2.0 * prompts)
        return Rollout(
            batch, responses(2 * prompts), responses(prompts), reward, reward[:prompts], {"a": reward}, None, None,
            token_rewards=torch.full((2 * prompts, width), start),
        )  # fmt: skip

    joined = join_rollouts([part(1, 2, 3, 0.0), part(2, 4, 1, 10.0)], pad_id=0)
    assert joined.prompt.prompt_ids.tolist() == [[0, 0, 5, 5], [5] * 4, [5] * 4]
    assert joined.prompt.prompt_mask.sum(1).tolist() == [2, 4, 4]
    assert joined.sampled.response_ids.tolist()[1:3] == [[7, 7, 7], [7, 0, 0]]
    assert joined.sampled.response_mask.sum(1).tolist() == [3, 3, 1, 1, 1, 1]
    assert joined.greedy is not None
    assert len(joined.greedy.texts) == 3
    assert joined.reward.tolist() == joined.reward_parts["a"].tolist() == [0, 1, 10, 11, 12, 13]
    assert joined.token_rewards is not None
    assert joined.token_rewards.sum(1).tolist() == [0, 0, 10, 10, 10, 10]
