"""An evaluation on two ranks is that of one: every prompt once, whatever the strategy and wherever the reference is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed.evaluation import CASES, evaluate, main, measure_with_lm_eval
from helpers.ranks import launch
from helpers.training import save_policy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    save_policy(folder / "policy")
    save_policy(folder / "reference", seed=3)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> None:
    launch(main, folder, "shared", "filled", "text", "ddp")


@pytest.fixture(scope="module")
def sharded(folder: Path) -> None:
    launch(main, folder, "fsdp2", "fsdp2_lora", "zero3", "zero3_lora")


def found(folder: Path, case: str, ranks: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    answer = json.loads((folder / f"{case}{ranks}.json").read_text())
    return answer["figures"], [json.loads(line) for line in (folder / f"{case}{ranks}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_figures_of_one(case: str, folder: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("sharded" if case.startswith(("fsdp2", "zero3")) else "whole")
    evaluate(case, folder, ranks=1)
    (figures, records), (expected, rows) = found(folder, case, 2), found(folder, case, 1)
    assert list(figures) == list(expected)
    for name, figure in expected.items():
        # Intervals too: prompts are drawn in the order of the data set.
        assert figures[name].pop("method") == figure.pop("method")
        assert figures[name] == pytest.approx(figure, rel=1e-4, abs=1e-5), name
    logged, alone = (json.loads((folder / f"{case}{ranks}.logged.json").read_text()) for ranks in (2, 1))
    assert logged == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert set(logged) == {f"test/{name}" for name in expected} | {"test/advantage"}
    assert [each["number"] for each in records] == [each["number"] for each in rows]
    assert [each["prompt"] for each in records] == [each["prompt"] for each in rows]
    assert [each["responses"] for each in records] == [each["responses"] for each in rows]
    prompts = {"filled": 9}.get(case, 7)
    assert len([each for each in records if each["responses"]]) == expected["reward"]["n"] == prompts
    assert expected["perplexity"]["n"] == {"text": 3}.get(case, prompts)
    assert expected["win_rate_reference"]["n"] == prompts
    own, others = ([each["responses"].get(whose) for each in rows] for whose in ("sampled", "reference"))
    assert own != others or case in ("shared", "filled", "text")  # there the prompt alone decides


def test_a_reference_in_shares_writes_responses_of_unequal_lengths(folder: Path, whole: None) -> None:
    """Otherwise the ranks would not have decoded unequally often above."""
    _, records = found(folder, "ddp", 2)
    lengths = [len(each["responses"]["reference"][0]) for each in records]
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2-layerwise", "zero3", "zero3-layerwise"])
def test_lm_eval_measures_on_rank_0_while_the_others_wait(strategy: str, folder: Path) -> None:
    for ranks in (1, 2):
        if ranks == 1:
            measure_with_lm_eval(folder, strategy, ranks)
        else:
            launch(measure_with_lm_eval, folder, strategy, ranks)
    alone, together = (json.loads((folder / f"lm_eval_{strategy}{ranks}.json").read_text()) for ranks in (1, 2))
    assert [step for step, _ in alone] == [0, 1]
    assert [step for step, _ in together] == [0, 1]
    for (_, value), (_, expected) in zip(together, alone, strict=True):
        assert value == pytest.approx(expected, rel=1e-4)
