"""`remax predict`: responses and rewards as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import changed, in_folder, remax, small_config, write_config

from remax_lightning.cli_run import run
from remax_lightning.rewards import exact_match

pytestmark = pytest.mark.slow

KEYS = {
    *("prompt", "response", "reward", "greedy_response", "baseline_reward", "response_length", "truncated", "row"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, policy_path: Path) -> tuple[Path, Path]:
    """A configuration and a checkpoint of its run."""
    folder = tmp_path_factory.mktemp("predict")
    config = changed(
        small_config(folder, policy_path),
        model__optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-2}},
        model__sampling__num_samples=2,
    )
    path = Path(write_config(folder / "run.yaml", config))
    with in_folder(folder):
        run(["fit", "--config", str(path)])
    [file] = folder.rglob("*.ckpt")
    return path, file


def predicted(config: Path, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    with in_folder(folder):
        run(["predict", "--config", str(config), "--trainer.logger=false", *arguments])
    return [json.loads(line) for line in (folder / "version_0" / "predictions.jsonl").read_text().splitlines()]


def test_every_response_is_a_line(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    config, file = checkpoint
    lines = predicted(config, tmp_path, "--ckpt_path", str(file))
    assert len(lines) == 4 * 2  # val_size prompts, two samples each
    for line in lines:
        assert set(line) == KEYS
        assert line["prompt"] == line["row"]["prompt"]
        assert 1 <= line["response_length"] <= 4
        assert line["response_length"] == 4 or not line["truncated"]
        assert line["reward"] == exact_match([line["prompt"]], [line["response"]], [line["row"]])[0]
    assert all(a["greedy_response"] == b["greedy_response"] for a, b in zip(lines[::2], lines[1::2], strict=True))


def test_it_is_the_checkpoint_that_answers(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, file = checkpoint
    lines = predicted(config, tmp_path, "--ckpt_path", str(file))
    weights = torch.load(file, weights_only=True)["state_dict"]
    path = str(file.parents[1] / "policy" / "last")
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    model.load_state_dict({name.removeprefix("policy."): value for name, value in weights.items()})
    for line in lines[::2]:
        ids = tokenizer(line["prompt"], return_tensors="pt").input_ids
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
        assert tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True) == line["greedy_response"]


def test_an_earlier_file_is_never_written_over(
    checkpoint: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = checkpoint
    earlier = tmp_path / "mine.jsonl"
    earlier.write_text("precious\n")
    with in_folder(tmp_path):
        refused = remax(capsys, "predict", "--config", str(config), "--predictions.path", str(earlier))
    assert refused.code == 2
    assert "predictions.path" in refused.err
    assert earlier.read_text() == "precious\n"
