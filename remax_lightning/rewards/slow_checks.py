"""Checks of a response that may never end: formulas, regular expressions, scorers of reasoning-gym.

SymPy may spend hours or gigabytes on a few characters such as 9^{9^{9}}, a regular expression may try every way to
split a text, and a scorer parses whatever the policy wrote. So they run in child processes that are killed. A child
loads this file by itself, without the package and torch, so that it starts quickly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, cast

Verdict: TypeAlias = Literal["equal", "different", "unreadable", "timeout"]
"""`unreadable`: the right answer is no formula. `timeout`: killed for its time or its memory."""
MEMORY_BYTES = 4 * 2**30


# ---- In this process ----


def compare(pairs: Sequence[tuple[str, str | None]], time_limit: float) -> list[Verdict]:
    """Return whether formulas are equal to the right ones.

    Args:
        pairs: right answer and answer, LaTeX without dollar signs; None asks only whether the right one can be read.
        time_limit: seconds for one pair.
    """
    different = list(dict.fromkeys(pairs))  # a pair that stands there twice is compared once
    answers = _call_each("load_math_verify", None, different, time_limit)
    verdicts = ["timeout" if answer is None else cast(Verdict, answer) for answer in answers]
    by_pair: dict[tuple[str, str | None], Verdict] = dict(zip(different, verdicts, strict=True))
    return [by_pair[pair] for pair in pairs]


def search(pattern: str, texts: Sequence[str], time_limit: float) -> list[bool | None]:
    """Return whether a regular expression is found in each text; None where the search was killed."""
    return _call_each("load_search", pattern, texts, time_limit)


def task_scores(requests: Sequence[tuple[str, str, dict[str, Any]]], time_limit: float) -> list[float | None]:
    """Return the scores of answers by tasks of reasoning-gym; None where a scorer was killed.

    Args:
        requests: name of the task, answer, and the task's entry.
        time_limit: seconds for one answer.
    """
    return _call_each("load_reasoning_gym", None, requests, time_limit)


def _call_each(function: str, argument: Any, requests: Sequence[Any], seconds: float) -> list[Any]:
    # Here, since a child has no package to import it from.
    from remax_lightning.rewards.child_process import Target, call_each

    answers = call_each(Target(__file__, function, argument), requests, seconds)
    return [None if isinstance(answer, RuntimeError) else answer for answer in answers]


# ---- In the child ----


def load_math_verify(_: None) -> Callable[[tuple[str, str | None]], Verdict]:
    """Return the comparison of a right answer with an answer."""
    import math_verify

    _limit_process()

    def parsed(text: str) -> list[Any]:
        # Its own time limits use signals, which only the main thread gets; here the process is killed instead.
        config = [math_verify.LatexExtractionConfig()]
        formulas: list[Any] = math_verify.parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
        return formulas

    def verdict(pair: tuple[str, str | None]) -> Verdict:
        gold, answer = pair
        if not (expected := parsed(gold)):
            return "unreadable"
        if answer is None:
            return "equal"
        # Six digits, math-verify's default, would pay 0.333333 for 1/3.
        is_equal = math_verify.verify(expected, parsed(answer), float_rounding=12, timeout_seconds=None)
        return "equal" if is_equal else "different"

    return verdict


def load_search(pattern: str) -> Callable[[str], bool]:
    """Return the search for a regular expression, whose dot matches newlines, too."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda text: compiled.search(text) is not None


def load_reasoning_gym(_: None) -> Callable[[tuple[str, str, dict[str, Any]]], float]:
    """Return the function that scores an answer to an entry of a task."""
    import reasoning_gym

    _limit_process()

    def score(request: tuple[str, str, dict[str, Any]]) -> float:
        name, answer, entry = request
        scorer = reasoning_gym.get_score_answer_fn(name)
        scores = [0.0]  # of the entry as it is, and with tuples
        for form in _forms(entry):
            try:
                scores.append(float(scorer(answer=answer, entry=form)))
            except Exception:  # scorers parse what the policy wrote, and some do not expect everything
                continue
        return max(scores)

    return score


def _forms(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an entry as it is, and with tuples where it has lists.

    JSON knows no tuples, and scorers of grids compare with them: a right answer equals no list, and would not be paid.
    """
    metadata = _with_tuples(entry["metadata"])
    return [entry] if metadata == entry["metadata"] else [entry, {**entry, "metadata": metadata}]


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _limit_process() -> None:
    """Bound the memory, so that a check ends in an error before the machine is full; drop what libraries log."""
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
