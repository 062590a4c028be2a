"""Steps whose gradient is not finite are skipped, counted and told; several in a row end the run."""

from __future__ import annotations

import math
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.ranks import launch
from helpers.stages import pair_data, sft_data
from helpers.training import make_trainer, prompt_data, remax_module, save_policy
from training.skipping_ranks import Overflow, Weights, equal, float16, main

from remax_lightning.errors import UserError
from remax_lightning.models import ModelConfig
from remax_lightning.modules import RewardModelModule, SFTModule
from remax_lightning.training import optimization

STAGES = ("remax", "sft", "reward_model")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def stage(name: str, policy: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """A module and its data; one optimizer step is one batch."""
    options = {"optimizer": partial(torch.optim.AdamW, lr=0.01), **options}
    if name == "remax":
        return remax_module(policy, **options), prompt_data(folder, policy, batch_size=4)
    if name == "sft":
        return SFTModule(ModelConfig(policy), **options), sft_data(folder, policy, batch_size=4)
    return RewardModelModule(ModelConfig(policy), **options), pair_data(folder, policy, batch_size=4)


def train(module: Any, data: Any, folder: Path, *callbacks: Any, **options: Any) -> tuple[Weights, list[str], Any]:
    """Train for some steps; returns what was seen of the weights, the warnings, and the error that ended the run."""
    seen, error = Weights(), None
    torch.manual_seed(0)
    trainer = make_trainer(folder, [*callbacks, seen], **{"max_steps": 4, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, data)
        except UserError as end:
            error = end
    return seen, [str(warning.message) for warning in caught if "skipped" in str(warning.message)], error


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("name", STAGES)
def test_a_step_that_is_not_finite_changes_nothing(name: str, value: float, policy: str, tmp_path: Path) -> None:
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    module, data = stage(name, policy, tmp_path, lr_scheduler=schedule)
    moments: list[Any] = []

    class Moments(Weights):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            moments.append([state["exp_avg"].clone() for state in trainer.optimizers[0].state.values()])

    seen, told, error = train(module, data, tmp_path, Overflow({2}, value), Moments(), gradient_clip_val=1.0)
    assert error is None
    changed = [not equal(*pair) for pair in zip(seen.weights, seen.weights[1:], strict=False)]
    assert changed == [True, False, True, True]
    assert seen.skipped == [0, 1, 1, 1]
    assert seen.rates == pytest.approx([0.01, 0.005, 0.005, 0.0025])
    assert all(torch.equal(*pair) for pair in zip(moments[0], moments[1], strict=True))
    assert not all(torch.equal(*pair) for pair in zip(moments[1], moments[2], strict=True))
    assert len(told) == 1
    assert all(part in told[0] for part in ("Optimizer step 2 is skipped", "learning rate 0.005", "loss ", "norm "))


@pytest.mark.slow
def test_the_cause_is_named(policy: str, tmp_path: Path) -> None:
    module, data = stage("sft", policy, tmp_path)
    _, told, _ = train(module, data, tmp_path, Overflow({1}), max_steps=1)
    assert "The loss is finite, and the backward pass overflows, first at policy.model.embed_tokens.weight" in told[0]
    assert "model.optimizer.init_args.lr" in told[0]

    class Damage(Overflow):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            with torch.no_grad():
                pl_module.policy.lm_head.weight[3, 1] = math.nan

    module, data = stage("sft", policy, tmp_path)
    _, told, _ = train(module, data, tmp_path, Damage(()), max_steps=1)
    assert "The weights themselves are not finite (policy.lm_head.weight)" in told[0]

    class BadLoss(SFTModule):
        def training_step(self, *arguments: Any) -> Any:
            output = super().training_step(*arguments)
            self.log("train/loss", math.nan, prog_bar=True, batch_size=1)
            self.log("train/mine", math.inf, batch_size=1)
            return {"loss": output["loss"] * math.nan}

    module = BadLoss(ModelConfig(policy))
    _, told, _ = train(module, sft_data(tmp_path, policy), tmp_path, max_steps=1)
    assert "The loss is not finite already, as train/mine" in told[0]


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("name", STAGES)
def test_several_in_a_row_end_the_run(name: str, policy: str, tmp_path: Path) -> None:
    module, data = stage(name, policy, tmp_path, max_skipped_steps=3)
    seen, told, error = train(module, data, tmp_path, Overflow({1, 2, 4, 5, 6}), max_steps=9)
    assert len(told) == 4
    assert "optimizer step 6: " in str(error)
    assert "model.max_skipped_steps: 3" in str(error)
    assert all(equal(seen.weights[3], weights) for weights in seen.weights[3:])


def test_a_limit_below_one_is_refused(policy: str) -> None:
    with pytest.raises(UserError, match=r"model\.max_skipped_steps must be at least 1"):
        remax_module(policy, max_skipped_steps=0)


@pytest.mark.slow(0.3)
def test_a_resumed_run_goes_on_counting(policy: str, tmp_path: Path) -> None:
    module, data = stage("sft", policy, tmp_path)
    trainer = make_trainer(tmp_path, [Overflow({1, 2})], max_steps=2)
    with pytest.warns(UserWarning, match="skipped"):
        trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    module, data = stage("sft", policy, tmp_path, max_skipped_steps=3)
    trainer = make_trainer(tmp_path, [Overflow({3})], max_steps=4)
    with pytest.raises(UserError, match="the last 3 optimizer steps"):
        trainer.fit(module, data, ckpt_path=tmp_path / "step.ckpt")
    assert module.skipped_steps.total == 3


@pytest.mark.slow(0.3)
def test_lowering_a_loss_scale_ends_no_run(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 searches its loss scale by overflows, and may take more steps than the limit."""
    scale = [2.0**4]

    class Scaler:
        def is_enabled(self) -> bool:
            return True

        def get_scale(self) -> float:
            scale[0] /= 2
            return scale[0]

    module, data = stage("sft", policy, tmp_path, max_skipped_steps=2)
    trainer = make_trainer(tmp_path, [Overflow(range(1, 20))], max_steps=20)
    monkeypatch.setattr(trainer.precision_plugin, "scaler", Scaler(), raising=False)
    with pytest.warns(UserWarning, match="loss scale 8, which is lowered"), pytest.raises(UserError) as error:
        trainer.fit(module, data)
    assert "optimizer step 5: " in str(error.value)  # scales 8, 4 and 2 fall; 1 and 0.5 count


@pytest.mark.parametrize(("value", "hysteresis", "can_fall"), [(2.0, 1, True), (1.0, 2, True), (1.0, 1, False)])
def test_deepspeeds_loss_scale_ends_where_deepspeed_does(value: float, hysteresis: int, can_fall: bool) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from lightning.pytorch.strategies import DeepSpeedStrategy

    scaler = DynamicLossScaler(value, 1000, 1.0, 2, False)
    scaler.cur_hysteresis = hysteresis
    strategy = object.__new__(DeepSpeedStrategy)
    strategy._model = None
    strategy.__dict__["_fake"] = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
    fake = type("Fake", (DeepSpeedStrategy,), {"deepspeed_engine": property(lambda self: self._fake)})
    strategy.__class__ = fake
    trainer = cast(Any, SimpleNamespace(strategy=strategy))
    assert optimization._loss_scale(trainer) == (value, can_fall, not can_fall)


@pytest.mark.slow
def test_two_ranks_skip_together_under_every_strategy(policy: str, tmp_path: Path) -> None:
    launch(main, policy, tmp_path)


@pytest.mark.slow
def test_what_deepspeed_skips_in_silence_is_counted(policy: str, tmp_path: Path) -> None:
    launch(float16, policy, tmp_path)
