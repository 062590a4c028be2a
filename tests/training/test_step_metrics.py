"""At which step figures stand: the optimizer steps done, for every logger."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import make_trainer, prompt_data, remax_module, save_policy
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger

from remax_lightning.callbacks import Evaluation
from remax_lightning.training.optimization import learning_rates


class Listed(Logger):
    """A logger of anyone's: keeps what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    name = property(lambda self: "listed")  # type: ignore[assignment]
    version = property(lambda self: 0)  # type: ignore[assignment]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to do."""

    def steps(self, key: str) -> list[int]:
        return [step for step, metrics in self.lines if key in metrics]


class Figures(Callback):
    """Logs a figure of a user's own after each batch and each epoch, and one at a step that it names."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.log("mine/batch", float(trainer.global_step), batch_size=1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("mine/epoch", float(trainer.global_step))
        trainer.logger.log_metrics({"mine/named": 1.0}, step=77)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def fitted(folder: Path, policy: str, at_start: bool = True, **options: Any) -> tuple[Listed, Any, Any]:
    """Two epochs of two optimizer steps, each of two micro-batches, with a validation after each epoch."""
    torch.manual_seed(0)
    logger, module = Listed(), remax_module(policy, optimizer=partial(torch.optim.SGD, lr=0.5))
    defaults = {"max_steps": 4, "limit_val_batches": 1.0, "accumulate_grad_batches": 2}
    trainer = make_trainer(
        folder,
        [Figures(), Evaluation(at_start=at_start)],
        logger=[logger, CSVLogger(folder)],
        **(defaults | options),
    )
    trainer.fit(module, prompt_data(folder, policy, batch_size=4, micro_batch_size=2))
    return logger, trainer, module


@pytest.mark.slow
def test_all_figures_stand_at_the_steps_done(tmp_path: Path, policy: str) -> None:
    logger, trainer, _ = fitted(tmp_path, policy)
    for key in ("train/reward", "train/loss", "train/lr", "train/grad_norm", "mine/batch"):
        assert logger.steps(key) == [1, 2, 3, 4], key
    assert [metrics["mine/batch"] for _, metrics in logger.lines if "mine/batch" in metrics] == [1, 2, 3, 4]
    assert logger.steps("val/reward") == [0, 2, 4]
    assert [(step, metrics["mine/epoch"]) for step, metrics in logger.lines if "mine/epoch" in metrics] == [
        (2, 2),
        (4, 4),
    ]
    assert logger.steps("mine/named") == [77, 77]
    assert all("epoch" in metrics for step, metrics in logger.lines if step != 77)
    rows = Path(trainer.loggers[1].log_dir, "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("step")
    assert {row.split(",")[column] for row in rows[1:]} == {"0", "1", "2", "3", "4"}


@pytest.mark.slow
def test_intervals_of_logging_count_steps_done(tmp_path: Path, policy: str) -> None:
    logger, *_ = fitted(tmp_path, policy, log_every_n_steps=2)
    assert logger.steps("train/reward") == [2, 4]


# The evaluation before the first step


@pytest.mark.slow
def test_an_evaluation_at_the_start_changes_no_training_and_takes_the_place_of_the_sanity_check(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[bool] = []
    monkeypatch.setattr(Figures, "on_sanity_check_start", lambda *_: checked.append(True), raising=False)
    with_start, _, one = fitted(tmp_path, policy, at_start=True, num_sanity_val_steps=1)
    assert not checked
    without, _, two = fitted(tmp_path, policy, at_start=False, num_sanity_val_steps=1)
    assert checked
    assert without.steps("val/reward") == [2, 4]
    assert all(torch.equal(*pair) for pair in zip(one.policy.parameters(), two.policy.parameters(), strict=True))
    rewards = [[m["train/reward"] for _, m in logger.lines if "train/reward" in m] for logger in (with_start, without)]
    assert rewards[0] == rewards[1]


@pytest.mark.slow
def test_the_evaluation_at_the_start_is_that_of_the_untrained_policy(tmp_path: Path, policy: str) -> None:
    logger, *_ = fitted(tmp_path, policy)
    trainer = make_trainer(tmp_path, [Evaluation()], limit_val_batches=1.0)
    torch.manual_seed(0)
    data = prompt_data(tmp_path, policy, batch_size=4, micro_batch_size=2)
    (expected,) = trainer.validate(remax_module(policy), data, verbose=False)
    at_start = next(metrics for step, metrics in logger.lines if step == 0)
    assert {key: at_start[key] for key in expected} == pytest.approx(expected)


@pytest.mark.slow
def test_a_resumed_run_does_not_repeat_it(tmp_path: Path, policy: str) -> None:
    _, trainer, _ = fitted(tmp_path, policy, max_steps=2)
    trainer.save_checkpoint(tmp_path / "step2.ckpt")
    logger, resumed = (
        Listed(),
        make_trainer(
            tmp_path, [Evaluation()], logger=None, max_steps=4, limit_val_batches=1.0, accumulate_grad_batches=2
        ),
    )
    resumed.loggers = [logger]
    resumed.fit(
        remax_module(policy, optimizer=partial(torch.optim.SGD, lr=0.5)),
        prompt_data(tmp_path, policy, batch_size=4, micro_batch_size=2),
        ckpt_path=str(tmp_path / "step2.ckpt"),
    )
    assert logger.steps("val/reward") == [4]
    assert logger.steps("train/reward") == [3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"fast_dev_run": 2}])
def test_without_validation_or_in_a_dry_run_there_is_none(options: dict[str, Any], tmp_path: Path, policy: str) -> None:
    logger, trainer, _ = fitted(tmp_path, policy, **options)
    assert trainer.global_step > 0
    assert 0 not in logger.steps("val/reward")


# Learning rates


def groups(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)


def test_every_group_with_a_rate_of_its_own_is_a_curve() -> None:
    assert learning_rates(groups(0.1, 0.1)) == {"train/lr": 0.1}
    optimizer = groups(0.1, 0.2)
    assert learning_rates(optimizer) == {"train/lr": 0.1, "train/lr/0": 0.1, "train/lr/1": 0.2}
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # both 0 in a warm-up: the curves go on
    assert learning_rates(optimizer) == {"train/lr": 0.0, "train/lr/0": 0.0, "train/lr/1": 0.0}
