from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remax_lightning.errors import RewardError, UserError
from remax_lightning.rewards import exact_match, length_penalty, numeric_answer, regex_format
from remax_lightning.rewards.verifiers import last_number


def rows(*values: Any, column: str = "response") -> list[dict[str, Any]]:
    return [{"prompt": "p", column: value} for value in values]


def test_exact_match_ignores_white_space_and_case_if_asked() -> None:
    responses = [" Yes\n", "yes", "yes sir", ""]
    data = rows("Yes", "Yes", "Yes", "Yes")
    assert exact_match(["p"] * 4, responses, data) == [1.0, 0.0, 0.0, 0.0]
    assert exact_match(["p"] * 4, responses, data, ignore_case=True) == [1.0, 1.0, 0.0, 0.0]
    assert exact_match(["p"], ["42"], rows(42, column="sum"), column="sum") == [1.0]


@pytest.mark.parametrize("verifier", [exact_match, numeric_answer])
@pytest.mark.parametrize("row", [{"prompt": "p", "solution": "4"}, {"solution": "4", "response": None}])
def test_a_missing_column_names_itself_and_those_that_are_there(verifier: Any, row: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match=r"column 'response', got a row .*solution for the prompt 'what is"):
        verifier(["p", "what is 2+2"], ["4", "4"], [{"response": "4"}, row])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("It is 5 and then 72.", 72),
        ("a\n#### 1,234", 1234),
        ("#### -1,234,567.50", -1234567.5),
        ("$1,000", 1000),
        ("-$5", -5),
        ("$-5", -5),
        ("50%", 50),
        ("50%.", 50),
        ("x=-3", -3),
        ("\u22127", -7),
        ("10-12", 12),
        ("(4)-3", 3),
        ("well-3", 3),
        ("1, 2,3", 3),
        ("12,34", 34),
        ("1,2345", 2345),
        ("1234,567", 567),
        ("0.50", 0.5),
        (".5", 0.5),
        ("3.", 3),
        ("1e-07", 1e-7),
        ("<<16-3-4=9>>", 9),
        ("none", None),
        ("", None),
        ("-", None),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numeric_answer_compares_the_last_numbers() -> None:
    responses = ["so $1,234.", "1234.0", "1234 or 5", "no idea", "1234.001"]
    data = rows(*["work <<1200+34=1234>>\n#### 1,234"] * 5, column="answer")
    assert numeric_answer(["p"] * 5, responses, data, column="answer") == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert numeric_answer(["p"] * 5, responses, data, column="answer", tolerance=0.01)[-1] == 1.0
    assert numeric_answer(["p"] * 2, ["0.1", "7"], rows(0.1, 7)) == [1.0, 1.0]


def test_a_row_without_a_number_is_a_fault_of_the_data() -> None:
    with pytest.raises(RewardError, match="expected a number in column 'response', got 'unknown'"):
        numeric_answer(["p"], ["4"], rows("unknown"))


def test_numeric_answer_reads_every_row_of_gsm8k(gsm8k: Path) -> None:
    with (gsm8k / "test.jsonl").open() as file:
        data = [json.loads(line) for line in file]
    prompts = [row["question"] for row in data]
    right = [f"The answer is ${row['answer'].split('#### ')[1]}." for row in data]
    assert set(numeric_answer(prompts, right, data, column="answer")) == {1.0}
    wrong = [f"{response} No, {10**9}" for response in right]
    assert set(numeric_answer(prompts, wrong, data, column="answer")) == {0.0}


def test_regex_format_searches_across_lines() -> None:
    responses = ["<a>x\ny</a>", "say <a>z</a> now", "<a>"]
    assert regex_format(["p"] * 3, responses, [{}] * 3, pattern="<a>.*</a>") == [1.0, 1.0, 0.0]
    assert regex_format(["p"] * 3, responses, [{}] * 3, pattern=r"\A<a>.*</a>\Z") == [1.0, 0.0, 0.0]


def test_a_pattern_that_does_not_compile_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"arguments\.pattern: .*got '\(': missing \)"):
        regex_format(["p"], ["r"], [{}], pattern="(")


def test_length_penalty_starts_beyond_the_target() -> None:
    scores = length_penalty(["p"] * 3, ["abc", "abcd", "abcdefgh"], [{}] * 3, target=4, coef=0.5)
    assert scores == [0.0, 0.0, -2.0]
    for wrong in ({"target": -1}, {"coef": -0.1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            length_penalty(["p"], ["r"], [{}], **wrong)  # type: ignore[arg-type]
