from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from remax_lightning.errors import RewardError, UserError
from remax_lightning.rewards import FunctionReward, HTTPReward, Reward, TimedReward, WeightedReward, checked_scores

EXACT = "remax_lightning.rewards.verifiers.exact_match"
LENGTH = "remax_lightning.rewards.verifiers.length_penalty"


class Fixed(Reward):
    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.loaded_on: torch.device | None = None

    def load(self, device: torch.device) -> None:
        self.loaded_on = device

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        return self.values


def score(reward: Reward) -> Any:
    return checked_scores(reward, ["p", "q"], ["r", "s"], [{}, {}])


def test_the_sum_is_weighted_and_the_parts_are_not() -> None:
    reward = WeightedReward({"a": Fixed([1, 2]), "b": Fixed([10, 20])}, {"b": -0.5})
    total, parts = score(reward)
    assert total.tolist() == [1 - 5, 2 - 10]
    assert {name: part.tolist() for name, part in parts.items()} == {"a": [1, 2], "b": [10, 20]}


def test_parts_of_a_part_have_both_names() -> None:
    inner = WeightedReward({"a": Fixed([1, 2]), "b": Fixed([3, 4])}, {"a": 2.0})
    total, parts = score(WeightedReward({"outer": inner, "c": Fixed([1, 1])}, {"outer": 10}))
    assert total.tolist() == [51, 81]
    named = {name: part.tolist() for name, part in parts.items()}
    assert named == {"outer": [5, 8], "outer/a": [1, 2], "outer/b": [3, 4], "c": [1, 1]}


def test_every_part_is_loaded_and_the_sum_stands_on_that_device() -> None:
    first, second = Fixed([1, 2]), Fixed([1, 2])
    WeightedReward({"a": first, "b": WeightedReward({"c": second})}).load(torch.device("meta"))
    assert first.loaded_on == second.loaded_on == torch.device("meta")
    flat = WeightedReward({"a": first})
    assert flat.score(["p", "q"], ["r", "s"], [{}, {}]).reward.device.type == "cpu"
    flat.load(torch.device("meta"))
    total, parts = flat.score(["p", "q"], ["r", "s"], [{}, {}])
    assert total.device.type == parts["a"].device.type == "meta"


def test_a_part_that_waits_in_a_thread_moves_no_other_to_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """One beside it may run code in a folder of its own when it is done."""

    class Waits(Fixed):
        is_async = True

    moved: list[threading.Thread] = []
    monkeypatch.setattr(os, "chdir", lambda _: moved.append(threading.current_thread()))
    score(WeightedReward({"a": Waits([1, 2]), "b": Fixed([3, 4])}))
    assert set(moved) == {threading.main_thread()}


def test_a_part_that_fails_is_named() -> None:
    inner = WeightedReward({"a": Fixed([1, float("nan")])})
    with pytest.raises(RewardError, match=r"part 'outer' .*part 'a' .*Fixed returned nan at index 1") as caught:
        score(WeightedReward({"fine": Fixed([1, 2]), "outer": inner}))
    assert "'q'" in str(caught.value)
    assert "'s'" in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ({}, None, r"init_args\.parts: expected at least one"),
        ({"a/b": Fixed([])}, None, r"init_args\.parts: names hold no slash, got 'a/b'"),
        ({"a": Fixed([]), "b": Fixed([])}, {"c": 1.0}, r"weights\.c: no part .*the parts are: a, b"),
        ({"a": Fixed([])}, {"a": float("nan")}, r"weights\.a: expected a finite number, got nan"),
        (
            {"a": WeightedReward({"b": Fixed([])}, normalize="std")},
            None,
            r"parts\.a\.init_args\.normalize: expected none in a part of another WeightedReward, got std; name",
        ),
    ],
)
def test_wrong_names_and_weights_are_refused(parts: Any, weights: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        WeightedReward(parts, weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: WeightedReward([EXACT]),
            r"model\.reward\.init_args\.parts must be a dict of rewards by name, got list",
        ),  # type: ignore[arg-type]
        (lambda: WeightedReward({"a": Fixed}), r"parts\['a'\] must be a Reward, .* got the class Fixed; call it"),  # type: ignore[dict-item]
        (lambda: WeightedReward({"a": Fixed([])}, [1.0]), r"weights must be dict\[str, float\] or None, got list"),  # type: ignore[arg-type]
        (lambda: WeightedReward({"a": Fixed([])}, {"a": "1"}), r"weights must be dict\[str, float\] or None"),  # type: ignore[dict-item]
        (lambda: TimedReward(EXACT), r"reward must be Reward, got str 'remax_lightning"),  # type: ignore[arg-type]
        (lambda: FunctionReward(None), "function must be a function or its dotted path, got NoneType None"),  # type: ignore[arg-type]
        (lambda: FunctionReward(EXACT, timeout="60"), "timeout must be a number or None, got str '60'"),  # type: ignore[arg-type]
        (lambda: FunctionReward(EXACT, timeout=True), "timeout must be a number or None, got bool True"),
        (lambda: FunctionReward(EXACT, columns="a"), r"columns must be dict\[str, str\] or None, got str 'a'"),  # type: ignore[arg-type]
        (lambda: HTTPReward("http://host", batch_size=1.5), "batch_size must be a whole number, got float 1.5"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_other_types_are_named(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        make()
    assert type(caught.value).__name__ in ("ArgumentTypeError", "TypeError")


def test_parts_from_python_may_be_functions() -> None:
    reward = WeightedReward({"exact": EXACT, "both": [EXACT, LENGTH]})  # type: ignore[dict-item]
    total, parts = checked_scores(reward, ["p"] * 2, ["yes", "no"], [{"response": "yes"}] * 2)
    assert total.tolist() == [2.0, 0.0]
    assert set(parts) == {"exact", "both", "both/exact_match", "both/length_penalty"}


def test_normalized_parts_are_checked() -> None:
    with pytest.raises(UserError, match=r"init_args\.normalize: expected none or std, got True"):
        WeightedReward({"a": Fixed([])}, normalize=True)  # type: ignore[arg-type]
    reward = WeightedReward({"a": Fixed([1, 2]), "b": Fixed([10, 20])}, {"b": 2}, "std")
    assert score(reward).reward.tolist() == [21, 42]  # for the logs
    with pytest.raises(UserError, match=r"on_timeout: expected error for a reward whose parts are normalized"):
        TimedReward(normalized_exact_match(), on_timeout=0.0)
    assert TimedReward(normalized_exact_match()).normalized_weights == {"exact": 1.0}


def normalized_exact_match() -> WeightedReward:
    return WeightedReward({"exact": FunctionReward(EXACT)}, normalize="std")


YAML = f"""
class_path: WeightedReward
init_args:
  parts:
    accuracy:
      class_path: FunctionReward
      init_args: {{function: {EXACT}, arguments: {{ignore_case: true}}}}
    length:
      class_path: FunctionReward
      init_args: {{function: {LENGTH}, arguments: {{target: 2, coef: 1.0}}}}
    nested:
      class_path: WeightedReward
      init_args:
        parts: {{again: {{class_path: FunctionReward, init_args: {{function: {EXACT}}}}}}}
        weights: {{again: 3.0}}
  weights: {{length: 0.25}}
"""


@pytest.mark.slow(0.3)
def test_jsonargparse_builds_it_from_short_class_names() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Reward, "reward")
    config = parser.parse_object({"reward": yaml.safe_load(YAML)})
    reward = parser.instantiate(config).reward
    assert isinstance(reward, WeightedReward)
    assert isinstance(reward.parts["accuracy"], FunctionReward)
    total, parts = checked_scores(reward, ["p"] * 2, ["yes", "YES!"], [{"response": "YES"}] * 2)
    assert set(parts) == {"accuracy", "length", "nested", "nested/again"}
    assert total.tolist() == [1 - 0.25, -0.5]
    assert parser.parse_string(parser.dump(config)) is not None  # the saved configuration reads back
