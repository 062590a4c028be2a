from __future__ import annotations

import datetime
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from callbacks.fakes import FakeModule, make_trainer
from torch.utils.data import DataLoader

from remax_lightning.callbacks import PredictionWriter
from remax_lightning.errors import UserError


class Predictor(FakeModule):
    def __init__(self, batches: list[Any]) -> None:
        super().__init__([])
        self.batches = batches

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.batches[batch_idx]

    def predict_dataloader(self) -> Any:
        return DataLoader(range(len(self.batches)), batch_size=None)  # type: ignore[arg-type]


BATCHES = [
    [{"prompt": "1+1=", "response": "2\n", "reward": 1.0, "row": {"i": 0}}, {"prompt": "é \ud800", "reward": -0.5}],
    [{"prompt": "c", "baseline_reward": None, "truncated": False}],
]


def test_writes_a_line_per_prediction_and_says_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, [PredictionWriter()]).predict(Predictor(BATCHES), return_predictions=False)
    path = tmp_path / "logs" / "predictions.jsonl"
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert written == [*BATCHES[0], *BATCHES[1]]
    assert f"Wrote 3 predictions to {path}" in caplog.text


def test_refuses_a_file_that_exists(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mine.jsonl"
    make_trainer(tmp_path, [PredictionWriter(str(path))]).predict(Predictor(BATCHES))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"predictions\.path .*mine\.jsonl"):
        make_trainer(tmp_path, [PredictionWriter(str(path))]).predict(Predictor(BATCHES))
    assert path.read_bytes() == before


def test_the_file_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    make_trainer(tmp_path, [PredictionWriter("~/mine.jsonl")]).predict(Predictor(BATCHES))
    assert (tmp_path / "home" / "mine.jsonl").is_file()
    assert not (tmp_path / "~").exists()


def test_values_that_json_has_not_are_written_as_text_or_null(tmp_path: Path) -> None:
    batch = [{"row": {"day": datetime.date(2024, 2, 3), "levels": [0.5, math.nan, -math.inf]}}]
    make_trainer(tmp_path, [PredictionWriter()]).predict(Predictor([batch]))
    written = (tmp_path / "logs" / "predictions.jsonl").read_text()
    assert json.loads(written, parse_constant=pytest.fail) == {
        "row": {"day": "2024-02-03", "levels": [0.5, None, None]}
    }


def test_other_predictions_are_left_alone(tmp_path: Path) -> None:
    make_trainer(tmp_path, [PredictionWriter()]).predict(Predictor([[1, 2], "text"]))
    assert not (tmp_path / "logs" / "predictions.jsonl").exists()
