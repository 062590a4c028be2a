"""The whole way, cut short: every stage, both evaluations and the report."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.cli import in_folder

from remax_lightning.data.options import STAGES, select_stage_rows
from remax_lightning.data.reading import read_rows
from remax_lightning.tools import pipeline

SHORT = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder, the figures and the text of a pipeline of a few steps."""
    folder = tmp_path_factory.mktemp("pipeline")
    patch = pytest.MonkeyPatch()
    patch.setattr(
        pipeline, "write_dialogue_task", partial(pipeline.write_dialogue_task, train=1000, val=32, held_out=48)
    )
    whole = pipeline._StageRunner.run
    patch.setattr(
        pipeline._StageRunner,
        "run",
        lambda steps, name, sub, config, more=(): whole(
            steps, name, sub, config, [*(SHORT if sub == "fit" else SHORT[2:]), *more]
        ),
    )
    printed: list[str] = []
    patch.setattr("builtins.print", lambda *texts, **_: printed.extend(map(str, texts)))
    with in_folder(folder):
        figures = pipeline.main(["--seed", "3"])
    patch.undo()
    return folder, figures, "\n".join(printed)


@pytest.mark.slow(14)
def test_the_pipeline_runs_from_nothing_to_a_report(run: Any) -> None:
    folder, figures, printed = run
    out = folder / "runs" / "pipeline"
    for path in ("sft/last", "reward_model/best", "policy/last"):
        assert (out / path / "model.safetensors").exists()
    for name in pipeline.ROWS.values():
        for when in ("before", "after"):
            figure = figures[when][name]
            assert figure["low"] <= figure["value"] <= figure["high"]
            assert figure["n"] == 48
    assert figures["before"]["kl_per_response"]["value"] == pytest.approx(0, abs=1e-4)
    assert abs(figures["after"]["kl_per_response"]["value"]) > 1e-4  # an estimate of few samples may be below 0
    accuracy = figures["reward_model_accuracy"]
    assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
    assert accuracy["n"] == 48
    assert 0.6 < figures["rule_accuracy"] < 1
    assert figures["seconds"]["all"] == pytest.approx(sum(figures["seconds"].values()) / 2)
    assert json.loads((out / "figures.json").read_text()) == figures
    assert "true score, sampled" in printed
    page = (out / "report.html").read_text()
    assert "true_score" in page


@pytest.mark.slow
def test_the_rule_is_logged_beside_the_reward_and_never_trained_on(run: Any) -> None:
    folder, _, _ = run
    aligned = folder / "runs" / "pipeline" / "logs" / "remax" / "version_0"
    config = yaml.safe_load((aligned / "config.yaml").read_text())["model"]["init_args"]
    assert config["reward"]["init_args"]["weights"] == {"true_score": 0.0}
    for sample in read(aligned / "samples" / "validation.jsonl"):
        assert sample["reward"] == pytest.approx(sample["parts"]["learned"], abs=1e-5)
        (expected,) = pipeline.true_score([sample["prompt"]], [sample["response"]], [{}])
        assert sample["parts"]["true_score"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_the_stages_and_the_evaluation_share_no_prompt(run: Any) -> None:
    folder, _, _ = run
    task = folder / "runs" / "pipeline" / "task"
    rows = read_rows(str(task / "preferences.jsonl"))
    stages = [select_stage_rows(rows, [2, 4, 4], stage, seed=0).values for stage in STAGES]
    prompts = [{row["prompt"] for row in each} for each in stages]
    prompts += [{row["prompt"] for row in read(task / f"{name}.jsonl")} for name in ("val", "held_out")]
    assert [len(each) for each in prompts] == [200, 400, 400, 32, 48]
    assert len(set().union(*prompts)) == 1080
