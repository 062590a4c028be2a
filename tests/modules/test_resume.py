"""A run that was interrupted and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import HALF, WHOLE, Setting
from helpers.training import CharacterReward

from remax_lightning.baselines import Auto, Tracker
from remax_lightning.callbacks import KLMonitor
from remax_lightning.modules import AdvantageConfig, KLConfig, LossConfig, WarmupCosine
from remax_lightning.rewards import FunctionReward, WeightedReward

pytestmark = pytest.mark.slow


def setting(name: str, folder: Path) -> Setting:
    clipped = {"loss": LossConfig(kind="clipped")}
    if name == "in the middle of an epoch":
        return Setting(folder)  # two steps to an epoch
    if name == "at the end of an epoch":
        return Setting(folder, prompts=6, data={"batch_size": 2})
    if name == "two micro-batches to a step":
        return Setting(folder, data={"micro_batch_size": 2}, trainer={"accumulate_grad_batches": 2})
    if name == "inside a rollout":  # four micro-batches, two updates: step 3 is the first of the second rollout
        options = {"data": {"micro_batch_size": 1}, "trainer": {"accumulate_grad_batches": 2}}
        parts = {"characters": CharacterReward(), "words": FunctionReward("remax_lightning.rewards.length_penalty")}
        reward = WeightedReward(parts, normalize="std")
        kl = KLConfig(credit="one_step", loss_coef=0.1)
        return Setting(folder, module=clipped | {"kl": kl, "reward": reward}, **options)
    if name == "a baseline with a memory":  # two steps to an epoch: every prompt is visited three times
        return Setting(folder, module={"advantage": AdvantageConfig(baseline=Tracker(decay=0.8))})
    if name == "a baseline that learns from training":
        auto = Auto(["greedy", "batch_mean"], window=8, compare_every=2, greedy_price=0.5)
        return Setting(folder, module={"advantage": AdvantageConfig(baseline=auto)})
    assert name == "dropout, adaptive KL and validation"
    return Setting(
        folder,
        "gpt2",
        dropout=True,
        data={"micro_batch_size": 2},
        module=clipped,
        trainer={"limit_val_batches": 1.0, "val_check_interval": 1, "gradient_clip_val": 0.5},
        callbacks=lambda: [KLMonitor(target_kl=0.5, adaptive=True, horizon=20)],
    )


SETTINGS = (
    "in the middle of an epoch",
    "at the end of an epoch",
    "two micro-batches to a step",
    "inside a rollout",
    "a baseline with a memory",
    "a baseline that learns from training",
    "dropout, adaptive KL and validation",
)


@pytest.mark.parametrize("name", SETTINGS)
def test_three_steps_and_three_are_six(name: str, tmp_path: Path) -> None:
    run = setting(name, tmp_path)
    whole, _ = run.start(seed=0, steps=WHOLE)
    half, _ = run.start(seed=0, steps=HALF)
    # Another seed: chance has to come from the checkpoint.
    rest, trainer = run.start(seed=99, steps=WHOLE, checkpoint=run.saved(0, HALF, HALF))
    assert trainer.global_step == WHOLE
    assert len(set(whole.losses)) == WHOLE
    assert half.losses + rest.losses == whole.losses
    assert rest.figures[-1] == pytest.approx(whole.figures[-1], rel=0, abs=0, nan_ok=True)
    for first, second in zip(whole.weights, half.weights + rest.weights, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("lost", ["random_state", "remax", "callbacks"])
def test_each_part_of_the_state_is_needed(lost: str, tmp_path: Path) -> None:
    """The setting above is strict enough to see what a checkpoint that forgets something would do."""
    run = setting("dropout, adaptive KL and validation", tmp_path)
    whole, _ = run.start(seed=0, steps=WHOLE)
    checkpoint = torch.load(run.saved(0, WHOLE, HALF), weights_only=True)
    checkpoint[lost] = {} if lost == "callbacks" else None
    poorer = tmp_path / "poorer.ckpt"
    torch.save(checkpoint, poorer)
    if lost == "remax":  # the second half of a rollout without the rollout
        with pytest.raises(ValueError, match="part 1 of a rollout batch came first"):
            run.start(seed=0, steps=WHOLE, checkpoint=poorer)
        return
    rest, _ = run.start(seed=99, steps=WHOLE, checkpoint=poorer)
    assert rest.figures[-1] != whole.figures[-1]


def test_a_checkpoint_inside_a_rollout_carries_it_and_one_at_its_end_does_not(tmp_path: Path) -> None:
    run = setting("inside a rollout", tmp_path)
    run.start(seed=0, steps=4)
    inside, done = (torch.load(run.saved(0, 4, step), weights_only=True)["remax"] for step in (3, 4))
    assert inside["rollouts"] == done["rollouts"] == 2
    assert inside["experience"][0]["advantages"].shape == (4, 5)
    assert done["experience"] == [None]


@pytest.mark.parametrize("loss", ["reinforce", "clipped"])
def test_a_checkpoint_in_the_middle_of_a_step_makes_its_gradients_anew(loss: str, tmp_path: Path) -> None:
    """As after a validation that `val_check_interval` puts there: two of four micro-batches, or one of two."""
    accumulate, interval, step = (4, 6, 1) if loss == "reinforce" else (2, 5, 2)
    options = {"accumulate_grad_batches": accumulate, "limit_val_batches": 1.0, "val_check_interval": interval}
    saves = {"save_top_k": -1, "save_on_train_epoch_end": False}
    module = {"loss": LossConfig(kind=loss)}  # type: ignore[arg-type]
    run = Setting(tmp_path, data={"micro_batch_size": 1}, module=module, trainer=options, saves=saves)
    whole, _ = run.start(seed=0, steps=WHOLE)
    rest, _ = run.start(seed=99, steps=WHOLE, checkpoint=run.saved(0, WHOLE, step))
    assert rest.losses == whole.losses[step:]
    for first, second in zip(whole.weights[step:], rest.weights, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


SAVES = {
    "as Lightning does by default": {},
    "every validation": {"save_top_k": -1, "save_on_train_epoch_end": False},
    "every epoch": {"save_top_k": -1, "save_on_train_epoch_end": True},
}
VALIDATES = {"limit_val_batches": 1.0, "val_check_interval": 1}


@pytest.mark.parametrize("moment", SAVES)
def test_a_run_that_stopped_inside_an_epoch_goes_on_as_if_it_had_not(moment: str, tmp_path: Path) -> None:
    run = Setting(tmp_path, trainer=VALIDATES, saves=SAVES[moment])
    whole, _ = run.start(seed=0, steps=WHOLE)
    run.start(seed=0, steps=HALF)
    rest, _ = run.start(seed=5, steps=WHOLE, checkpoint=run.saved(0, HALF, HALF))
    assert rest.losses == whole.losses[HALF:]


@pytest.mark.parametrize("moment", ["every step", *SAVES])
def test_a_run_counted_in_epochs_resumes_from_all_its_checkpoints(moment: str, tmp_path: Path) -> None:
    """The length of the schedule is then known from the data, which must not be read before the checkpoint."""
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "limit_val_batches": 1.0, "val_check_interval": 2}
    module = {"loss": LossConfig(kind="clipped"), "lr_scheduler": partial(WarmupCosine, warmup_steps=2)}
    data = {"micro_batch_size": 1}
    run = Setting(tmp_path, data=data, module=module, trainer=options, saves=SAVES.get(moment))
    whole, _ = run.start(seed=0, steps=-1)
    assert len(set(whole.losses)) == len(whole.losses) == 8
    checkpoints = sorted((tmp_path / "0--1").glob("*.ckpt"))
    assert checkpoints
    for checkpoint in checkpoints:
        done = int(checkpoint.stem.removeprefix("step="))
        rest, _ = run.start(seed=99, steps=-1, checkpoint=checkpoint)
        assert rest.losses == whole.losses[done:]


def test_the_schedule_of_a_resumed_run_has_the_length_that_the_configuration_says(tmp_path: Path) -> None:
    run = Setting(tmp_path, module={"lr_scheduler": WarmupCosine})
    _, short = run.start(seed=0, steps=HALF)
    assert short.optimizers[0].param_groups[0]["lr"] == 0.0  # decayed to its end
    _, longer = run.start(seed=0, steps=4 * HALF, checkpoint=run.saved(0, HALF, HALF))
    assert longer.lr_scheduler_configs[0].scheduler.total_steps == 4 * HALF
    assert longer.optimizers[0].param_groups[0]["lr"] == 0.0
    _, extended = run.start(seed=1, steps=WHOLE - 1, checkpoint=run.saved(0, 4 * HALF, HALF + 1))
    assert extended.lr_scheduler_configs[0].scheduler.total_steps == WHOLE - 1


def test_the_memory_of_another_baseline_is_left(tmp_path: Path) -> None:
    """Running means of a tracker are no greedy rewards."""
    tracker = Setting(tmp_path, module={"advantage": AdvantageConfig(baseline="tracker")})
    tracker.start(seed=0, steps=HALF)  # every prompt was seen
    cached = Setting(tmp_path, module={"advantage": AdvantageConfig(baseline="cached_greedy")})
    rest, _ = cached.start(seed=0, steps=HALF + 1, checkpoint=tracker.saved(0, HALF, HALF))
    assert math.isfinite(rest.figures[0]["train/baseline_reward"])  # of a greedy response of its own
