"""Rewards that a rule can compute, for `FunctionReward`. Each returns one number per response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from remax_lightning.errors import RewardError, UserError
from remax_lightning.rewards.base import shorten

# A minus after a letter, a digit or a bracket is a subtraction or a hyphen. Commas count as part of a number
# only where they part thousands, so that "1, 2,3" holds three numbers.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-\u2212])?\$?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+)"
)
_KEY = "model.reward.init_args.arguments"


def exact_match(
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],
    column: str = "response",
    ignore_case: bool = False,
) -> list[float]:
    """1.0 where the response equals the row's `column`, 0.0 elsewhere; white space around both is ignored.

    Args:
        prompts: `M` prompts.
        responses: `M` responses.
        rows: `M` raw rows.
        column: the column that holds the right response, the project's own name for it by default.
        ignore_case: whether upper and lower case count as equal.

    Raises:
        RewardError: if a row holds nothing in that column.
    """

    def normalize(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    expected = _column(prompts, rows, column)
    return [float(normalize(response) == normalize(right)) for response, right in zip(responses, expected, strict=True)]


def numeric_answer(
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],
    column: str = "response",
    tolerance: float = 1e-6,
) -> list[float]:
    """1.0 where the last number in the response is the last number in the row's `column`, 0.0 elsewhere.

    Thousands may be parted by commas; a dollar sign before and a percent sign or full stop after are ignored.
    So a row may hold the bare number or a worked solution, as GSM8K does (`#### 1,234`, in `column: answer`).

    Args:
        prompts: `M` prompts.
        responses: `M` responses; one without a number scores 0.0.
        rows: `M` raw rows.
        column: the column that holds the right answer, the project's own name for it by default.
        tolerance: largest absolute difference that still counts as equal.

    Raises:
        RewardError: if a row holds no number in that column.
    """
    scores = []
    for prompt, response, right in zip(prompts, responses, _column(prompts, rows, column), strict=True):
        expected, answer = last_number(right), last_number(response)
        if expected is None:
            raise RewardError(
                f"numeric_answer: expected a number in column {column!r}, got {shorten(right)} for the prompt "
                f"{shorten(prompt)}; correct the row or name another column in {_KEY}.column"
            )
        scores.append(float(answer is not None and abs(answer - expected) <= tolerance))
    return scores


def regex_format(
    prompts: Sequence[str],  # noqa: ARG001
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],  # noqa: ARG001
    pattern: str,
) -> list[float]:
    r"""1.0 where `pattern` is found in the response, 0.0 elsewhere.

    Args:
        prompts: `M` prompts.
        responses: `M` responses.
        rows: `M` raw rows.
        pattern: a regular expression of Python's `re`, searched for anywhere (`\A...\Z` holds it to the whole
            response); its dot matches newlines too.

    Raises:
        UserError: if `pattern` is not a regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise UserError(f"{_KEY}.pattern: expected a regular expression, got {pattern!r}: {error}") from error
    return [float(compiled.search(response) is not None) for response in responses]


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


def last_number(text: str) -> float | None:
    """Return the last number in `text`, or None where there is none."""
    number = None
    for number in _NUMBER.finditer(text):  # noqa: B007
        pass
    if number is None:
        return None
    value = float(number["digits"].replace(",", ""))
    return -value if number["sign"] else value


def _column(prompts: Sequence[str], rows: Sequence[dict[str, Any]], column: str) -> list[str]:
    """Return `column` of every row as text."""
    for prompt, row in zip(prompts, rows, strict=True):
        if row.get(column) is None:
            filled = ", ".join(sorted(str(name) for name, value in row.items() if value is not None))
            raise RewardError(
                f"{_KEY}.column: expected every row to hold something in column {column!r}, got a row with "
                f"the columns {filled or 'none'} for the prompt {shorten(prompt)}; name one of these there or "
                "complete the data"
            )
    return [str(row[column]) for row in rows]
