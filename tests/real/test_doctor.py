"""What doctor says of a pretrained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.cli import in_folder, remax, write_config
from helpers.training import write_rows
from real.published import TOPICS, user

pytestmark = pytest.mark.slow(40)

ROWS = [{"prompt": [user(f"Write one short sentence about {topic}.")]} for topic in TOPICS]


def test_doctor_finds_nothing_wrong(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vaderSentiment")
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1},
        "model": {
            "policy": {"path": str(smollm2), "lora": {"r": 8}},
            "reward": {"class_path": "FunctionReward", "init_args": {"function": "real.rewards.sentiment"}},
            "sampling": {"max_response_length": 32},
        },
        "data": {"path": write_rows(tmp_path / "rows.jsonl", ROWS), "batch_size": 4, "max_prompt_length": 64},
    }
    with in_folder(tmp_path):
        path = write_config(tmp_path / "run.yaml", config)
        outcome = remax(capsys, "doctor", "--config", path, "--num_prompts", "4", "--json", "out.json")
        results = json.loads((tmp_path / "out.json").read_text())["checks"]
    assert outcome.code == 0, outcome.out
    statuses = {result["name"]: result["status"] for result in results}
    assert "fail" not in statuses.values()
    for name in ("eos", "eos_trained", "prompt_padding", "greedy", "log_probs", "on_policy", "kl_at_start"):
        assert statuses[name] == "pass", results
