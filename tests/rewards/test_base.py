from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from remax_lightning.errors import RewardError, SignalExit, UserError
from remax_lightning.rewards import Reward, Scores, WeightedReward, checked_scores
from remax_lightning.types import Response

PROMPTS = ["prompt zero", "prompt one", "prompt two", "prompt three"]
RESPONSES = ["response zero", "response one", "response two", "response three"]
ROWS: list[dict[str, Any]] = [{}, {}, {}, {}]


class Given(Reward):
    """Returns what it is told to, or what a function makes of the responses."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> Any:
        return self.result(responses) if isinstance(self.result, Callable) else self.result  # type: ignore[arg-type]


def scored(result: Any) -> Scores:
    return checked_scores(Given(result), PROMPTS, RESPONSES, ROWS)


@pytest.mark.parametrize(
    "result",
    [
        [1, 2.5, True, -3],
        (1, 2.5, 1, -3),
        torch.tensor([1, 2.5, 1, -3], dtype=torch.float64, requires_grad=True),
        np.array([1, 2.5, 1, -3]),
        np.array([1, 2.5, True, -3], dtype=object),
        pd.Series([1, 2.5, 1, -3], index=[7, 5, 3, 1]),
        [np.float64(1), torch.tensor(2.5), np.bool_(True), -3],
        Scores(torch.tensor([1, 2.5, 1, -3], dtype=torch.bfloat16), {}),
    ],
    ids=["list", "tuple", "tensor", "array", "objects", "series", "scalars", "scores"],
)
def test_numbers_of_any_kind_become_float32(result: Any) -> None:
    reward, parts = scored(result)
    assert reward.dtype == torch.float32
    assert not reward.requires_grad
    assert reward.tolist() == [1.0, 2.5, 1.0, -3.0]
    assert parts == {}


def test_parts_are_kept_as_float32() -> None:
    scores = scored(Scores(torch.zeros(4), {"length": [1, 2, 3, 4]}))  # type: ignore[dict-item]
    assert scores.parts["length"].dtype == torch.float32
    assert scores.parts["length"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("result", "found", "shows"),
    [
        ([1.0, 2.0, 3.0], r"shape \[3\]", "prompt zero"),
        ([1.0] * 5, r"shape \[5\]", "prompt zero"),
        (torch.zeros(4, 1), r"shape \[4, 1\]", "prompt zero"),
        (torch.tensor(1.0), r"shape \[\]", "prompt zero"),
        (np.zeros((4, 1)), r"shape \[4, 1\]", "prompt zero"),
        (0.5, r"shape \[\]", "prompt zero"),
        (None, r"returned None \(is a return missing\?\); expected 4 finite numbers", "prompt zero"),
        ({"reward": [1.0]}, "dict", "prompt zero"),
        ("1234", "str", "prompt zero"),
        ([1.0, 2.0, "3.0", 4.0], r"'3.0' \(a str\) at index 2", "response two"),
        ([1.0, None, 3.0, 4.0], r"returned None at index 1", "response one"),
        ([[1.0], [2.0], [3.0], [4.0]], r"a list\) at index 0", "response zero"),
        ([1.0, torch.zeros(1), 3.0, 4.0], r"a Tensor\) at index 1", "response one"),
        (pd.Series([1.0, None, 3.0, 4.0]), "nan at index 1", "response one"),
        (np.array([1.0, None, 3.0, 4.0], dtype=object), r"returned None at index 1", "response one"),
        ([1.0, 1j, 3.0, 4.0], r"a complex\) at index 1", "response one"),
        (torch.zeros(4, dtype=torch.complex64), "complex", "prompt zero"),
        ([1.0, 2.0, 3.0, float("nan")], r"nan at index 3 \(1 of 4", "response three"),
        (torch.tensor([1.0, float("inf"), float("nan"), 0.0]), r"inf at index 1 \(2 of 4", "response one"),
        (torch.tensor([1.0, 1e39, 0.0, 0.0], dtype=torch.float64), "inf at index 1", "response one"),
    ],
)
def test_garbage_is_refused_with_the_prompt(result: Any, found: str, shows: str) -> None:
    for garbage in (result, Scores(torch.zeros(4), {"bad": result})):
        with pytest.raises(RewardError, match=found) as caught:
            scored(garbage)
        assert "Given" in str(caught.value)
        assert shows in str(caught.value)
    assert "part 'bad'" in str(caught.value)


def test_parts_that_are_no_dict_are_refused() -> None:
    with pytest.raises(RewardError, match="parts as a dict"):
        scored(Scores(torch.zeros(4), [torch.zeros(4)]))  # type: ignore[arg-type]


def test_scores_do_not_change_with_the_rewards_own_buffer() -> None:
    buffer = torch.zeros(4)
    scores = scored(Scores(buffer, {"part": buffer}))
    buffer.fill_(1)
    assert scores.reward.tolist() == scores.parts["part"].tolist() == [0.0] * 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_reward_that_changes_the_folder_and_the_dtype_leaves_the_run_as_it_was(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sandbox").mkdir()

    def result(responses: Sequence[str]) -> list[float]:
        os.chdir(tmp_path / "sandbox")
        torch.set_default_dtype(torch.float64)
        return [1 / (0 if fails else 1)] * len(responses)

    with pytest.raises(RewardError) if fails else nullcontext():
        scored(result)
    assert Path.cwd() == tmp_path
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("failing", range(4))
def test_the_response_that_makes_a_reward_raise_is_found(failing: int) -> None:
    def score(responses: Sequence[str]) -> list[float]:
        if RESPONSES[failing] in responses:
            raise KeyError("no such thing")
        return [0.0] * len(responses)

    with pytest.raises(RewardError, match="Given raised KeyError: 'no such thing'") as caught:
        scored(score)
    assert isinstance(caught.value.__cause__, KeyError)
    assert f"prompt {failing}: {PROMPTS[failing]!r}" in str(caught.value)
    assert f"response {failing}: {RESPONSES[failing]!r}" in str(caught.value)


def test_a_column_that_a_row_has_not_is_told_with_those_that_it_has() -> None:
    class Reads(Reward):
        def score(self, prompts: Any, responses: Any, rows: Any) -> list[float]:
            return [float(row["answer"] == response) for row, response in zip(rows, responses, strict=True)]

    with pytest.raises(RewardError, match=r"raised KeyError: 'answer' .*(.*\n)+  columns of its row: gold, level\n"):
        checked_scores(Reads(), ["p"], ["r"], [{"gold": "4", "level": 1}])


def test_a_failure_of_the_whole_batch_shows_its_first_response() -> None:
    def score(responses: Sequence[str]) -> list[float]:
        if len(responses) == 4:
            raise MemoryError("too many")
        return [0.0] * len(responses)

    with pytest.raises(RewardError, match="MemoryError") as caught:
        scored(score)
    assert "0 (the first of the batch): 'response zero'" in str(caught.value)


def test_a_user_error_passes_through() -> None:
    error = UserError("model.reward.init_args.url: is wrong")

    def score(responses: Sequence[str]) -> list[float]:
        raise error

    with pytest.raises(UserError) as caught:
        scored(score)
    assert caught.value is error


def test_long_texts_are_shortened() -> None:
    with pytest.raises(RewardError) as caught:
        checked_scores(Given([float("nan")]), ["p" * 5000], ["r" * 5000], [{}])
    assert len(str(caught.value)) < 800


def test_no_responses_give_no_scores() -> None:
    assert checked_scores(Given([]), [], [], []).reward.shape == (0,)


def test_sequences_must_be_equally_long() -> None:
    with pytest.raises(ValueError, match="4, 4 and 3"):
        checked_scores(Given([1.0] * 4), PROMPTS, RESPONSES, ROWS[:3])


@pytest.mark.parametrize("code", [0, 1, None])
def test_sys_exit_in_a_reward_is_an_error_of_it(code: int | None) -> None:
    class Exits(Reward):
        def score(self, prompts: Any, responses: Any, rows: Any) -> list[float]:
            if "b" in responses:
                raise SystemExit(code)
            return [0.0] * len(responses)

    with pytest.raises(RewardError, match=r"raised SystemExit: (.*\n)+.*response 1: 'b'"):
        checked_scores(Exits(), ["p"] * 3, ["a", "b", "c"], [{}] * 3)


def test_a_signal_within_a_reward_is_no_error_of_it() -> None:
    class Told(Reward):
        def score(self, prompts: Any, responses: Any, rows: Any) -> list[float]:
            raise SignalExit(143)

    with pytest.raises(SignalExit):
        checked_scores(Told(), ["p"], ["a"], [{}])


def test_numbers_below_a_mask_are_no_scores() -> None:
    masked = np.ma.array([1.0, 2.0, 3.0, 4.0], mask=[False, True, False, False])
    with pytest.raises(RewardError, match="returned None at index 1"):
        scored(masked)
    assert scored(torch.tensor([0.0, 2.0, 0.0, 0.0]).to_sparse()).reward.tolist() == [0.0, 2.0, 0.0, 0.0]


# A number for each token

WITH_TOKENS = [Response(text, None, tuple(range(count))) for text, count in zip(RESPONSES, (2, 1, 3, 2), strict=True)]
PER_TOKEN = [[1.0, 2.0], [3.0], [0.0, 0.5, -1.0], [4.0, 0.0]]
AS_TENSOR = [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.5, -1.0], [4.0, 0.0, 0.0]]


def scored_tokens(result: Any) -> Scores:
    return checked_scores(Given(result), PROMPTS, WITH_TOKENS, ROWS)


@pytest.mark.parametrize(
    "result",
    [
        PER_TOKEN,
        tuple(map(np.array, PER_TOKEN)),
        [torch.tensor(row) for row in PER_TOKEN],
        [PER_TOKEN[0], (3,), np.array([0, 0.5, -1]), torch.tensor([4, 0])],
        torch.tensor(AS_TENSOR, dtype=torch.float64, requires_grad=True),
        np.array(AS_TENSOR),
        torch.tensor([[*row, 0.0, 0.0] for row in AS_TENSOR]),
    ],
    ids=["lists", "arrays", "tensors", "mixed", "tensor", "array", "wider"],
)
def test_a_number_for_each_token(result: Any) -> None:
    scores = scored_tokens(Scores(result, {"part": result}))
    assert scores.reward.dtype == torch.float32
    assert not scores.reward.requires_grad
    assert scores.reward[:, :3].tolist() == AS_TENSOR
    assert scores.total.tolist() == scores.parts["part"].tolist() == [3.0, 3.0, -0.5, 4.0]


@pytest.mark.parametrize(
    ("result", "found", "shows"),
    [
        (
            [[1.0, 2.0], [3.0, 4.0], [0.0] * 3, [0.0] * 2],
            r"a list of 2 at index 1, where the response has 1 tokens; expected a list of 1 finite numbers, one for "
            r"each token in response.token_ids, or one number per response",
            "response one",
        ),
        ([[1.0], [2.0], [3.0], [4.0]], "a list of 1 at index 0, where the response has 2 tokens", "response zero"),
        ([[1.0, 2.0], 3.0, [0.0] * 3, [0.0] * 2], r"'3.0' \(a float\) at index 1 beside lists", "response one"),
        ([[1.0, 2.0], [3.0], [0.0] * 3], "returned 3 lists; expected 4 lists, one per response", "prompt zero"),
        (
            [[1.0, 2.0], [3.0], [0.0, None, 1.0], [0.0] * 2],
            r"returned None at index 2, token 1",
            "response two",
        ),
        (
            [[1.0, 2.0], [3.0], [0.0, float("nan"), 1.0], [0.0] * 2],
            r"nan at index 2, token 1 \(1 of 12",
            "response two",
        ),
        (
            torch.zeros(4, 2),
            r"shape \[4, 2\]; expected 4 finite .*, or of shape \[4, 3\], one per token",
            "prompt zero",
        ),
        (torch.zeros(3, 3), r"shape \[3, 3\]", "prompt zero"),
        (torch.zeros(4, 3, 1), r"shape \[4, 3, 1\]", "prompt zero"),
        (torch.ones(4, 3), r"1.0 at index 0, token 2; expected 0 beyond the 2 tokens of the response", "response zero"),
        (torch.tensor([[0.0, 0.0, 0.0, float("nan")]] * 4), r"nan at index 0, token 3 \(4 of 16", "response zero"),
    ],
)
def test_other_numbers_of_tokens_are_refused(result: Any, found: str, shows: str) -> None:
    for garbage in (result, Scores(torch.zeros(4), {"bad": result})):
        with pytest.raises(RewardError, match=found) as caught:
            scored_tokens(garbage)
        assert shows in str(caught.value)


def test_a_number_per_response_stands_on_the_last_token_beside_rewards_of_tokens() -> None:
    reward = WeightedReward({"tokens": Given(PER_TOKEN), "whole": Given([1.0, 2.0, 3.0, 4.0])}, {"whole": 10.0})
    scores = checked_scores(reward, PROMPTS, WITH_TOKENS, ROWS)
    assert scores.reward.tolist() == [[1.0, 12.0, 0.0], [23.0, 0.0, 0.0], [0.0, 0.5, 29.0], [4.0, 40.0, 0.0]]
    assert scores.parts["tokens"].tolist() == [3.0, 3.0, -0.5, 4.0]
    assert scores.parts["whole"].tolist() == [1.0, 2.0, 3.0, 4.0]
    normalized = WeightedReward(reward.parts, normalize="std")
    with pytest.raises(UserError, match=r"normalize: expected none for parts with a reward per token, .*'tokens'"):
        checked_scores(normalized, PROMPTS, WITH_TOKENS, ROWS)


def test_none_among_rewards_of_tokens_is_0_for_every_token() -> None:
    partial = Given([None, [3.0], None, [4.0, 0.0]])
    partial.skips_none = True
    reward = WeightedReward({"tokens": partial, "whole": Given([1.0] * 4)})
    scores = checked_scores(reward, PROMPTS, WITH_TOKENS, ROWS)
    assert scores.reward.tolist() == [[0.0, 1.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 1.0], [4.0, 1.0, 0.0]]
