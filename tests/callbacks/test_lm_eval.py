"""When the policy is measured by lm-eval, what is logged, and that training does not notice; tests/real has lm-eval."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.fakes import FakeModule, checkpoint_at, make_output, make_trainer
from conftest import make_tokenizer, tiny_model
from helpers.harness import FakeHarness, install
from helpers.loggers import RecordingLogger
from helpers.training import Recorder, prompt_data, remax_module, save_policy
from helpers.training import make_trainer as plain_trainer

from remax_lightning.callbacks import ExportPolicy, LMEval
from remax_lightning.errors import UserError
from remax_lightning.training.metrics import log_at_global_step

KEY = "lm_eval/arc_easy/acc"


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> FakeHarness:
    return install(monkeypatch)


class PolicyModule(FakeModule):
    """Fake steps, real policy: its first weight is the number of the optimizer step."""

    def __init__(self, steps: int, **options: Any) -> None:
        super().__init__([make_output(i) for i in range(steps)], [make_output(9)], **options)
        self.policy, self.tokenizer = tiny_model("llama"), make_tokenizer()
        with torch.no_grad():
            self.policy.get_input_embeddings().weight[0, 0] = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.policy.get_input_embeddings().weight[0, 0] = float(self.trainer.global_step + 1)
        return super().training_step(batch, batch_idx)


def fit(folder: Path, callback: LMEval, *callbacks: Any, steps: int = 4, **options: Any) -> RecordingLogger:
    logger = RecordingLogger(folder)
    trainer = make_trainer(folder, [callback, *callbacks], logger=logger, val_check_interval=1, **options)
    log_at_global_step(trainer)  # as every module of the package does
    trainer.fit(PolicyModule(steps))
    return logger


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2, 3, 4]),  # the last validation measures the end
        ({"every_n_steps": 2}, [1, 3, 4]),
        ({"every_n_steps": 2, "at_end": False}, [1, 3]),
        ({"every_n_steps": 0}, [4]),
        ({"every_n_steps": 0, "at_end": False}, []),
    ],
)
def test_it_measures_the_policy_of_the_step(
    lm_eval: FakeHarness, tmp_path: Path, options: dict[str, Any], expected: list[int]
) -> None:
    logger = fit(tmp_path, LMEval(["arc_easy"], **options))
    assert logger.metrics.get(KEY, []) == [(step, float(step)) for step in expected]
    assert logger.metrics.get(f"{KEY}_stderr", []) == [(step, 0.25) for step in expected]
    assert [value for _, value in logger.metrics.get("lm_eval/arc_easy/exact_match/strict-match", [])] == [0.0] * len(
        expected
    )
    assert not any("note" in key or "match/strict-match_stderr" in key for key in logger.metrics)
    assert len(lm_eval.managers) == 1  # tasks are loaded once


def test_options_reach_lm_eval(lm_eval: FakeHarness, tmp_path: Path) -> None:
    callback = LMEval(["arc_easy", "hellaswag"], limit=0.5, num_fewshot=3, batch_size=2, apply_chat_template=True)
    fit(tmp_path, callback, steps=1)
    (call,) = lm_eval.calls
    assert (call["limit"], call["batch_size"], call["apply_chat_template"]) == (0.5, 2, True)
    assert call["softmax_dtype"] == torch.float32
    assert call["mixed_precision_dtype"] is None
    assert [count for count, _ in call["fewshot"]] == [3, 0]  # a task that is made for none keeps 0
    assert [(figure.task, figure.metric, figure.n) for figure in callback.figures][:2] == [
        ("arc_easy", "acc", 4),
        ("arc_easy", "exact_match/strict-match", 4),
    ]


def test_mixed_precision_is_that_of_the_run(lm_eval: FakeHarness, tmp_path: Path) -> None:
    fit(tmp_path, LMEval(["arc_easy"]), steps=1, precision="bf16-mixed")
    assert lm_eval.calls[0]["mixed_precision_dtype"] == torch.bfloat16


def test_every_measurement_draws_the_same_numbers(lm_eval: FakeHarness, tmp_path: Path) -> None:
    fit(tmp_path, LMEval(["arc_easy"]), steps=2)
    first, second = lm_eval.calls
    assert first["draws"] == second["draws"]
    assert first["environment"] == "1"  # a process with a GPU is not forked


@pytest.mark.slow
def test_the_best_policy_is_chosen_by_a_task(lm_eval: FakeHarness, tmp_path: Path) -> None:
    export = ExportPolicy(str(tmp_path / "policy"), monitor=KEY, mode="min", last=False)
    fit(tmp_path, LMEval(["arc_easy"]), export)
    assert export.best_score == 1.0


@pytest.mark.slow
def test_training_is_the_same_bit_for_bit(lm_eval: FakeHarness, tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy")
    runs = []
    for callbacks in ([], [LMEval(["arc_easy"])]):
        recorder = Recorder()
        module, data = remax_module(policy), prompt_data(tmp_path, policy, batch_size=4)
        torch.manual_seed(0)
        trainer = plain_trainer(
            tmp_path, [recorder, *callbacks], max_steps=3, max_epochs=3, limit_val_batches=1, val_check_interval=1
        )
        trainer.fit(module, data)
        runs.append(recorder)
        assert module.tokenizer.pad_token == "<pad>"
        assert "tie_weights" not in vars(module.policy)
    assert len(lm_eval.calls) >= 3
    assert all(torch.equal(value, runs[1].weights[-1][name]) for name, value in runs[0].weights[-1].items())
    texts = [[output["rollout"].sampled.texts for output in run.outputs] for run in runs]
    assert texts[0] == texts[1]


def test_modes_of_layers_are_restored(lm_eval: FakeHarness, tmp_path: Path) -> None:
    module = PolicyModule(1)
    module.policy.train()
    module.policy.lm_head.eval()  # as a frozen part would be
    make_trainer(tmp_path, [LMEval(["arc_easy"], every_n_steps=0)], limit_val_batches=0).fit(module)
    assert len(lm_eval.calls) == 1
    assert module.policy.training
    assert not module.policy.lm_head.training


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_it_measures_in_every_evaluation_outside_of_a_fit(lm_eval: FakeHarness, tmp_path: Path, stage: str) -> None:
    module, logger = PolicyModule(1), RecordingLogger(tmp_path)
    module.test_step = module.validation_step  # type: ignore[method-assign]
    module.test_dataloader = module.val_dataloader  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, [LMEval(["arc_easy"], every_n_steps=0, at_end=False)], logger=logger)
    (metrics,) = getattr(trainer, stage)(module, verbose=False)
    assert metrics[KEY] == 0.0
    assert KEY in logger.metrics


@pytest.mark.slow(0.3)
def test_a_resumed_run_remembers_the_last_measurement(lm_eval: FakeHarness, tmp_path: Path) -> None:
    fit(tmp_path, LMEval(["arc_easy"], every_n_steps=3, at_end=False), checkpoint_at(2, tmp_path), steps=5)
    logger = RecordingLogger(tmp_path)
    resumed = LMEval(["arc_easy"], every_n_steps=3, at_end=False)
    trainer = make_trainer(tmp_path, [resumed], logger=logger, val_check_interval=1)
    log_at_global_step(trainer)
    trainer.fit(PolicyModule(5), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert [step for step, _ in logger.metrics[KEY]] == [4]  # the first was at step 1


def test_without_tasks_nothing_is_loaded_or_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    fit(tmp_path, LMEval(), steps=1)
    assert LMEval().state_dict() == {}


# ---- Mistakes and failures ----


def test_a_missing_package_is_told_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lm_eval\.tasks needs lm-eval; pip install 'remax-lightning\[lm-eval\]'"):
        fit(tmp_path, LMEval(["arc_easy"]))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["arc_esay"], r"lm_eval\.tasks: lm-eval has no task 'arc_esay'; did you mean arc_easy"),
        (["zzz"], r"no task 'zzz'; `lm-eval ls tasks` lists"),
        (["mine.yaml"], r"there is no file 'mine\.yaml'"),
        (["arc_challenge"], r"cannot load arc_challenge: ConnectionError: cannot reach the hub$"),
    ],
)
def test_tasks_that_cannot_be_had_end_the_run_before_it_starts(
    lm_eval: FakeHarness, tmp_path: Path, tasks: list[str], message: str
) -> None:
    module = PolicyModule(1)
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, [LMEval(tasks)]).fit(module)
    assert module.kl_coefs == []


def test_a_failed_measurement_ends_no_fit(lm_eval: FakeHarness, tmp_path: Path) -> None:
    lm_eval.failure = RuntimeError("out of memory\nlong advice")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logger = fit(tmp_path, LMEval(["arc_easy"]), steps=2)
    messages = [str(warning.message) for warning in caught if "lm_eval" in str(warning.message)]
    assert messages == [
        f"lm_eval: RuntimeError: out of memory. Training goes on; optimizer step {step} is not measured."
        for step in (1, 2)
    ]
    assert KEY not in logger.metrics


def test_a_failed_measurement_ends_an_evaluation(lm_eval: FakeHarness, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lm_eval\.tasks: lm-eval refuses: .* marked as unsafe"):
        make_trainer(tmp_path, [LMEval(["writes_code"])]).validate(PolicyModule(1), verbose=False)


def test_a_module_without_a_policy_is_refused(lm_eval: FakeHarness, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lm_eval\.tasks must be empty for FakeModule"):
        make_trainer(tmp_path, [LMEval(["arc_easy"])]).validate(FakeModule([], [make_output(0)]), verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "arc_easy"}, r"lm_eval\.tasks must be a list"),
        ({"every_n_steps": -1}, r"lm_eval\.every_n_steps"),
        ({"limit": 1.5}, r"lm_eval\.limit must be a count of documents, or a share below 1, got 1\.5"),
        ({"limit": 0}, r"lm_eval\.limit"),
        ({"num_fewshot": -1}, r"lm_eval\.num_fewshot"),
        ({"batch_size": 0}, r"lm_eval\.batch_size"),
    ],
)
def test_wrong_options_name_their_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LMEval(**options)
