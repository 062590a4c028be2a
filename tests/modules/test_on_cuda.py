"""Whole runs on a pretended CUDA device, against the same runs on a CPU: the same draws, so the same figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from fake_cuda import FakeCuda, is_there, pretend
from helpers.checkpoints import HALF, TIMES, WHOLE, Setting
from helpers.reward_models import save_classifier
from helpers.stages import EXAMPLES, PAIRS
from helpers.training import Recorder, fit, make_trainer, prompt_data, remax_module, save_policy, write_rows
from training.skipping_ranks import Overflow, Weights, equal

from remax_lightning.callbacks import BaselineMonitor, CollapseDetector, Evaluation, KLMonitor, SampleDump, Throughput
from remax_lightning.data import PreferenceDataModule, SFTDataModule
from remax_lightning.models import LoRAConfig, ModelConfig, sampling
from remax_lightning.modules import KLConfig, LossConfig, RewardModelModule, SFTModule
from remax_lightning.rewards import ClassifierReward
from remax_lightning.rollout import HuggingFaceEngine, SamplingConfig
from remax_lightning.rollout import decode_loop as decoding

pytestmark = pytest.mark.slow

Ran = TypeVar("Ran")
ADAMW = partial(torch.optim.AdamW, lr=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reference and a reward model."""
    path = tmp_path_factory.mktemp("models")
    save_policy(path / "policy", family="qwen2")
    save_policy(path / "reference", family="qwen2", noise=0.02)
    save_classifier(path / "reward", tiny_config("llama"), make_tokenizer())
    return path


def on_both(run: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch, replays: bool = True) -> tuple[Ran, Ran]:
    """Make a run on the CPU, which draws as CUDA does for it, and on the pretended device, with graphs or without."""
    with monkeypatch.context() as patch:
        race, smaller_batch = sampling.sample_exponential_race, decoding.smaller_batch
        patch.setattr(sampling, "sample_inverse_cdf", lambda logits, generator, _: race(logits, generator))
        # There rows that are left draw other numbers, so the same ones have to leave on both, at the same tokens.
        patch.setattr(decoding, "smaller_batch", lambda left, size, _: smaller_batch(left, size, torch.device("cuda")))
        patch.setattr(decoding, "EOS_CHECK_INTERVAL", 1)
        here = run("cpu")
        with pretend(patch) as device:
            there = run("gpu")
        assert (sum(graph.replays for graph in device.graphs) > 0) == replays
    return here, there


def figures_of(logged: Mapping[str, Any]) -> dict[str, float]:
    """What was logged, without the clock's figures."""
    return {name: float(value) for name, value in logged.items() if not name.startswith(TIMES)}


def check_equal(here: Recorder, there: Recorder, tolerance: float = 1e-4) -> None:
    """The same figures in all steps, and weights that are where they were trained."""
    assert len(here.logged) == len(there.logged) > 0
    for first, second in zip(here.logged, there.logged, strict=True):
        expected = pytest.approx(figures_of(first), rel=tolerance, abs=tolerance, nan_ok=True)
        assert figures_of(second) == expected
    for first, second in zip(here.weights, there.weights, strict=True):
        assert all(map(is_there, second.values()))
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=tolerance, atol=tolerance)


def remax(path: Path, **options: Any) -> Any:
    policy, reference = str(path / "policy"), ModelConfig(str(path / "reference"), placement="cpu")
    reward = ClassifierReward(str(path / "reward"), "{prompt}{response}", batch_size=3, placement="cpu")
    defaults = {"policy": policy, "reference": reference, "kl_coef": 0.05, "reward": reward, "optimizer": ADAMW}
    return remax_module(**(defaults | options))


def adapted(path: Path, **options: Any) -> Any:
    policy = ModelConfig(str(path / "policy"), lora=LoRAConfig(r=4), gradient_checkpointing=True)
    return remax(path, policy=policy, reference=None, kl_coef=0.05, **options)


CASES: dict[str, Callable[[Path], Any]] = {
    "parked models": remax,
    "resident models": lambda path: remax(
        path,
        reference=ModelConfig(str(path / "reference")),
        reward=ClassifierReward(str(path / "reward"), "{prompt}{response}"),
    ),
    "adapter": adapted,
    "full KL": lambda path: remax(path, kl=KLConfig("full", loss_coef=0.1, loss_estimator="full")),
    "several samples, truncated, clipped loss": lambda path: remax(
        path,
        sampling=SamplingConfig(
            num_samples=2, top_k=20, top_p=0.9, min_p=0.01, temperature=0.7, max_response_length=20,
            min_response_length=2, processed_log_probs=True, stop_strings=["a"],
        ),
        loss=LossConfig("clipped", old_log_probs="rollout"),
    ),
    "one call of the model's own": lambda path: remax(path, rollout=HuggingFaceEngine()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_remax_trains_as_on_a_cpu(case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(accelerator: str) -> Recorder:
        callbacks = [Throughput(), KLMonitor(), BaselineMonitor(), CollapseDetector()]
        data = prompt_data(tmp_path, str(folder / "policy"), micro_batch_size=4)
        module = CASES[case](folder)
        parts = 1 if "clipped" in case else 2
        return fit(
            module, data, tmp_path, accelerator=accelerator, max_steps=3, max_epochs=-1, accumulate_grad_batches=parts,
            limit_val_batches=1.0, val_check_interval=1, callbacks=callbacks,
        )  # fmt: skip

    check_equal(*on_both(run, monkeypatch, replays=case != "one call of the model's own"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_remax_trains_in_16_bits(precision: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README's first example does, with activations recomputed and gradients clipped."""

    def run(accelerator: str) -> Recorder:
        module = remax(folder, policy=ModelConfig(str(folder / "policy"), gradient_checkpointing=True))
        data = prompt_data(tmp_path, str(folder / "policy"), micro_batch_size=2)
        return fit(
            module, data, tmp_path, accelerator=accelerator, max_steps=3, max_epochs=-1, precision=precision,
            accumulate_grad_batches=4, gradient_clip_val=1.0,
        )  # fmt: skip

    check_equal(*on_both(run, monkeypatch), tolerance=0.02)


def test_the_earlier_stages_train_as_on_a_cpu(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = str(folder / "policy")
    examples, pairs = write_rows(tmp_path / "examples.jsonl", EXAMPLES), write_rows(tmp_path / "pairs.jsonl", PAIRS)

    def tuned(accelerator: str) -> Recorder:
        module = SFTModule(ModelConfig(policy), packing=True, optimizer=ADAMW)
        data = SFTDataModule(examples, policy, examples, batch_size=4, max_prompt_length=32)
        return fit(module, data, tmp_path, accelerator=accelerator, max_steps=2, limit_val_batches=1.0)

    def compared(accelerator: str) -> dict[str, float]:
        module = RewardModelModule(ModelConfig(policy), optimizer=ADAMW)
        data = PreferenceDataModule(pairs, policy, pairs, batch_size=4, max_prompt_length=32, max_length=64)
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, accelerator=accelerator, max_steps=2, limit_val_batches=1.0)
        trainer.fit(module, data)
        return figures_of(trainer.callback_metrics)

    check_equal(*on_both(tuned, monkeypatch, replays=False))
    here, there = on_both(compared, monkeypatch, replays=False)
    assert there == pytest.approx(here, rel=1e-4, abs=1e-4)


def test_a_run_is_resumed(tmp_path: Path, fake_cuda: FakeCuda) -> None:
    setting = Setting(tmp_path, "gpt2", dropout=True, trainer={"accelerator": "gpu", "precision": "bf16-mixed"})
    whole, _ = setting.start(0, WHOLE)
    setting.start(0, HALF)
    resumed, _ = setting.start(0, WHOLE, setting.saved(0, HALF, HALF))
    assert resumed.figures == whole.figures[HALF:]
    for name, value in whole.weights[-1].items():
        assert torch.equal(resumed.weights[-1][name], value)
    assert sum(graph.replays for graph in fake_cuda.graphs) > 0


def test_a_gradient_that_is_not_finite_is_skipped(folder: Path, tmp_path: Path, fake_cuda: FakeCuda) -> None:
    seen = Weights()
    data = prompt_data(tmp_path, str(folder / "policy"))
    trainer = make_trainer(
        tmp_path, [Overflow({2}), seen], accelerator="gpu", max_steps=3, max_epochs=-1, gradient_clip_val=1.0
    )
    with pytest.warns(UserWarning, match="Optimizer step 2 is skipped: its gradient is not finite"):
        trainer.fit(remax(folder), data)
    assert seen.skipped == [0, 1, 1]
    assert [equal(*pair) for pair in zip(seen.weights, seen.weights[1:], strict=False)] == [False, True, False]
    assert all(group["fused"] for optimizer in trainer.optimizers for group in optimizer.param_groups)


def test_training_follows_a_validation(folder: Path, tmp_path: Path, fake_cuda: FakeCuda) -> None:
    """In one process: what the rollouts of `Trainer.validate` keep is of its inference mode unless they take care."""
    module, data = remax(folder), prompt_data(tmp_path, str(folder / "policy"))
    make_trainer(tmp_path, accelerator="gpu", limit_val_batches=1.0).validate(module, data, verbose=False)
    replays = sum(graph.replays for graph in fake_cuda.graphs)
    seen = fit(module, data, tmp_path, accelerator="gpu", max_steps=2, max_epochs=-1)
    assert len(seen.logged) == 2
    assert sum(graph.replays for graph in fake_cuda.graphs) > replays > 0


def test_a_policy_is_evaluated_as_on_a_cpu(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the longest prompt of all\n" * 20)

    def run(accelerator: str) -> dict[str, float]:
        measures = Evaluation(
            str(tmp_path / f"{accelerator}.json"), test=("win_rate_reference", "perplexity"), text=str(text)
        )
        samples = SampleDump(folder=str(tmp_path / accelerator))
        trainer = make_trainer(tmp_path, [measures, samples], accelerator=accelerator)
        data = prompt_data(tmp_path, str(folder / "policy"))
        torch.manual_seed(0)
        trainer.test(remax(folder), data, verbose=False)
        return figures_of(trainer.callback_metrics)

    here, there = on_both(run, monkeypatch)
    assert there == pytest.approx(here, rel=1e-4, abs=1e-4)
    assert len(here) > 5
