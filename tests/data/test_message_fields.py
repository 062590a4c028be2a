"""What messages hold beside role and content, in the forms that are published: none of it is lost without a word."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import make_tokenizer
from helpers.chat_templates import AS_TEXT, CALL, KNOWN_ROLES, THINKING, TOOL, assistant, user

from remax_lightning.data.chat_templates import ChatRenderer
from remax_lightning.data.conversations import read_conversation, read_message
from remax_lightning.data.formatting import PromptFormatter
from remax_lightning.errors import DataError
from remax_lightning.types import Conversation, Prompt

THOUGHT_TAG = (
    "{% for m in messages %}{% set c = m.content.split('</thought>')[-1] %}[|{{ m.role }}|]{{ c }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[|assistant|]<thought>\n{% endif %}"
)
"""Opens a thought under another name, and takes it out of every answer (EXAONE Deep)."""
READS_DEFINITIONS = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.functions if m.functions is string else m.functions | tojson }}"
    "{{ m.content }}</s>{% endfor %}"
)
"""Takes definitions from the system message (OLMo 3)."""


def prompt(template: str, *messages: dict[str, Any], **row: Any) -> str:
    formatter = PromptFormatter(make_tokenizer(chat_template=template))
    return formatter.text({"prompt": list(messages), **row}, "a.jsonl, line 3")


def response(template: str, message: dict[str, Any]) -> str:
    """What is trained of a response to one question."""
    renderer = ChatRenderer(make_tokenizer(chat_template=template))
    conversation = Conversation([user("Why?")], where="a.jsonl, line 3")
    return renderer.response(
        Prompt(renderer.prompt(conversation), conversation), read_message(message, "line 3", "response")
    )


# Tools


@pytest.mark.parametrize("content", ["", None, "I look."])
def test_a_call_in_openais_older_form_is_not_left_out(content: str | None) -> None:
    message = assistant(content, function_call={"name": "weather", "arguments": "{}"})
    with pytest.raises(
        DataError, match=r"line 3: .* leaves out 'function_call' of message 1 .*write it as \"tool_calls"
    ):
        prompt(KNOWN_ROLES, user("x"), message, user("weather"))
    with pytest.raises(DataError, match=r"leaves out 'function_call' of message 1"):
        response(KNOWN_ROLES, message)
    assert "None" not in prompt(KNOWN_ROLES, user("x"), assistant("yes", function_call=None), user("y"))


@pytest.mark.parametrize("written", [json.dumps, lambda value: value])
@pytest.mark.parametrize("field", ["functions", "tools"])
def test_definitions_in_a_message_are_not_left_out(field: str, written: Any) -> None:
    system = {"role": "system", "content": "Use weather.", field: written([TOOL["function"]])}
    with pytest.raises(
        DataError, match=rf"leaves out '{field}' of message 0 .*move the definitions to the column 'tools'"
    ):
        prompt(KNOWN_ROLES, system, user("x"))
    if field == "functions":
        assert '"name": "weather"' in prompt(READS_DEFINITIONS, system)


def test_a_form_that_is_known_from_a_row_without_definitions() -> None:
    """Both rows have the same fields, empty in the first one."""
    formatter = PromptFormatter(make_tokenizer(chat_template=KNOWN_ROLES))
    rows = [{"prompt": [{"role": "user", "content": "x", "tools": tools}]} for tools in ([], [TOOL])]
    formatter.text(rows[0], "line 1")
    with pytest.raises(DataError, match="leaves out 'tools' of message 0"):
        formatter.text(rows[1], "line 2")


def test_definitions_in_a_column_of_another_name() -> None:
    for functions in ([TOOL["function"]], json.dumps([TOOL["function"]])):
        with pytest.raises(DataError, match=r"line 3: column 'functions' .* in a column 'tools'"):
            prompt(THINKING, user("x"), functions=functions)
    assert prompt(THINKING, user("x"), functions="sin, cos") == prompt(THINKING, user("x"))
    assert prompt(THINKING, user("x"), functions=[TOOL["function"]], tools=[TOOL])


def test_a_tool_without_a_name_is_not_left_out() -> None:
    with pytest.raises(DataError, match="leaves out the tool"):
        prompt(KNOWN_ROLES, user("x"), tools=[{"type": "web_search"}])
    assert "web_search" in prompt(THINKING, user("x"), tools=[{"type": "web_search"}])


def test_calls_that_columnar_files_have_as_json() -> None:
    texts = [
        prompt(THINKING, user("x"), assistant("", tool_calls=calls), {"role": "tool", "content": "sunny"})
        for calls in ([CALL], json.dumps([CALL]))
    ]
    assert texts[0] == texts[1]
    assert "<call>weather" in texts[0]


@pytest.mark.parametrize("calls", ["weather()", ["weather"], {"name": "weather"}, [{"arguments": {}}], [{}], "[{}]"])
def test_what_is_no_call_is_refused(calls: Any) -> None:
    """A template that loops over it would write nothing."""
    with pytest.raises(DataError, match=r"^here: column 'prompt', message 0: .*tool_calls"):
        read_conversation([assistant("", tool_calls=calls)], "here", "prompt")


# Content and thoughts


@pytest.mark.parametrize("content", [{"text": "x"}, {"type": "text", "text": "x"}, {"parts": ["x"]}])
def test_a_part_alone_is_no_content(content: Any) -> None:
    """A template would write it as Python prints it."""
    with pytest.raises(DataError, match=r"message 0 \(role 'user'\): expected content that is text, a list of"):
        prompt(AS_TEXT, user(content))


@pytest.mark.parametrize(
    "field",
    ["reasoning", "thought", "thoughts", "Thinking", "cot", "rationale", "chain_of_thought", "reasoning_text", "think",
     "analysis", "reasoning_trace"],
)  # fmt: skip
def test_a_thought_under_another_name_is_not_left_out(field: str) -> None:
    with pytest.raises(DataError, match=f"leaves out '{field}' of message 1"):
        response(KNOWN_ROLES, assistant("four", **{field: "two and two"}))
    assert response(THOUGHT_TAG, assistant("four", **{field: "hm"})) == "hm\n</thought>\n\nfour</s>"


def test_a_thought_in_parts() -> None:
    parts = [{"type": "reasoning.text", "text": "two and two"}, {"type": "reasoning.encrypted", "data": "x"}]
    with pytest.raises(DataError, match="leaves out 'reasoning_details' of message 1"):
        response(KNOWN_ROLES, assistant("four", reasoning_details=parts))
    repeated = assistant("four", reasoning_content="two and two", reasoning_details=parts)
    assert "two and two\n</think>\n\nfour" in response(THINKING, repeated)


def test_what_is_said_about_a_response_is_no_thought() -> None:
    told = assistant("four", finish_reason="stop", reasoning_tokens=7, reasoning_content="", thoughts=[], model="m")
    assert response(KNOWN_ROLES, told) == "four</s>"


@pytest.mark.parametrize(
    ("start", "end"),
    [("<thought>", "</thought>"), ("◁think▷", "◁/think▷"), ("<|begin_of_thought|>", "<|end_of_thought|>")],
)
def test_thoughts_between_other_marks(start: str, end: str) -> None:
    template = THOUGHT_TAG.replace("</thought>", end).replace("<thought>", start)
    for message in (assistant(f"{start}\nhm\n{end}\n\nfour"), assistant("four", reasoning_content="hm")):
        assert response(template, message) == f"hm\n{end}\n\nfour</s>"
    assert response(template, assistant("four")) == f"\n{end}\n\nfour</s>"


# Characters


@pytest.mark.parametrize("place", ["tools", "arguments"])
def test_half_a_surrogate_pair_in_json_inside_of_json(place: str) -> None:
    half = '"\\ud83d"'
    tools = f'[{{"type": "function", "function": {{"name": "weather", "description": {half}}}}}]'
    call = {"type": "function", "function": {"name": "weather", "arguments": f'{{"city": {half}}}'}}
    messages = [user("x")] if place == "tools" else [user("x"), assistant("", tool_calls=[call]), user("y")]
    with pytest.raises(DataError, match=r"^a\.jsonl, line 3: the prompt, .* holds half a surrogate pair \(.ud83d\)"):
        prompt(THINKING, *messages, **({"tools": tools} if place == "tools" else {}))


def test_half_a_surrogate_pair_in_the_template_of_prompts() -> None:
    with pytest.raises(DataError, match=r"^data\.template holds half a surrogate pair"):
        PromptFormatter(make_tokenizer(), template="\ud83d {prompt}")
