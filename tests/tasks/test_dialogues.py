"""The pipeline's task: the hidden rule, the pairs that it makes, and the files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from remax_lightning.tasks import dialogues
from remax_lightning.tasks.dialogues import (
    Pair,
    make_preferences,
    preference_probability,
    true_score,
    write_dialogue_task,
)

PROMPT = "User: Where can I buy a blue lamp in Lima?\nAssistant:"
NINETEEN = " ".join(["word"] * 19)


@pytest.mark.parametrize(("response", "expected"), [
    (" The old shop by the river has a blue lamp.", 2),
    (" The old shop by the river has a blue lamp. They keep a blue lamp at the station.", 2),
    (" The old shop by the river has a red lamp.", -1),
    (" The old shop by the river has a thing.", 0),
    (" Of course! The old shop by the river has a blue lamp. Can I help with anything else?", 4),
    (" Look, the old shop by the river has a blue lamp. That is all.", 0),
    (" Can I help with anything else? Of course!", 0),  # in the wrong places
    (f" Gladly! {NINETEEN}", 1 - 0.2),
    ("", 0),
])  # fmt: skip
def test_the_rule_by_hand(response: str, expected: float) -> None:
    assert true_score([PROMPT], [response], [{}]) == [pytest.approx(expected)]


@pytest.mark.slow(0.3)
def test_four_is_the_most_that_a_response_gets() -> None:
    pairs = make_preferences(2000)
    scores = true_score([p.prompt for p in pairs], [p.chosen for p in pairs], [{}] * len(pairs))
    assert max(scores) == 4
    assert min(scores) < 0


@pytest.mark.slow
def test_labels_are_wrong_as_often_as_bradley_and_terry_say() -> None:
    pairs = make_preferences(5000)
    expected = [preference_probability(pair) for pair in pairs]
    score, other = true_score([PROMPT] * 2, [" Gladly!", " Look, a"], [{}] * 2)
    assert preference_probability(Pair(PROMPT, " Gladly!", " Look, a")) == pytest.approx(
        math.exp(score) / (math.exp(score) + math.exp(other))
    )
    # Among pairs of which the rule gives one the probability p, or 1 - p, a share p is labeled that way.
    sure = [p for p in expected if max(p, 1 - p) > 0.8]
    agreed = sum(p > 0.5 for p in sure) / len(sure)
    ideal = sum(max(p, 1 - p) for p in sure) / len(sure)
    assert agreed == pytest.approx(ideal, abs=0.02)
    assert 0.02 < 1 - agreed < 0.2


@pytest.mark.slow
def test_prompts_are_all_different_and_calls_alike() -> None:
    pairs = make_preferences(3000)
    assert len({pair.prompt for pair in pairs}) == 3000
    assert all(pair.chosen != pair.rejected for pair in pairs)
    assert pairs == make_preferences(3000)
    assert pairs != make_preferences(3000, seed=1)
    with pytest.raises(ValueError, match="different prompts"):
        make_preferences(10**6)


@pytest.mark.slow
def test_the_files_share_no_prompt_and_the_policy_is_transformers_own(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for name in ("a", "b"):
        write_dialogue_task(tmp_path / name, train=600, val=40, held_out=60)
    files = {
        name: dialogues.read_pairs(tmp_path / "a" / f"{name}.jsonl") for name in ("preferences", "val", "held_out")
    }
    assert [len(pairs) for pairs in files.values()] == [600, 40, 60]
    assert len({pair.prompt for pairs in files.values() for pair in pairs}) == 700
    for file in ("held_out.jsonl", "policy/tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    row = json.loads((tmp_path / "a" / "val.jsonl").read_text().splitlines()[0])
    assert set(row) == {"prompt", "chosen", "rejected"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "policy")
    for pair in files["held_out"]:
        ids = tokenizer(pair.prompt)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == pair.prompt
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "a" / "policy"))
    assert sum(parameter.numel() for parameter in model.parameters()) < 10**6
