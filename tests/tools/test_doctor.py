"""`remax doctor` as a user calls it: three stages, exit codes, what it leaves alone. Its checks: test_doctor_*.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.cli import changed, in_folder, remax, write_config
from helpers.doctor import doctor, healthy, preferred, statuses, supervised, with_reward_model
from helpers.pages import ROOT, tables

from remax_lightning.cli_run import run
from remax_lightning.tasks.addition import write_addition_task
from remax_lightning.tools.doctor import CHECKS, DoctorContext, load_context, run_checks
from remax_lightning.tools.doctor.context import first_rows
from remax_lightning.types import PromptBatch

pytestmark = pytest.mark.slow  # every call examines a whole run

NAMES = [check.name for check in CHECKS]


def test_a_healthy_run_passes_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_reward_model(healthy(tmp_path), tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    outcome, results = doctor(capsys, tmp_path, config)
    assert statuses(results) == {}, outcome.out
    assert list(results) == NAMES
    assert outcome.code == 0
    assert [line.split()[1] for line in outcome.out.splitlines() if line.startswith("pass")] == NAMES
    assert f"{len(NAMES)} checks: {len(NAMES)} passed, 0 warned, 0 failed, 0 did not apply." in outcome.out
    after = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert after - before == {tmp_path / "run.yaml", tmp_path / "out.json"}


def test_the_first_stage_is_asked_what_applies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome, results = doctor(capsys, tmp_path, supervised(tmp_path))
    assert outcome.code == 0, outcome.out
    passed = {name for name, each in results.items() if each["status"] == "pass"}
    assert passed == {
        *("data", "models", "prompts", "bos", "prompt_eos", "pad_token", "prompt_padding", "eos", "eos_trained"),
        "special_tokens",
        "memory",
    }
    assert results["greedy"]["status"] == "skip"
    assert results["greedy"]["measured"] == "does not apply to SFTModule"


def test_the_second_stage_is_asked_what_applies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome, results = doctor(capsys, tmp_path, preferred(tmp_path))
    assert outcome.code == 0, outcome.out
    passed = {name for name, each in results.items() if each["status"] == "pass"}
    assert passed == {"data", "models", "prompts", "bos", "pad_token", "reward_padding", "memory"}


def test_the_demo_passes_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for its reward: after so few steps of its first stage nearly all sums are wrong."""
    with in_folder(tmp_path):
        write_addition_task(tmp_path / "runs" / "demo" / "task")
        run(["fit", "--config", str(ROOT / "configs" / "demo_sft.yaml"), "--trainer.max_steps=100"])
        reward = "--model.reward=helpers.training.CharacterReward"
        outcome = remax(capsys, "doctor", "--config", str(ROOT / "configs" / "demo.yaml"), reward)
    assert outcome.code == 0, outcome.out
    skipped = len([check for check in CHECKS if check.name in ("reward_template", "reward_truncation")])
    assert f"{len(CHECKS) - skipped} passed, 0 warned, 0 failed, {skipped} did not apply" in outcome.out


def test_in_16_bits_rounding_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_reward_model(healthy(tmp_path), tmp_path, dtype="bfloat16")
    outcome, results = doctor(capsys, tmp_path, config, "--trainer.precision", "bf16-true")
    assert statuses(results) == {}, outcome.out
    mixed, results = doctor(capsys, tmp_path, config, "--trainer.precision", "bf16-mixed")
    assert statuses(results) == {}, mixed.out


def test_a_failure_exits_with_1_and_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = changed(healthy(tmp_path), model__init_args__sampling={"max_response_length": 2, "min_response_length": 2})
    outcome, results = doctor(capsys, tmp_path, config)
    assert outcome.code == 1
    assert results["truncation"]["status"] == "fail"
    assert "-> a truncated response is scored without its end" in " ".join(outcome.out.split())


def test_data_that_cannot_be_read_leave_the_models_to_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = healthy(tmp_path)
    Path(config["data"]["init_args"]["path"]).write_text('{"prompt": "1+1="}\nnot json\n')
    outcome, results = doctor(capsys, tmp_path, config)
    assert outcome.code == 1
    assert statuses(results, other_than="skip") == {
        "data": "fail",
        "models": "pass",
        "reward": "pass",
        "memory": "pass",
    }
    assert "line 2" in results["data"]["measured"]
    assert results["greedy"]["measured"] == "needs data"


def test_a_tokenizer_larger_than_the_policy_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from conftest import tiny_model

    config = healthy(tmp_path)
    tiny_model("llama", vocab_size=64).save_pretrained(tmp_path / "policy")
    outcome, results = doctor(capsys, tmp_path, config)
    assert outcome.code == 1
    assert results["models"]["status"] == "fail"
    assert "only 64; give the tokenizer that belongs to the policy" in results["models"]["measured"]
    assert results["bos"]["status"] == "skip"
    assert results["memory"]["status"] == "pass"  # of configurations alone


def test_models_that_are_too_large_for_this_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(_: DoctorContext) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DoctorContext, "load_models", too_large)
    context = load_context(["--config", write_config(tmp_path / "run.yaml", supervised(tmp_path))], 12)
    results = {result.name: result for result in run_checks(context)}
    assert results["models"].status == "fail"
    assert "--trainer.accelerator cpu" in results["models"].fix
    assert results["memory"].measured == "needs models"


def test_a_reward_that_cannot_be_loaded_leaves_the_policy_to_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_reward_model(healthy(tmp_path), tmp_path)
    (tmp_path / "reward" / "model.safetensors").unlink()
    outcome, results = doctor(capsys, tmp_path, config)
    assert outcome.code == 1
    expected = {name: "skip" for name in NAMES if name.startswith("reward_")}
    assert statuses(results) == {"reward": "fail", **expected}


def test_a_check_that_raises_has_failed_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(healthy(tmp_path), model__init_args__rollout={"class_path": "helpers.doctor.Breaker"})
    outcome, results = doctor(capsys, tmp_path, config)
    assert outcome.code == 1
    assert results["greedy"]["measured"] == "RuntimeError: the engine is out of order"
    assert {name for name in NAMES if results[name]["status"] == "pass"} >= {"bos", "prompt_eos", "memory"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_prompts", "0"], "--num_prompts must be at least 1, got 0"),
        (["--model.init_args.kl_coef", "-1"], "model.kl_coef: must be 0 or more, got -1"),
        (["--trainer.max_step", "3"], "trainer.max_step: there is no such key"),
        (["--json", "nowhere/out.json"], "--json: there is no folder 'nowhere'"),
        (["--json", "/"], "--json must be a file, and / is a folder"),
    ],
)
def test_a_mistake_in_the_configuration_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    outcome, _ = doctor(capsys, tmp_path, healthy(tmp_path), *arguments)
    assert outcome.code == 2
    assert message in outcome.err


def test_a_run_on_gpus_is_checked_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    strategy = ROOT / "configs" / "strategies" / "zero2.yaml"
    more = ["--config", str(strategy), "--trainer.accelerator", "gpu", "--trainer.devices", "8"]
    outcome, results = doctor(capsys, tmp_path, healthy(tmp_path), *more)
    assert outcome.code == 0, outcome.out
    assert "(checked on the CPU: this machine has no GPU)" in results["models"]["measured"]
    assert results["memory"]["status"] == "skip"
    assert "GB per GPU on 8, and this machine has no GPU to compare with" in results["memory"]["measured"]


def test_the_page_has_every_check_in_its_order() -> None:
    [rows] = [each for each in tables((ROOT / "docs" / "doctor.md").read_text()) if each[0][0] == "check"]
    assert [row[0].strip("`") for row in rows[1:]] == NAMES


def test_a_rollout_batch_in_micro_batches_is_looked_at_once() -> None:
    """The loader yields the same prompts once per micro-batch."""
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    batches = [
        PromptBatch(ids, mask, texts, [{}, {}], micro_batch, 2)
        for texts in (["a", "b"], ["c", "d"])
        for micro_batch in range(2)
    ]
    assert first_rows(batches, 3, 0).prompts == ["a", "b", "c"]
