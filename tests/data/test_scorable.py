"""A reward looks at all rows before training, and those that it refuses stop the run or are left out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from remax_lightning.data import LoadingConfig, PromptDataModule, scorable
from remax_lightning.errors import DataError, RewardError
from remax_lightning.rewards import FunctionReward, WeightedReward

SCORER = "remax_lightning.rewards.numeric_answer"
DROP = LoadingConfig(on_bad_row="drop")


def rows_file(path: Path, count: int, bad: dict[int, Any]) -> str:
    """Write rows whose right answer is their number, but for some."""
    rows = ({"prompt": f"{n}=", "response": bad.get(n, str(n))} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(path: str, policy_path: Path, **options: Any) -> PromptDataModule:
    data = PromptDataModule(path, str(policy_path), **{"batch_size": 2, "val_size": 0, **options})
    data.setup("fit")
    return data


@pytest.fixture
def far(tmp_path: Path) -> str:
    return rows_file(tmp_path / "far.jsonl", 1300, {1205: "many", 1250: None})


@pytest.mark.slow(0.3)
def test_a_row_behind_the_first_thousand_is_refused_before_training(far: str, policy_path: Path) -> None:
    data = make(far, policy_path)
    with pytest.raises(RewardError, match=r"far\.jsonl, line 1206"):
        data.check_scorable(FunctionReward(SCORER))


@pytest.mark.slow(0.3)
def test_what_time_is_too_short_for_is_said(
    far: str, policy_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scorable, "_SECONDS", -1.0)
    with caplog.at_level(logging.INFO):
        make(far, policy_path).check_scorable(FunctionReward(SCORER))
    assert "the reward has looked at 1,000 of 1,300 rows before training" in caplog.text
    near = rows_file(Path(far).parent / "near.jsonl", 1300, {7: "many"})
    with pytest.raises(RewardError, match=r"near\.jsonl, line 8"):  # of the first part, always
        make(near, policy_path).check_scorable(FunctionReward(SCORER))


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("reward", ["alone", "part"])
def test_refused_rows_are_left_out_and_counted(reward: str, far: str, policy_path: Path) -> None:
    data = make(far, policy_path, loading=DROP)
    before = data.fingerprint()
    alone = FunctionReward(SCORER)
    said = r"far\.jsonl: dropped 2 of 1300 rows that the reward refuses \(data\.loading\.on_bad_row\): 1 .*, 1 "
    with pytest.warns(UserWarning, match=said):
        data.check_scorable(alone if reward == "alone" else WeightedReward({"other": len_of, "answer": alone}))
    assert (data.num_rows, data.num_left_out) == (1300, 2)
    assert data.fingerprint() != before
    data.batch_size = 1298
    [batch] = data.train_dataloader()
    assert sorted(int(row["response"]) for row in batch.rows) == [n for n in range(1300) if n not in (1205, 1250)]


def len_of(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [float(len(response)) for response in responses]


def test_the_same_mistake_of_several_rows_is_counted_once(tmp_path: Path, policy_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", 9, {2: "many", 5: "few"})
    with pytest.warns(UserWarning, match=r"dropped 2 of 9 rows that the reward refuses \([^)]*\): 2 [^,]*$"):
        make(path, policy_path, loading=DROP).check_scorable(FunctionReward(SCORER))


def test_rows_for_validation_are_left_out_too(tmp_path: Path, policy_path: Path) -> None:
    train = rows_file(tmp_path / "train.jsonl", 6, {})
    val = rows_file(tmp_path / "val.jsonl", 5, {3: "many"})
    data = make(train, policy_path, val_path=val, val_size=None, loading=DROP)
    data.setup("validate")
    with pytest.warns(UserWarning, match=r"val\.jsonl: dropped 1 of 5 rows"):
        data.check_scorable(FunctionReward(SCORER))
    assert [row["response"] for batch in data.val_dataloader() for row in batch.rows] == ["0", "1", "2", "4"]


def test_too_few_that_are_left_are_an_error(tmp_path: Path, policy_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", 4, dict.fromkeys(range(3), "many"))
    with pytest.warns(UserWarning, match="dropped 3 of 4"), pytest.raises(DataError, match="needs 2 training rows"):
        make(path, policy_path, loading=DROP).check_scorable(FunctionReward(SCORER))
    path = rows_file(tmp_path / "none.jsonl", 4, dict.fromkeys(range(4), "many"))
    with pytest.raises(DataError, match=r"the reward refuses all of 4 rows: 4 .*It says of the first: .*line 1"):
        make(path, policy_path, loading=DROP).check_scorable(FunctionReward(SCORER))


def test_no_row_is_read_for_a_reward_that_looks_at_none(
    far: str, policy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(far, policy_path)

    def read(*_: object) -> list[dict[str, Any]]:
        raise AssertionError("rows were read")

    monkeypatch.setattr("remax_lightning.data.records.PreparedExamples.rows_between", read)
    data.check_scorable(FunctionReward(len_of))
    data.check_scorable(WeightedReward({"length": len_of}))
    with pytest.raises(AssertionError, match="rows were read"):
        data.check_scorable(FunctionReward(SCORER))
