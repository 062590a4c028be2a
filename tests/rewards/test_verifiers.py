from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from remax_lightning.errors import RewardError, UserError
from remax_lightning.rewards import (
    FunctionReward,
    exact_match,
    length_penalty,
    math_answer,
    numeric_answer,
    regex_format,
    verifiers,
)
from remax_lightning.rewards.answers import final_number, voted_answer


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
        ("10-12", None),
        ("(4)-3", None),
        ("well-3", None),
        ("1, 2,3", None),
        ("12,34", None),
        ("1,2345", None),
        ("1234,567", None),
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
def test_final_number(text: str, number: float | None) -> None:
    found = final_number(text)
    assert (None if found is None else float(found)) == number


def test_numeric_answer_compares_the_last_numbers() -> None:
    responses = ["so $1,234.", "1234.0", "1234 or 5", "no idea", "1234.001"]
    data = rows(*["work <<1200+34=1234>>\n#### 1,234"] * 5, column="answer")
    assert numeric_answer(["p"] * 5, responses, data, column="answer") == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert numeric_answer(["p"] * 5, responses, data, column="answer", tolerance=0.01)[-1] == 1.0
    assert numeric_answer(["p"] * 2, ["0.1", "7"], rows(0.1, 7)) == [1.0, 1.0]


def test_a_row_without_a_number_is_a_fault_of_the_data() -> None:
    with pytest.raises(RewardError, match=r"expected a number and nothing else .* in column 'response', got 'unknown'"):
        numeric_answer(["p"], ["4"], rows("unknown"))


def test_numeric_answer_reads_every_row_of_gsm8k(gsm8k: Path) -> None:
    with (gsm8k / "test.jsonl").open() as file:
        data = [json.loads(line) for line in file]
    prompts = [row["question"] for row in data]
    right = [f"The answer is ${row['answer'].split('#### ')[1]}." for row in data]
    assert set(numeric_answer(prompts, right, data, column="answer")) == {1.0}
    wrong = [f"{response} No, {10**9}" for response in right]
    assert set(numeric_answer(prompts, wrong, data, column="answer")) == {0.0}


@pytest.mark.slow(0.3)
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


@pytest.mark.parametrize(
    "gold",
    [
        "3/4",
        "\\frac{1}{2}",
        "25 cm^2",
        "(1,2)",
        "\\sqrt{3}",
        "5 or 6",
        "4, 5",
        "five",
        "nan",
        "inf",
        "#### ",
        "1e9999",
        "2**3",
        {"answer": 5},
        [5],
        [4, 5],
        True,
        float("nan"),
    ],
)
def test_a_gold_that_is_no_plain_number_is_refused(gold: Any) -> None:
    with pytest.raises(RewardError, match="column 'response'"):
        numeric_answer(["p"], ["5"], rows(gold))


@pytest.mark.parametrize("gold", [5, 5.0, "5", "$5", "5%", "5.", " +5 ", "\\boxed{5}", "$5$", "work 3+2\n#### 5"])
def test_a_plain_gold_is_read_and_right_answers_are_paid(gold: Any) -> None:
    responses = [
        "5",
        "It is 5.",
        "so $5$",
        "\\boxed{5}",
        "**5**",
        "5 apples",
        "<answer>5</answer>",
        "2 + 3 = 5",
        "30/6 = 5.0",
        "$2^{3} - 3 = 5$",
        "2 times 2 plus 1 is 5",
        "it takes 3 or 4 days, so 5",
        "3 or more, so 5",
        "\\boxed{5^\\circ}",
        "the angle is $5^{\\circ}$.",
    ]
    assert numeric_answer(["p"] * len(responses), responses, rows(*[gold] * len(responses))) == [1.0] * len(responses)


@pytest.mark.parametrize(
    "response",
    [
        "1/5",
        "\\frac{1}{5}",
        "The answer is not 5",
        "it isn't 5",
        "not \\boxed{5}",
        "5 is wrong",
        "4 or 5",
        "4, 5",
        "4 to 5",
        "4-5",
        "5 million",
        "\\boxed{5} million",
        "2^5",
        "x^5",
        "10 cm^5",
        "x_5",
        "\\sqrt{5}",
        "5\\sqrt{3}",
        "5x",
        "the 5th",
        "the answer is the 5th",
        "2**5",
        "3*5",
        "3 \\times 5",
        "x > 5",
        "more than 5",
        "-5",
        "\u22125",
        "10:5",
        "(2,5)",
        "1.5",
        "0.5",
        "1 5",
        "5e1",
        "5:30",
        "5 + x",
        "5/2",
        "\\boxed{4} 5",
        "2^{5}",
        "\\boxed{2^{5}}",
        "3 \\times 10^{5}",
        "10^{ 5 }",
        "\\sqrt[3]{5}",
        "\\log_{2} 5",
        "\\log_2{5}",
        "\\binom{7}{5}",
        "\\cfrac{1}{5}",
        "\\frac{\\sqrt{3}}{5}",
        "3 \\pmod{5}",
        "3 mod 5",
        "x >= 5",
        "x <= 5",
        "3 x 5",
        "5x3",
        "3 times 5",
        "3 plus 5",
        "15 divided by 5",
        "3 out of 5",
        "minus 5",
        "negative 5",
        "x = 3 or x = 5",
        "3 or maybe 5",
        "1'005",
        "5 is the wrong answer",
        "5, which is incorrect",
        "5 (wrong)",
    ],
)
def test_a_number_that_is_not_the_answer_is_not_paid(response: str) -> None:
    assert numeric_answer(["p"], [response], rows(5)) == [0.0]


def test_degrees_and_thin_spaces_between_thousands_are_read() -> None:
    golds = ["90^\\circ", "$90^{\\circ}$", "90°", "12\\,345", "12345"]
    responses = ["90", "\\boxed{90^\\circ}", "90°", "\\boxed{12345}", "\\boxed{12\\,345}"]
    assert numeric_answer(["p"] * 5, responses, rows(*golds)) == [1.0] * 5


def test_small_and_large_numbers_are_told_apart() -> None:
    golds = ["1e-7", "9007199254740993", "0", "0.333333"]
    responses = ["0", "9007199254740992", "1e-7", "0.3333331"]
    assert numeric_answer(["p"] * 4, responses, rows(*golds)) == [0.0, 0.0, 0.0, 1.0]
    assert numeric_answer(["p"], ["9" * 10_000], rows(9)) == [0.0]


def test_exact_match_compares_numbers_as_numbers() -> None:
    golds = [42, 5.0, "1,234", "12", "007", "12", "a 5"]
    responses = ["42.0", "5", "1234", "012", "7", "13", "a 5.0"]
    assert exact_match(["p"] * 7, responses, rows(*golds)) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("gold", ["", "  ", {"a": 1}, ["4"]])
def test_exact_match_refuses_what_no_response_can_equal(gold: Any) -> None:
    with pytest.raises(RewardError, match="column 'response'"):
        exact_match(["p"], [""], rows(gold))


@pytest.mark.parametrize(
    ("function", "row", "message"),
    [
        ("numeric_answer", {"gold": "3/4"}, "expected a number and nothing else .* in column 'gold', got '3/4'"),
        ("numeric_answer", {"gold": ["3"]}, "expected a text or a number in column 'gold', got a list"),
        ("exact_match", {"gold": " "}, "expected a text or a number in column 'gold', got ' '"),
        ("exact_match", {"answer": "3"}, "hold something in column 'gold', got a row with the columns answer"),
    ],
)
def test_right_answers_are_checked_without_responses(function: str, row: dict[str, Any], message: str) -> None:
    reward = FunctionReward(f"remax_lightning.rewards.verifiers.{function}", {"column": "gold"})
    reward.check_rows([{"gold": "#### 3"}, {"gold": 3}], ["a.jsonl, line 1", "a.jsonl, line 2"])
    with pytest.raises(RewardError, match=rf"{message}.* for a.jsonl, line 3; "):
        reward.check_rows([{"gold": "3"}, row], ["a.jsonl, line 2", "a.jsonl, line 3"])


# Formulas

EQUAL = [
    ("5", "5"),
    ("5", "The answer is 5."),
    ("5", "\\boxed{5}"),
    ("5", "so $x = 5$"),
    ("5", "5 apples"),
    ("5", "\\boxed{5\\text{ cm}}"),
    ("5", "\\boxed{5 apples}"),
    ("5", "\\boxed{\\frac{10}{2}}"),
    ("5", "\\boxed{\\sqrt{25}}"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac12", "1/2"),
    ("\\frac12", "The answer is 1/2."),
    ("\\frac12", "$\\frac{2}{4}$."),
    ("1/2", "\\(\\frac12\\)"),
    ("$\\frac{1}{2}$", "#### 1/2"),
    ("x^2+2x+1", "\\boxed{(x+1)^2}"),
    ("x=5", "5"),
    ("\\{1,2\\}", "\\boxed{2, 1}"),
    ("1 \\text{ or } 2", "\\boxed{1, 2}"),
    ("(1,2)", "\\boxed{(1, 2)}"),
    ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}"),
    ("\\text{(A)}", "\\boxed{A}"),
    ("A", "\\boxed{\\text{A}}"),
    ("\\sqrt{2}", "\\boxed{\\sqrt2}"),
    ("sqrt(2)", "$\\sqrt{2}$"),
    ("x**2+1", "x^2+1"),
    ("2\\pi", "\\boxed{2π}"),
    ("50\\%", "\\boxed{0.5}"),
    ("\\frac12", "\\boxed{50\\%}"),
    ("1,234", "1234"),
    ("10^{-9}", "1e-9"),
    ("0.000000001", "1e-9"),
    ("work \\boxed{\\frac{3}{4}} done", "0.75"),
    ("GSM\n#### 12", "12"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}"),
    ("3+4i", "\\boxed{4i+3}"),
    ("(-\\infty,2)", "\\boxed{(-\\infty, 2)}"),
    ("90^\\circ", "\\boxed{90}"),
    ("90", "\\boxed{90^{\\circ}}"),
    ("\\sqrt{2}", "\\boxed{√2}"),
    ("2\\sqrt{3}", "$2√3$"),
    ("\\sqrt{x+1}", "√(x + 1)"),
    ("3:2", "\\boxed{3:2}"),
    ("\\frac{1}{3}", "\\boxed{\\dfrac{1}{3}}"),
    ("2", "$1+1=2$"),
    ("5", "**5**"),
    ("x>5", "x > 5"),
    (0.5, "1/2"),
    ("1e-9", "0.000000001"),
    ("1e-9", "\\boxed{10^{-9}}"),
]
NOT_EQUAL = [
    ("10", "\\boxed{10}\\text{ million}"),
    ("10", "\\boxed{10\\text{ million}}"),
    ("\\frac12", "\\boxed{\\frac12 \\text{ million}}"),
    ("5", "not 5"),
    ("5", "≠ 5"),
    ("5", "\\neq 5"),
    ("5", "$\\neq 5$"),
    ("5", "$x \\ne 5$"),
    ("5", "The answer is not $5$"),
    ("10", "10 million"),
    ("10", "\\boxed{10} million"),
    ("10", "\\boxed{10 million}"),
    ("0.1234567", "0.1234568"),
    ("\\frac13", "0.333333"),
    ("\\frac12", "The answer is not $\\frac{1}{2}$"),
    ("\\frac12", "\\boxed{\\frac12} or \\boxed{\\frac13}"),
    ("\\frac12", "\\frac12 million"),
    ("\\frac12", "$x \\neq \\boxed{\\frac12}$"),
    ("\\frac12", "the answer is not 1/2"),
    ("2/5", "12:30"),
    ("1", "1 1/2"),
    ("5", "\\boxed{5 or 6}"),
    ("5", "$5 and $6"),
    ("5", ""),
    ("5", "unknown"),
    ("x", "unknown"),
    ("5", "\\boxed{5!}"),
    ("\\text{Evelyn}", "Evelyn is not it"),
    ("\\text{Evelyn}", "\\boxed{\\text{Carla}}"),
    ("(1,2)", "\\boxed{[1,2]}"),
    ("0", "0.0000001"),
    ("\\pi", "3.14159"),
    ("\\frac12", "\\boxed{}"),
    ("\\frac12", "\\boxed{\\frac12, \\frac13}"),
    ("\\frac12", "cannot be $\\frac12$"),
    ("\\frac12", "$\\frac12$ is wrong"),
    ("x^2", "\\boxed{y^2}"),
    ("1e-9", "1"),
    ("5", "$5 \\times 10^3$"),
    ("\\frac12", "1/2 + 1"),
    ("\\sqrt2", "\\boxed{\\sqrt2 \\approx 1.41} thousand"),
    ("10^{-14}", "0"),
    ("\\frac{1}{10^{14}}", "\\boxed{0}"),
    ("5", "\\boxed{5}\n\nWait, that is wrong, it is \\boxed{6}"),
    ("\\frac12", "\\boxed{\\frac12, \\frac12}"),
    ("\\frac12", "\\boxed{\\{0.5, \\frac12\\}}"),
    ("x+1", "\\boxed{x+1 \\text{ or } 1+x}"),
    ("5", "\\boxed{5, 5}"),
    ("5", "The answer is 5 or 5"),
    ("1, 2", "\\boxed{1, 2, 2}"),
]
"""The right answer and a response."""


def math_scores(pairs: list[tuple[Any, str]], **options: Any) -> list[float]:
    return math_answer(
        ["p"] * len(pairs), [response for _, response in pairs], rows(*(gold for gold, _ in pairs)), **options
    )


@pytest.mark.slow
def test_formulas_are_compared_by_their_value() -> None:
    wrong = [pair for pair, score in zip(EQUAL, math_scores(EQUAL), strict=True) if score != 1.0]
    paid = [pair for pair, score in zip(NOT_EQUAL, math_scores(NOT_EQUAL), strict=True) if score != 0.0]
    assert wrong == paid == []


@pytest.mark.parametrize(
    "gold",
    ["unknown", "Tuesday", "no solution", "1 1/2", "\\frac{", "x+", "12 apples", "It is 5", "2024-01-02", " ", ["5"]],
)
def test_right_answers_that_are_no_formula_are_refused(gold: Any) -> None:
    with pytest.raises(RewardError, match=r"in column 'response', got "):
        math_scores([(gold, "\\frac{1}{2}")])
    with pytest.raises(RewardError, match=r"in column 'response', got .* for a.jsonl, line 1"):
        FunctionReward("remax_lightning.rewards.verifiers.math_answer").check_rows(rows(gold), ["a.jsonl, line 1"])


@pytest.mark.slow
def test_a_comparison_that_takes_too_long_is_killed_and_scores_0() -> None:
    """In a thread too, where signals do not arrive; the others keep their scores."""
    scores: list[float] = []
    pairs = [("\\frac12", "\\boxed{9^{9^{9^{9}}}}"), ("\\frac12", "\\boxed{\\frac24}")]

    def score() -> None:
        with pytest.warns(UserWarning, match=r"comparing '9\^.* was stopped after 3 s; the response scores 0"):
            scores.extend(math_scores(pairs, time_limit=3.0))

    thread = threading.Thread(target=score)
    thread.start()
    thread.join(60)
    assert scores == [0.0, 1.0]
    assert math_scores(pairs[1:]) == [1.0]
    with pytest.raises(UserError, match=r"time_limit: expected seconds above 0, got 0"):
        math_scores(pairs, time_limit=0)


@pytest.mark.slow
def test_lists_are_compared_with_lists_of_as_many_values() -> None:
    pairs = [("1, 2", "\\boxed{2, 1}"), ("\\{1, 2\\}", "\\boxed{1, 2}"), ("(1, 2)", "\\boxed{\\left(1, 2\\right)}")]
    assert math_scores(pairs) == [1.0] * 3


@pytest.mark.slow
def test_a_search_that_takes_too_long_is_killed_and_scores_0() -> None:
    responses = ["a" * 60 + "b", "aaa", "c"]
    with pytest.warns(
        UserWarning, match=r"regex_format: the search for .* was stopped after 0.5 s; the response scores 0"
    ):
        scores = regex_format(["p"] * 3, responses, [{}] * 3, r"(a+)+$", time_limit=0.5)
    assert scores == [0.0, 1.0, 0.0]


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'remax-lightning\[verify\]'"):
        math_scores([("5", "5")])


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("1. Add the apples.\n2. Divide them.", None),
        ("Steps:\n  1) five and five are 10\n  2) done", 10),
        ("1. Add.\n2. Divide.\nSo it is 7.", 7),
        ("2. That is all.", 2),
        ("18. She sells them.", 18),
    ],
)
def test_the_numbers_of_list_items_are_no_answers(response: str, number: float | None) -> None:
    """A policy that writes lists would be paid for their length where the right answer is small."""
    assert final_number(response) == number


THOUGHT = "<think>Maybe \\boxed{42}? No, I forgot one.</think>\nThe answer is 41."


@pytest.mark.parametrize("verifier", [numeric_answer, math_answer])
def test_a_thought_is_no_answer(verifier: Any) -> None:
    assert verifier(["p", "p"], [THOUGHT, THOUGHT], rows("42", "41")) == [0.0, 1.0]
    assert verifier(["p"], ["<think>2+2=4, so maybe 42"], rows("42")) == [0.0], "cut off in its thought"
    assert verifier(["Q<think>\n"], ["maybe 42"], rows("42")) == [0.0], "opened by the prompt, and never closed"
    assert verifier(["Q<think>\n"], ["maybe 42</think>41"], rows("41")) == [1.0]
    assert voted_answer(THOUGHT) == 41
    assert voted_answer("<think>maybe 42") is None


def test_exact_match_compares_what_is_behind_a_thought() -> None:
    responses = ["<think>Two and two.</think>\n\n4", "<think>4"]
    assert exact_match(["p", "p"], responses, rows("4", "4")) == [1.0, 0.0]
    assert exact_match(["p"], responses[:1], rows(responses[0])) == [1.0], "the right one has a thought, too"


def test_a_pattern_sees_the_mark_that_the_prompt_opens() -> None:
    pattern = r"\A<think>.*?</think>\s*<answer>.*?</answer>\Z"
    response = "2 and 2</think><answer>4</answer>"
    assert regex_format(["Q<think>\n", "Q"], [response, response], [{}, {}], pattern=pattern) == [1.0, 0.0]


def test_a_solution_with_several_boxes_is_no_right_answer() -> None:
    with pytest.raises(RewardError, match="expected a number or a formula in LaTeX"):
        math_answer(["p"], ["\\boxed{2}"], rows("So $x=\\boxed{1}$ or $x=\\boxed{2}$."))
    assert math_answer(["p"], ["\\boxed{1}"], rows("\\boxed{1}, so again \\boxed{1}")) == [1.0]


def test_bases_and_names_count() -> None:
    assert math_answer(["p"] * 2, ["\\boxed{2516_9}", "\\boxed{2516_8}"], rows("2516_8", "2516_8")) == [0.0, 1.0]
    assert math_answer(["p"] * 2, ["\\boxed{Evelyn}", "\\boxed{Eve}"], rows(*["\\text{Evelyn}"] * 2)) == [1.0, 0.0]
