"""Rewards that a rule can compute, for `FunctionReward`. Each returns one number per response."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

from remax_lightning.errors import RewardError, UserError
from remax_lightning.rewards.answers import (
    answer_text,
    final_formula,
    final_number,
    gold_formula,
    num_parts,
    plain_number,
    right_answer_text,
    score_of_plain_text,
    words_of,
)
from remax_lightning.rewards.base import shorten
from remax_lightning.rewards.slow_checks import compare, search, task_scores

_KEY = "model.reward.init_args.arguments"
_FORMULA = "a number or a formula in LaTeX"
# "007", "-01"; not "0", "0.5"
_LEADING_ZERO = re.compile(r"\s*[-+]?0[0-9]")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _checks_rows(check: Callable[..., object]) -> Callable[[_Function], _Function]:
    """Let `FunctionReward` refuse rows by `check(row, where, **arguments)` before training."""

    # An attribute of the function: `FunctionReward` looks for it on whatever it is given.
    def with_check(function: _Function) -> _Function:
        function.check_row = check  # type: ignore[attr-defined]
        return function

    return with_check


def _gold_text(row: dict[str, Any], where: str, column: str = "response", ignore_case: bool = False) -> str:  # noqa: ARG001
    """Return the right answer of a row, a text or a number, as text.

    Raises:
        RewardError: if there is none.
    """
    # ---- Something in the column ----
    value = row.get(column)
    if value is None:
        filled = ", ".join(sorted(str(name) for name, value in row.items() if value is not None))
        raise RewardError(
            f"{_KEY}.column: expected every row to hold something in column {column!r}, got a row with "
            f"the columns {filled or 'none'} for {where}; name one of these there or complete the data"
        )
    if (text := right_answer_text(value)) is None:
        raise RewardError(
            f"{_KEY}.column: expected a text or a number in column {column!r}, got a {type(value).__name__}, "
            f"{shorten(str(value))}, for {where}; name a column that holds the answer"
        )
    if not text.strip():
        raise _unreadable("a verifier", "a text or a number", text, where, column)
    return text


def _gold_number(row: dict[str, Any], where: str, column: str = "response", tolerance: float = 1e-6) -> Fraction:  # noqa: ARG001
    """Return the right answer of a row, a number and nothing else, or what follows `####`.

    Raises:
        RewardError: if it is none.
    """
    text = _gold_text(row, where, column)
    # GSM8K: "5 * 4 = 20\n#### 20"; without a mark, the whole text
    number = plain_number(text.rpartition("####")[2])
    if number is None:
        raise _unreadable("numeric_answer", "a number and nothing else (or after ####)", text, where, column)
    return number


def _gold_formula(row: dict[str, Any], where: str, column: str = "response", time_limit: float = 5.0) -> str:
    r"""Return the right answer of a row, a formula that math-verify can read.

    Raises:
        RewardError: if it is none.
    """
    formula = _unparsed_gold(row, where, column)
    # A number or words need no parser.
    if plain_number(formula) is None and words_of(formula) is None:
        [verdict] = compare([(formula, None)], time_limit)
        if verdict != "equal":
            raise _unreadable("math_answer", _FORMULA, _gold_text(row, where, column), where, column)
    return formula


def _unparsed_gold(row: dict[str, Any], where: str, column: str) -> str:
    r"""Return the formula of a row as LaTeX, or words where it is only `\text{...}`; it is parsed when it is compared.

    Raises:
        RewardError: if there is none.
    """
    if find_spec("math_verify") is None:
        raise UserError(
            "model.reward: math_answer needs math-verify, which is not installed: pip install 'remax-lightning[verify]'"
        )
    text = _gold_text(row, where, column)
    formula = gold_formula(text)
    if formula is None:
        raise _unreadable("math_answer", _FORMULA, text, where, column)
    return formula


def _reasoning_gym_task(row: dict[str, Any], where: str, tag: str | None = "answer", time_limit: float = 5.0) -> str:  # noqa: ARG001
    """Return the name of the task of reasoning-gym that the row is of.

    Raises:
        RewardError: if the row is of no task.
    """
    if find_spec("reasoning_gym") is None:
        raise UserError(
            "model.reward: reasoning_gym_answer needs reasoning-gym, which is not installed: "
            "pip install 'remax-lightning[verify]'"
        )
    metadata = row.get("metadata")
    # {"question": ..., "answer": ..., "metadata": {"source_dataset": "chain_sum", ...}}
    name = metadata.get("source_dataset") if isinstance(metadata, dict) else None
    if name is None or not {"question", "answer"} <= row.keys():
        raise RewardError(
            "reasoning_gym_answer: expected a row of reasoning-gym, with question, answer and metadata, got the "
            f"columns {', '.join(map(str, row)) or 'none'} for {where}; use ReasoningGymDataModule,"
            " or write its entries whole"
        )
    if name not in _known_tasks():
        raise RewardError(f"reasoning_gym_answer: reasoning-gym has no task {name!r}, the source of {where}")
    return str(name)


@cache
def _known_tasks() -> frozenset[str]:
    from reasoning_gym.factory import DATASETS

    return frozenset(DATASETS)


def _check_time_limit(time_limit: float) -> None:
    if not 0 < time_limit < math.inf:
        raise UserError(f"{_KEY}.time_limit: expected seconds above 0, got {time_limit}")


def _warn_of_time(verifier: str, what: str, time_limit: float) -> None:
    from lightning.pytorch.utilities import rank_zero_warn  # here, since it loads much

    rank_zero_warn(f"{verifier}: {what} was stopped after {time_limit:g} s; the response scores 0")


def _unreadable(verifier: str, expectation: str, right: str, where: str, column: str) -> RewardError:
    return RewardError(
        f"{verifier}: expected {expectation} in column {column!r}, got {shorten(right)} for {where}; correct the row or"
        f" name another column in {_KEY}.column"
    )


def _of_prompt(prompt: str) -> str:
    return f"the prompt {shorten(prompt)}"


@_checks_rows(_gold_text)
def exact_match(
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],
    column: str = "response",
    ignore_case: bool = False,
) -> list[float]:
    """1.0 where the response equals the row's `column`, 0.0 elsewhere; white space around both is ignored.

    Of a response with a thought (`<think>...</think>`), what stands behind it counts.

    Numbers are compared as numbers: 42 in a row, or `1,234`, equals `42.0` and `1234`. A text with leading zeros, such
    as `007`, is a text.

    Args:
        prompts: `M` prompts.
        responses: `M` responses.
        rows: `M` raw rows.
        column: the column that holds the right response, the project's own name for it by default.
        ignore_case: whether upper and lower case count as equal.

    Raises:
        RewardError: if a row holds nothing in that column.
    """

    def normal(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    def number(text: str) -> Fraction | None:
        return None if _LEADING_ZERO.match(text) else plain_number(text)

    scores = []
    for prompt, response, row in zip(prompts, responses, rows, strict=True):
        # "1,234" = "1234.0" as numbers, "007" only as text
        right, answer = _gold_text(row, _of_prompt(prompt), column), answer_text(response, prompt)
        expected = number(right)
        given = {normal(answer), normal(response)}  # the right one may have a thought, too
        scores.append(float(normal(right) in given or (expected is not None and number(answer) == expected)))
    return scores


@_checks_rows(_gold_number)
def numeric_answer(
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],
    column: str = "response",
    tolerance: float = 1e-6,
) -> list[float]:
    r"""1.0 where the number that the response gives as its answer is the row's, 0.0 elsewhere.

    The row holds a number and nothing else, or a worked solution with one after `####`, as GSM8K has it. The response's
    answer is the last number of its last `\boxed{...}`, else of what follows its last `####`, else of the whole. It
    scores 0.0 where that number is part of something else (3/4, 5x, 2^3, a list, a range, an inequality), denied
    ("not 5") or scaled ("5 million"). A thought (`<think>...</think>`) is no part of the response, and one that is not
    closed leaves no answer. Thousands may be parted by commas; a dollar sign before and a percent sign, unit
    or full stop after are ignored.

    Args:
        prompts: `M` prompts.
        responses: `M` responses; one without a number scores 0.0.
        rows: `M` raw rows.
        column: the column that holds the right answer, the project's own name for it by default.
        tolerance: largest absolute difference that still counts as equal; relative to right answers below 1, so that 0
            is not taken for 1e-7.

    Raises:
        RewardError: if the column of a row holds no plain number: a fraction, a formula, text, a list, a dict.
    """
    scores = []
    for prompt, response, row in zip(prompts, responses, rows, strict=True):
        expected = _gold_number(row, _of_prompt(prompt), column)
        answer = final_number(answer_text(response, prompt))
        scores.append(float(answer is not None and _is_close(answer, expected, tolerance)))
    return scores


def _is_close(answer: Fraction, expected: Fraction, tolerance: float) -> bool:
    return abs(answer - expected) <= Fraction(tolerance) * min(Fraction(1), abs(expected))


@_checks_rows(_gold_formula)
def math_answer(
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],
    column: str = "response",
    time_limit: float = 5.0,
) -> list[float]:
    r"""1.0 where the formula that the response gives as its answer equals the row's, 0.0 elsewhere.

    math-verify compares, so that `\frac{1}{2}`, `0.5` and `\boxed{2/4}` are equal; it needs the extra `verify`. The row
    holds a number or a formula in LaTeX, or a worked solution with one in `\boxed{...}` or after `####`; words stand in
    `\text{...}`, and the response must have the same ones. The response's answer is its last `\boxed{...}`, else what
    follows its last `####`, else its last formula between dollar signs, else its last line or number. It scores 0.0
    where it is denied ("not 5"), scaled ("5 million") or prose, or where it lists another number of values than the
    row ("5, 5" and "5 or 5" for 5). A thought (`<think>...</think>`) is no part of the response, and one that is not
    closed leaves no answer. Numbers must be equal exactly, and 12 digits of others.

    Args:
        prompts: `M` prompts.
        responses: `M` responses; one without a formula scores 0.0.
        rows: `M` raw rows.
        column: the column that holds the right answer, the project's own name for it by default.
        time_limit: seconds that one comparison may take. It runs in a process of its own, which is then killed, and the
            response scores 0.0, with a warning.

    Raises:
        UserError: if math-verify is not installed, or `time_limit` is not above 0.
        RewardError: if the column of a row holds no formula: text, a list, a dict.
    """
    _check_time_limit(time_limit)
    scores: list[float] = []
    open_pairs: dict[int, tuple[str, str]] = {}  # by response; those that only math-verify can decide
    for index, (prompt, response, row) in enumerate(zip(prompts, responses, rows, strict=True)):
        # ---- Words and plain numbers are compared here ----
        gold = _unparsed_gold(row, _of_prompt(prompt), column)
        text = answer_text(response, prompt)
        score, answer = score_of_plain_text(gold, text), final_formula(text)
        scores.append(score or 0.0)
        # "5, 5" or "5 or 5" is no answer to a question with one: math-verify compares sets, and would pay it.
        if (
            score is None
            and answer is not None
            and (":" in gold) == (":" in answer)
            and num_parts(gold) == num_parts(answer)
        ):
            open_pairs[index] = gold, answer
    # ---- Formulas are compared in child processes ----
    verdicts = compare(list(open_pairs.values()), time_limit)
    for (index, (gold, answer)), verdict in zip(open_pairs.items(), verdicts, strict=True):
        if verdict == "unreadable":
            raise _unreadable("math_answer", _FORMULA, gold, _of_prompt(prompts[index]), column)
        if verdict == "timeout":
            _warn_of_time("math_answer", f"comparing {shorten(answer)} with {shorten(gold)}", time_limit)
        scores[index] = float(verdict == "equal")
    return scores


@_checks_rows(_reasoning_gym_task)
def reasoning_gym_answer(
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],
    tag: str | None = "answer",
    time_limit: float = 5.0,
) -> list[float]:
    """The score from 0 to 1 that a task of reasoning-gym gives to the answer in the response; needs the extra `verify`.

    Rows may come from a JSON file, which holds lists where the task has tuples: both are tried.

    Args:
        prompts: `M` prompts.
        responses: `M` responses; the answer is between the last `<answer>` and `</answer>`. Without one, or where the
            task cannot read it, the response scores 0.0.
        rows: `M` rows of `ReasoningGymDataModule`: `question`, `answer` and `metadata`.
        tag: name of the tag around the answer; null takes the whole response.
        time_limit: seconds that a task may take for one answer. It runs in a process of its own, which is then killed,
            and the response scores 0.0, with a warning. Tasks take milliseconds; some search without a bound.

    Raises:
        UserError: if reasoning-gym is not installed, or `time_limit` is not above 0.
        RewardError: if a row is of no task.
    """
    _check_time_limit(time_limit)
    # ---- The answer in each response, if there is one ----
    requests: dict[int, tuple[str, str, dict[str, Any]]] = {}
    for index, (prompt, response, row) in enumerate(zip(prompts, responses, rows, strict=True)):
        task = _reasoning_gym_task(row, _of_prompt(prompt))
        from reasoning_gym.utils import extract_answer  # here, since the line above says if it is not installed

        # "<think>...</think><answer>42</answer>" -> "42"
        text = answer_text(response, prompt)
        answer = text.strip() if tag is None else extract_answer(text, tag)
        if answer:
            # what a scorer reads of the row
            requests[index] = task, answer, {name: row[name] for name in ("question", "answer", "metadata")}
    # ---- Its score, from a child process ----
    scores = [0.0] * len(responses)
    for index, score in zip(requests, task_scores(list(requests.values()), time_limit), strict=True):
        if score is None:
            _warn_of_time(
                "reasoning_gym_answer", f"the task {requests[index][0]} on {shorten(requests[index][1])}", time_limit
            )
        scores[index] = score or 0.0
    return scores


def regex_format(
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],  # noqa: ARG001
    pattern: str,
    time_limit: float = 5.0,
) -> list[float]:
    r"""1.0 where `pattern` is found in the response, 0.0 elsewhere.

    A thought that the end of the prompt opens is searched with its opening mark, as `<think>` of R1's prompts.

    Args:
        prompts: `M` prompts.
        responses: `M` responses.
        rows: `M` raw rows.
        pattern: a regular expression of Python's `re`, searched for anywhere (`\A...\Z` holds it to the whole
            response); its dot matches newlines too.
        time_limit: seconds that the search in one response may take: a pattern such as `(a+)+$` takes years for a few
            dozen characters. It runs in a process of its own, which is then killed, and the response scores 0.0, with a
            warning.

    Raises:
        UserError: if `pattern` is not a regular expression, or `time_limit` is not above 0.
    """
    _check_time_limit(time_limit)
    try:
        # A mistake in the configuration, not in a response.
        re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise UserError(f"{_KEY}.pattern: expected a regular expression, got {pattern!r}: {error}") from error
    # True, False, or None if the search was stopped
    from remax_lightning.data.conversations import with_opened_thought  # here, since it loads much

    whole = [with_opened_thought(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    found = search(pattern, whole, time_limit)
    for response, is_found in zip(responses, found, strict=True):
        if is_found is None:
            _warn_of_time("regex_format", f"the search for {pattern!r} in {shorten(response)}", time_limit)
    return [float(is_found or False) for is_found in found]


def length_penalty(
    prompts: Sequence[str],  # noqa: ARG001
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],  # noqa: ARG001
    target: int = 1000,
    coef: float = 0.001,
) -> list[float]:
    """Minus `coef` for every character of the response beyond `target`; never above 0.

    Args:
        prompts: `M` prompts.
        responses: `M` responses.
        rows: `M` raw rows.
        target: characters that cost nothing.
        coef: reward lost per character beyond `target`; by default 1.0 for each thousand.

    Raises:
        UserError: if `target` or `coef` is below 0.
    """
    for name, value in (("target", target), ("coef", coef)):
        if value < 0:
            raise UserError(f"{_KEY}.{name}: expected 0 or more, got {value}")
    return [-coef * max(0, len(response) - target) for response in responses]
