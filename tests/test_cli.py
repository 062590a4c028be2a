"""The command as a user drives it: YAML in, runs out; everything of a user's own by dotted path alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from helpers.cli import Outcome, changed, in_folder, remax, small_config, write_config

from remax_lightning.cli_run import RemaxCLI, run

SCALARS = {
    *(f"train/{name}" for name in ("reward", "baseline_reward", "advantage", "kl", "entropy", "response_length")),
    *(f"val/{name}" for name in ("reward", "baseline_reward", "advantage", "kl", "entropy", "response_length")),
    *("time/rollout_s", "time/reward_s", "time/train_s", "throughput/tokens_per_s"),
    *("train/loss", "train/truncation_rate", "train/reward_part/digits", "train/reward_part/polite"),
}


class Run:
    """A finished fit: its folder, its command line, and the checkpoint it left."""

    def __init__(self, folder: Path, config: Path, cli: RemaxCLI) -> None:
        self.folder, self.config, self.cli = folder, config, cli
        self.logs = folder / "runs" / "remax" / "version_0"
        [self.checkpoint] = (self.logs / "checkpoints").glob("*.ckpt")

        self.metrics = validated(cli)


def validated(cli: RemaxCLI) -> dict[str, float]:
    """What the last validation of a command line measured."""
    values = cli.trainer.callback_metrics
    return {name: float(value) for name, value in values.items() if name.startswith("val/")}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, policy_path: Path) -> Iterator[Run]:
    """A fit of four steps with a user's own reward function, reward class and callback, from two YAML files."""
    folder = tmp_path_factory.mktemp("fit")
    base = changed(
        small_config(folder, policy_path),
        trainer__max_epochs=2,
        trainer__max_steps=4,
        trainer__val_check_interval=2,
        trainer__check_val_every_n_epoch=None,
        trainer__callbacks=[{"class_path": "my_callbacks.RewardNotes", "init_args": {"file": str(folder / "notes")}}],
        model__reward={
            "class_path": "WeightedReward",
            "init_args": {
                "parts": {
                    "digits": {"class_path": "my_rewards.DigitReward", "init_args": {"scale": 2.0}},
                    "polite": {
                        "class_path": "FunctionReward",
                        "init_args": {"function": "my_rewards.politeness", "arguments": {"word": "a"}},
                    },
                },
                "weights": {"polite": 0.5},
            },
        },
        model__optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
        model__lr_scheduler={"class_path": "WarmupCosine", "init_args": {"warmup_steps": 1}},
        samples={"every_n_steps": 2, "num_samples": 3},
        tensorboard={"every_n_steps": 1},
    )
    overlay = {"model": {"kl_coef": 0.01}, "samples": {"num_samples": 2}}
    config = Path(write_config(folder / "run.yaml", base))
    with in_folder(folder, plugins=True):
        cli = run(["fit", "--config", str(config), "--config", write_config(folder / "over.yaml", overlay)])
        yield Run(folder, config, cli)


@pytest.mark.slow
def test_overlays_merge_and_short_names_stand_for_our_classes(fitted: Run) -> None:
    saved = yaml.safe_load((fitted.logs / "config.yaml").read_text())
    assert saved["model"]["class_path"] == "remax_lightning.ReMaxModule"
    assert saved["model"]["init_args"]["kl_coef"] == 0.01
    assert saved["samples"]["every_n_steps"] == 2  # of the first file, which the second does not touch
    assert saved["samples"]["num_samples"] == 2
    assert [type(part).__name__ for part in fitted.cli.model.reward.parts.values()] == ["DigitReward", "FunctionReward"]
    assert fitted.cli.datamodule.tokenizer_path == fitted.cli.model.tokenizer_path


@pytest.mark.slow
def test_the_saved_configuration_runs_again(fitted: Run, capsys: pytest.CaptureFixture[str]) -> None:
    printed = remax(capsys, "fit", "--config", str(fitted.logs / "config.yaml"), "--print_config")
    assert printed.code == 0
    assert yaml.safe_load(printed.out) == yaml.safe_load((fitted.logs / "config.yaml").read_text())


def test_a_users_callback_ran(fitted: Run) -> None:
    lines = (fitted.folder / "notes").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4"]


def test_tensorboards_own_reader_finds_every_curve(fitted: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(fitted.logs), size_guidance={"histograms": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= SCALARS
    steps = [event.step for event in events.Scalars("train/reward")]
    assert steps == [1, 2, 3, 4]
    validations = [event.step for event in events.Scalars("val/reward")]
    assert validations == [0, 2, 4]  # before the first step, and after each epoch
    written = [
        json.loads(line)["step"] for line in (fitted.logs / "samples" / "validation.jsonl").read_text().splitlines()
    ]
    assert sorted(set(written)) == validations
    assert {event.step for event in events.Tensors("samples/validation/1/text_summary")} == set(validations)
    assert [event.step for event in events.Histograms("distribution/reward")] == steps
    assert all(event.value > 0 for event in events.Scalars("train/grad_norm"))
    assert [event.step for event in events.Scalars("train/grad_norm")] == steps
    rates = [event.value for event in events.Scalars("train/lr")]
    assert rates[0] == pytest.approx(1e-2)  # the one step of warm-up is over when it is taken
    assert rates[-1] < rates[0]
    assert events.Scalars("val/reward")[-1].value == pytest.approx(fitted.metrics["val/reward"])
    assert {"distribution/reward", "distribution/response_length"} <= set(tags["histograms"])
    assert "custom_scalars__config__" in tags["tensors"]
    parts = [events.Scalars(f"train/reward_part/{name}")[0].value for name in ("digits", "polite")]
    assert events.Scalars("train/reward")[0].value == pytest.approx(parts[0] + 0.5 * parts[1], abs=1e-5)


def test_samples_are_written(fitted: Run) -> None:
    lines = [json.loads(line) for line in (fitted.logs / "samples" / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 4, 4]
    for line in lines:
        assert line["advantage"] is not None
        assert line["prompt"].endswith("=")
        assert line["reward"] == pytest.approx(sum(w * line["parts"][n] for n, w in (("digits", 1), ("polite", 0.5))))


@pytest.mark.slow
def test_the_exported_policy_needs_transformers_alone(fitted: Run) -> None:
    script = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "assert not any('remax' in name for name in sys.modules);"
        "print(model(**tokenizer('1+1=', return_tensors='pt')).logits.double().sum().item())"
    )
    command = [sys.executable, "-c", script, str(fitted.logs / "policy" / "last")]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd="/", env=os.environ | {"PYTHONPATH": ""}
    )
    policy = fitted.cli.model.policy.eval()
    expected = policy(**fitted.cli.model.tokenizer("1+1=", return_tensors="pt")).logits.double().sum().item()
    assert float(ended.stdout) == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_holds_the_policy_and_nothing_frozen(fitted: Run) -> None:
    checkpoint = torch.load(fitted.checkpoint, weights_only=True)
    own = {f"policy.{name}" for name in fitted.cli.model.policy.state_dict()}
    assert set(checkpoint["state_dict"]) == own
    assert checkpoint["hyper_parameters"]["policy"]["path"] == fitted.cli.model.policy_source.path
    assert checkpoint["global_step"] == 4


def continued(fitted: Run, subcommand: str, *arguments: str) -> RemaxCLI:
    return run([subcommand, "--config", str(fitted.config), "--ckpt_path", str(fitted.checkpoint), *arguments])


@pytest.mark.slow
def test_validate_from_a_checkpoint_repeats_the_last_validation(fitted: Run) -> None:
    again = validated(continued(fitted, "validate", "--model.kl_coef=0.01", "--trainer.logger=false"))
    assert set(again) == set(fitted.metrics)
    assert again == pytest.approx(fitted.metrics, abs=1e-6)


@pytest.mark.slow
def test_test_logs_under_its_own_name(fitted: Run) -> None:
    values = continued(fitted, "test", "--model.kl_coef=0.01", "--trainer.logger=false").trainer.callback_metrics
    assert float(values["test/reward"]) == pytest.approx(fitted.metrics["val/reward"], abs=1e-6)
    assert float(values["test/kl"]) == pytest.approx(fitted.metrics["val/kl"], abs=1e-6)


@pytest.mark.slow
def test_the_command_line_beats_the_checkpoint(fitted: Run) -> None:
    options = ("--model.kl_coef=0.25", "--trainer.max_steps=5", "--model.sampling.temperature=0.5")
    cli = continued(fitted, "fit", *options, "--trainer.logger=false", f"--export.folder={fitted.folder / 'more'}")
    assert cli.trainer.global_step == 5
    assert cli.model.kl_coef == 0.25
    assert cli.model.sampling.temperature == 0.5


@pytest.mark.slow
def test_the_configuration_is_never_saved_over_a_file(tmp_path: Path, policy_path: Path) -> None:
    path = tmp_path / "config.yaml"
    here = {"save_dir": str(tmp_path), "name": "", "version": ""}  # every run in the folder of the configuration
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": here}
    own = write_config(path, changed(small_config(tmp_path, policy_path), trainer__logger=logger, trainer__max_steps=1))
    before = path.read_text()
    with in_folder(tmp_path):
        run(["fit", "--config", own])
        run(["fit", "--config", own])
    assert path.read_text() == before
    assert yaml.safe_load((tmp_path / "config_1.yaml").read_text())["trainer"]["max_steps"] == 1
    assert (tmp_path / "config_2.yaml").exists()


@pytest.mark.slow
def test_nothing_but_yaml_on_the_standard_output(
    tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", small_config(tmp_path, policy_path))
    printed = remax(capsys, "fit", "--config", config, "--model.kl_coef", "0.125", "--print_config")
    assert printed.code == 0
    assert yaml.safe_load(printed.out)["model"]["init_args"]["kl_coef"] == 0.125


@pytest.mark.slow
def test_a_users_data_module(tmp_path: Path, policy_path: Path) -> None:
    config = changed(
        small_config(tmp_path, policy_path),
        data={"class_path": "my_data.SquarePrompts", "init_args": {"largest": 8}},
    )
    with in_folder(tmp_path, plugins=True):
        cli = run(["fit", "--config", write_config(tmp_path / "run.yaml", config)])
    assert type(cli.datamodule).__name__ == "SquarePrompts"
    assert cli.trainer.global_step == 2
    assert 0 <= float(cli.trainer.callback_metrics["val/reward"]) <= 1


@pytest.mark.slow
def test_an_adapter_is_trained_and_gone_on_with(tmp_path: Path, policy_path: Path) -> None:
    """Its reference is its start; a reference or a reward model of its own may wait in the host's memory."""
    config = changed(
        small_config(tmp_path, policy_path),
        model__policy__lora={"r": 2, "target_modules": ["q_proj", "v_proj"]},
        model__reference=...,
    )
    with in_folder(tmp_path):
        first = run(["fit", "--config", write_config(tmp_path / "first.yaml", config)])
        adapter = tmp_path / "runs" / "remax" / "version_0" / "policy" / "last"
        further = changed(config, model__policy__lora={"path": str(adapter)}, export__merge_adapter=True)
        second = run(["fit", "--config", write_config(tmp_path / "second.yaml", further)])
        apart = changed(config, model__reference={"path": str(policy_path), "placement": "cpu"})
        third = run(["fit", "--config", write_config(tmp_path / "third.yaml", apart)])
    assert (adapter / "adapter_model.safetensors").is_file()
    assert (adapter.parents[2] / "version_1" / "policy" / "last" / "model.safetensors").is_file()
    assert first.model.reference is first.model.policy
    assert second.model.reference is second.model.policy
    assert third.model.reference is not third.model.policy
    assert third.trainer.callback_metrics["train/loss"] == first.trainer.callback_metrics["train/loss"]


def test_an_abbreviated_key_is_refused(tmp_path: Path, policy_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", small_config(tmp_path, policy_path))
    refused = remax(capsys, "fit", "--config", config, "--trainer.max_step", "3")
    assert refused.code == 2
    assert "trainer.max_step: there is no such key; did you mean max_steps?" in refused.err


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_the_full_help_explains_every_key(subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown: Outcome = remax(capsys, subcommand, "--help-all")
    assert shown.code == 0
    assert "--samples.every_n_steps" in shown.out
    assert "optimizer steps" in shown.out
