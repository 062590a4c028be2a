"""The forms in which data sets have pairs, and what is wrong with some of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from remax_lightning.data.formatting import PairColumns, PairError, separate_prompt
from remax_lightning.errors import DataError

MARKER = "\n\nAssistant:"
START = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is 2+2?\n\nAssistant:"
USER = {"role": "user", "content": "2+2?"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def split(row: dict[str, Any], template: str | None = None, **columns: Any) -> tuple[Any, Any, Any]:
    made, _ = separate_prompt(row, "x.jsonl, line 3", "prompt", PairColumns(**columns), MARKER, template)
    names = (columns.get("chosen", "chosen"), columns.get("rejected", "rejected"))
    return made["prompt"], made[names[0]], made[names[1]]


def test_text_beside_a_prompt_stays() -> None:
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "5", "id": 7}
    assert separate_prompt(row, "", "prompt", PairColumns(), MARKER, None) == (row, (assistant("4"), assistant("5")))
    assert split({"prompt": "p", "good": "a", "bad": "b"}, chosen="good", rejected="bad") == ("p", "a", "b")


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (" Four.", " Five."),
        (" Four.", " Fou"),
        (" Four.", ""),
        ("", " Four."),
        (" Four", " Four and more"),
        (" A\n\nHuman: x", " A\n\nHuman: y"),
        ("\n\nAssist", "\n\nAssault"),
    ],
)
def test_transcripts_share_all_but_their_last_response(chosen: str, rejected: str) -> None:
    row = {"chosen": START + chosen, "rejected": START + rejected}
    assert split(row) == (START, chosen, rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (START + " 4", START.replace("Hello", "Hullo") + " 4"),
        (START + " 4", START + " 4\n\nHuman: Sure?\n\nAssistant: Yes"),
        (START + " 4\n\nHuman: Sure?\n\nAssistant: Yes", START + " 5\n\nHuman: Sure?\n\nAssistant: Yes"),
        ("no marker", "none here"),
        (START + " 4", "none here"),
    ],
)
def test_transcripts_that_share_no_prompt_are_refused(chosen: str, rejected: str) -> None:
    with pytest.raises(PairError, match=r"^x\.jsonl, line 3: there is no column 'prompt' .* do not share a prompt"):
        split({"chosen": chosen, "rejected": rejected})


def test_a_transcript_that_begins_with_the_response_has_no_prompt() -> None:
    with pytest.raises(PairError, match=r"line 3: the prompt is empty: nothing stands before '\\n\\nAssistant:'"):
        split({"chosen": MARKER + " a", "rejected": MARKER + " b"})


@pytest.mark.parametrize("prompt", [{}, {"prompt": "as text"}, {"prompt": None}])
def test_lists_of_messages_end_with_the_response(prompt: dict[str, Any]) -> None:
    row = {"chosen": [USER, assistant("4")], "rejected": [USER, assistant("5")], **prompt}
    assert split(row) == ([USER], "4", "5")


def test_a_template_wants_the_prompt_as_text() -> None:
    row = {"chosen": [USER, assistant("4")], "rejected": [USER, assistant("5")], "prompt": "2+2?"}
    assert split(row, template="Q {prompt}") == ("2+2?", "4", "5")
    assert split({**row, "prompt": [USER]}, template="Q {prompt}") == ([USER], "4", "5")


def test_the_response_alone_goes_with_the_prompts_column() -> None:
    row = {"prompt": [USER], "chosen": [assistant("4")], "rejected": [assistant("5")]}
    assert split(row) == ([USER], "4", "5")
    assert split({"prompt": [USER], "chosen": "4", "rejected": "5"}) == ([USER], "4", "5")


def test_messages_that_differ_before_their_end_share_no_prompt() -> None:
    other = {"role": "user", "content": "3+3?"}
    with pytest.raises(PairError, match="line 3: the messages in 'chosen' and 'rejected' do not share a prompt"):
        split({"chosen": [USER, assistant("4")], "rejected": [other, assistant("5")]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, r"there is no column 'rejected' \(data\.pair_columns\.rejected\); .*'p"),
        ({"prompt": "p", "rejected": "a"}, r"there is no column 'chosen' \(data\.pair_columns\.chosen\)"),
        ({"prompt": "p", "chosen": 1, "rejected": "a"}, "column 'chosen' must be text or messages, got int"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "column 'rejected' must be text or messages, got NoneType"),
        ({"prompt": "p", "chosen": "a", "rejected": [assistant("b")]}, "must both be text or both be messages"),
        ({"chosen": [], "rejected": [USER]}, r"messages in column 'chosen' must end with .*, got None"),
        ({"chosen": [USER], "rejected": [USER]}, r"messages in column 'chosen' must end with .*'role': 'user'"),
        ({"chosen": ["a"], "rejected": ["b"]}, r"messages in column 'chosen' must end with .*, got 'a'"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, r"there is no column 'prompt' \(data"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there_or_hold_something_else(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^x\.jsonl, line 3: .*{message}"):
        split(row)


SYSTEM = {"role": "system", "content": "Answer in Latin."}


@pytest.mark.parametrize("prompt", [[SYSTEM, USER], [{"role": "user", "content": "3+3?"}]])
def test_messages_of_a_prompt_that_the_pair_lacks_are_not_left_out(prompt: list[Any]) -> None:
    row = {"prompt": prompt, "chosen": [USER, assistant("4")], "rejected": [USER, assistant("5")]}
    with pytest.raises(DataError, match=r"line 3: column 'prompt' has other messages than those before the response"):
        split(row)


def test_the_pair_may_say_more_than_the_prompt() -> None:
    row = {
        "prompt": [{**USER, "name": None}],
        "chosen": [SYSTEM, USER, assistant("4")],
        "rejected": [SYSTEM, USER, assistant("5")],
    }
    assert split(row)[0] == [SYSTEM, USER]


def test_a_template_does_not_leave_out_earlier_turns() -> None:
    row = {"prompt": "2+2?", "chosen": [SYSTEM, USER, assistant("4")], "rejected": [SYSTEM, USER, assistant("5")]}
    with pytest.raises(DataError, match=r"written into data\.template, so what else stands before the response"):
        split(row, template="Q {prompt}")


@pytest.mark.parametrize("write", [json.dumps, str])
def test_responses_that_something_has_printed_are_refused(write: Any) -> None:
    row = {"prompt": "2+2?", "chosen": write([assistant("4")]), "rejected": write([assistant("5")])}
    with pytest.raises(DataError, match=r"line 3: column 'chosen' holds messages written as text"):
        split(row)


def test_a_transcript_beside_its_prompt_does_not_repeat_it() -> None:
    row = {"prompt": START, "chosen": START + " 4", "rejected": START + " 5"}
    with pytest.raises(DataError, match=r"line 3: column 'chosen' begins with the whole prompt"):
        split(row)
