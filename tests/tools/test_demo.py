"""The embedded task and the demo's own command."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from remax_lightning.tasks.addition import write_addition_task
from remax_lightning.tools import demo


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sums_are_right_and_none_is_in_both_files(tmp_path: Path) -> None:
    write_addition_task(tmp_path, train=2000, val=200)
    train, val = read(tmp_path / "train.jsonl"), read(tmp_path / "val.jsonl")
    assert (len(train), len(val)) == (2000, 200)
    for row in (*train, *val):
        a, b = row["prompt"].removesuffix("=").split("+")
        assert int(row["response"]) == int(a) + int(b)
        assert len(row["response"]) == 4
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in val}
    counts = {len(str(int(row["prompt"].split("+")[0]))) for row in train}
    assert counts == {2, 3}


@pytest.mark.slow(0.3)
def test_careless_demonstrations_lack_only_the_carry_of_the_units(tmp_path: Path) -> None:
    write_addition_task(tmp_path, train=2000, val=200)
    train, demonstrations = read(tmp_path / "train.jsonl"), read(tmp_path / "demonstrations.jsonl")
    assert [row["prompt"] for row in train] == [row["prompt"] for row in demonstrations]
    carries = careless = 0
    for right, shown in zip(train, demonstrations, strict=True):
        a, b = right["prompt"].removesuffix("=").split("+")
        carry = int(a[-1]) + int(b[-1]) >= 10
        difference = int(right["response"]) - int(shown["response"])
        assert difference in ((0, 10) if carry else (0,))
        carries, careless = carries + carry, careless + (difference == 10)
    assert 0.4 < carries / len(train) < 0.5
    assert 0.6 < careless / carries < 0.7


def test_the_same_call_writes_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_addition_task(tmp_path / name, train=50, val=10)
    assert (tmp_path / "a/train.jsonl").read_bytes() == (tmp_path / "b/train.jsonl").read_bytes()


def test_a_small_task_has_no_more_rows_than_there_are_additions(tmp_path: Path) -> None:
    write_addition_task(tmp_path, digits=(1,), train=1000, val=11)
    assert len(read(tmp_path / "train.jsonl")) == 9 * 9 - 11


def test_policy_and_tokenizer_are_transformers_own(tmp_path: Path) -> None:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    write_addition_task(tmp_path, train=50, val=10)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    row = read(tmp_path / "train.jsonl")[0]
    assert tokenizer.decode(tokenizer(row["prompt"])["input_ids"], skip_special_tokens=True) == row["prompt"]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "policy"))
    assert isinstance(model, LlamaForCausalLM)
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000


@pytest.mark.slow
def test_the_demo_runs_from_nothing_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All three commands of the demo, cut short; that the whole of it learns is measured in `benchmarks/`."""
    monkeypatch.chdir(tmp_path)
    # Of ten thousands of rows it would do nothing but tokenize them.
    monkeypatch.setattr(demo, "write_addition_task", partial(write_addition_task, train=512, val=64))
    run = demo._run
    short = ["--trainer.max_steps=4", "--trainer.val_check_interval=2"]
    monkeypatch.setattr(demo, "_run", lambda sub, config, more: run(sub, config, more + short * (sub == "fit")))
    figures = demo.main(["--seed", "3"])
    assert figures["before/val/kl"] == pytest.approx(0.0, abs=1e-6)
    assert figures["after/val/kl"] > 0
    printed = capsys.readouterr().out
    for line in ("$ remax fit --config", "greedy accuracy", "tensorboard --logdir runs/demo/logs"):
        assert line in printed
    assert (tmp_path / "runs/demo/policy/last/model.safetensors").exists()
    folder = max((tmp_path / "runs/demo/logs/remax").glob("*/samples"))
    assert str(folder.relative_to(tmp_path)) in printed
    for sample in read(folder / "validation.jsonl"):
        a, b = sample["prompt"].removesuffix("=").split("+")
        assert sample["reward"] == float(sample["response"] == f"{int(a) + int(b):04}")
