"""Prompts of reasoning-gym, and the reward that checks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from helpers.chat_templates import KNOWN_ROLES
from helpers.training import fit, remax_module

from remax_lightning.data import ReasoningGymDataModule, prompts
from remax_lightning.errors import RewardError, UserError
from remax_lightning.rewards import FunctionReward, reasoning_gym_answer, verifiers
from remax_lightning.rollout import SamplingConfig

SCORER = "remax_lightning.rewards.verifiers.reasoning_gym_answer"
TASKS: dict[str, dict[str, Any]] = {"chain_sum": {"max_terms": 2}, "leg_counting": {}}


def made(tokenizer: Path, **options: Any) -> ReasoningGymDataModule:
    defaults = {"size": 12, "val_size": 4, "batch_size": 4, "system_prompt": None}
    data = ReasoningGymDataModule(TASKS, str(tokenizer), **(defaults | options))
    data.setup()
    return data


def rows_of(batches: Any) -> list[dict[str, Any]]:
    return [row for batch in batches for row in batch.rows]


@pytest.mark.slow
def test_rows_follow_from_the_seed_and_no_question_is_asked_twice(policy_path: Path) -> None:
    data = made(policy_path)
    train, val = rows_of(data.train_dataloader()), rows_of(data.val_dataloader())
    assert (len(train), len(val)) == (12, 4)
    assert len({row["question"] for row in train + val}) == 16
    assert {row["metadata"]["source_dataset"] for row in train} == set(TASKS)
    assert rows_of(made(policy_path).val_dataloader()) == val != rows_of(made(policy_path, seed=1).val_dataloader())
    only = made(policy_path, weights={"chain_sum": 1e9})
    assert {row["metadata"]["source_dataset"] for row in rows_of(only.train_dataloader())} == {"chain_sum"}
    tasks = {"chain_sum": {"max_terms": 2, "max_digits": 1}}
    few = ReasoningGymDataModule(tasks, str(policy_path), size=36, val_size=4, batch_size=1)
    with pytest.warns(UserWarning, match=r"data.tasks: \d+ of 40 rows asked what another one asks"):
        few.setup()


def test_instructions_stand_before_the_question(tmp_path: Path, policy_path: Path) -> None:
    (batch, *_) = made(policy_path, system_prompt="Think.").val_dataloader()
    assert batch.prompts[0] == f"Think.\n\n{batch.rows[0]['question']}"
    make_tokenizer(chat_template=KNOWN_ROLES).save_pretrained(tmp_path)
    (batch, *_) = made(tmp_path, system_prompt="default", chat=True, max_prompt_length=4096).val_dataloader()
    system, user = batch.prompts[0].conversation.messages
    assert "<answer>" in system["content"]
    assert user == {"role": "user", "content": batch.rows[0]["question"]}


@pytest.mark.slow
def test_answers_are_scored_by_their_task(policy_path: Path) -> None:
    rows = rows_of(made(policy_path).val_dataloader())
    right = [f"<answer>7</answer> no: <answer> {row['answer']} </answer>" for row in rows]
    assert reasoning_gym_answer(["p"] * 4, right, rows) == [1.0] * 4
    assert reasoning_gym_answer(["p"] * 4, [row["answer"] for row in rows], rows) == [0.0] * 4
    assert reasoning_gym_answer(["p"] * 4, [row["answer"] for row in rows], rows, tag=None) == [1.0] * 4
    FunctionReward(SCORER).check_rows(rows, ["here"] * 4)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["rearc", "arc_agi"])
def test_rows_that_json_has_stripped_of_their_tuples_are_scored_as_before(task: str) -> None:
    import reasoning_gym as gym

    entry = gym.create_dataset(task, size=1, seed=3)[0]
    row = json.loads(json.dumps(entry))
    assert row["metadata"] != entry["metadata"]
    responses = [f"<answer>{entry['answer']}</answer>", "<answer>1 2\n3 4</answer>"]
    for source in (entry, row):
        assert reasoning_gym_answer(["p"] * 2, responses, [source] * 2) == [1.0, 0.05]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p"},
            "expected a row of reasoning-gym, with question, answer and metadata, .* for a.jsonl, line 1",
        ),
        ({"question": "q", "answer": "1", "metadata": {}}, "expected a row of reasoning-gym"),
        ({"question": "q", "answer": "1", "metadata": {"source_dataset": "sums"}}, "has no task 'sums'"),
    ],
)
def test_rows_of_another_kind_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        FunctionReward(SCORER).check_rows([row], ["a.jsonl, line 1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": {}}, "data.tasks: expected the name of at least one task"),
        ({"tasks": {"chain_sums": {}}}, "data.tasks.chain_sums: .* no such task; did you mean .*chain_sum"),
        ({"tasks": {"chain_sum": {"digits": 2}}}, "data.tasks.chain_sum: .* refuses the options {'digits': 2}.*digits"),
        ({"tasks": {"chain_sum": {"min_terms": -1}}}, "data.tasks.chain_sum: .* refuses the options {'min_terms': -1}"),
        ({"weights": {"chain_sum": 0}}, "data.weights.chain_sum: expected a number above 0"),
        ({"weights": {"lcm": 1}}, "data.weights.lcm: .* one of chain_sum"),
        ({"size": 0}, "data.size"),
    ],
)
def test_mistakes_are_refused_when_constructed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReasoningGymDataModule(**({"tasks": {"chain_sum": {}}, "tokenizer": "t"} | options))


def test_without_reasoning_gym_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prompts, verifiers):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'remax-lightning\[verify\]'"):
        ReasoningGymDataModule({"chain_sum": {}}, "t")
    with pytest.raises(UserError, match=r"pip install 'remax-lightning\[verify\]'"):
        reasoning_gym_answer(["p"], ["r"], [{}])


@pytest.mark.slow
def test_a_policy_trains_on_it(policy_path: Path, tmp_path: Path) -> None:
    data = ReasoningGymDataModule(
        {"chain_sum": {}}, str(policy_path), size=4, val_size=0, system_prompt=None, batch_size=4, max_prompt_length=200
    )
    reward = FunctionReward(SCORER, {"tag": None})
    sampling = SamplingConfig(max_response_length=4)
    recorder = fit(remax_module(str(policy_path), reward=reward, sampling=sampling), data, tmp_path)
    assert recorder.outputs
