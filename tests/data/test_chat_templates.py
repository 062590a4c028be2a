"""What templates do to messages without a word, each in a small template that does it, and what is done about it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from helpers.chat_templates import (
    AS_TEXT,
    CALL,
    CONCATENATING,
    KNOWN_ROLES,
    MOVED_SYSTEM,
    OPENS_THOUGHT,
    PARTS,
    STRICT_ROLES,
    THINKING,
    TOOL,
    assistant,
    user,
    with_turn_token,
)

from remax_lightning.data import LoadingConfig, PreferenceDataModule, PromptDataModule, SFTDataModule
from remax_lightning.data.formatting import PromptFormatter
from remax_lightning.errors import DataError, UserError


def formatter(template: str, **options: Any) -> PromptFormatter:
    return PromptFormatter(make_tokenizer(chat_template=template), **options)


def prompt(template: str, *messages: dict[str, Any], **row: Any) -> str:
    return formatter(template).text({"prompt": list(messages), **row}, "a.jsonl, line 3")


def call_of(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def data_of(module: type, folder: Path, template: str, rows: list[dict[str, Any]], **options: Any) -> Any:
    """A data module of rows in a file, set up, with a tokenizer that has a template."""
    make_tokenizer(chat_template=template).save_pretrained(folder / "tokenizer")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = module(str(folder / "rows.jsonl"), str(folder / "tokenizer"), **({"batch_size": 1} | options))
    data.setup("fit")
    return data


# What is lost


@pytest.mark.parametrize("content", ["Which river is longest?", "a", "user", "s"])
@pytest.mark.parametrize("start", [[], [{"role": "system", "content": "You are a guide."}]])
def test_a_role_that_the_template_skips(content: str, start: list[dict[str, Any]]) -> None:
    """Also where the content stands in the text by accident."""
    message = rf"^a\.jsonl, line 3: the chat template leaves out message {len(start)} \(role 'human'\)"
    with pytest.raises(DataError, match=message):
        prompt(KNOWN_ROLES, *start, {"role": "human", "content": content})


def test_a_content_that_is_cut_by_what_it_says() -> None:
    """No probe shows this: the template looks into the text."""
    template = "{% for m in messages %}{{ m.content.split('###')[0] }}{% endfor %}"
    assert prompt(template, user("fine")) == "fine"
    with pytest.raises(DataError, match=r"leaves out message 0 \(role 'user'\)"):
        prompt(template, user("cut ### here"))


def test_what_templates_may_do_to_a_content() -> None:
    assert prompt(STRICT_ROLES, user(" trimmed \n")).startswith("[user] trimmed</s>")
    result = {"role": "tool", "content": 'a "b"\n\u00e9'}
    quoted = prompt(THINKING, user("x"), assistant(None, tool_calls=[CALL]), result)
    assert '"a \\"b\\"\\n\u00e9"' in quoted
    earlier = prompt(THINKING, user("x"), assistant("<think>\na thought\n</think>\n\nyes"), user("y"))
    assert "a thought" not in earlier, "else this shows nothing: thoughts of earlier turns go on purpose"
    assert "<s>assistant\nyes</s>" in earlier


def test_text_and_parts_come_in_the_form_that_the_template_reads() -> None:
    parts = user([{"type": "text", "text": "one"}, {"type": "text", "text": "two", "image": None}])
    expected = "<s>user\none\ntwo</s>\n<s>assistant\n"
    assert prompt(KNOWN_ROLES, parts) == prompt(AS_TEXT, parts) == expected
    assert prompt(PARTS, parts) == "<s>user\nonetwo</s>\n<s>assistant\n"
    assert prompt(PARTS, user("one")) == "<s>user\none</s>\n<s>assistant\n"
    with pytest.raises(DataError, match=r"message 0 \(role 'user'\): expected content that is text, .* got .'type'"):
        prompt(PARTS, user([{"type": "image", "url": "x"}]))


def test_null_is_nowhere_the_word() -> None:
    call = assistant(None, tool_calls=[CALL])
    filled = {"role": "user", "content": "x", "tool_calls": None, "name": None}  # as columnar files fill up
    template = AS_TEXT.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}{{ m.name }}")
    assert "None" not in prompt(template, filled, call, user("y"))
    assert prompt(template, filled) == "<s>user\nx</s>\n<s>assistant\n"
    texts = PromptFormatter(make_tokenizer(), template="{prompt}|{input}|{n}")
    assert texts.text({"prompt": "Sort.", "input": None, "n": 0}, "here") == "Sort.||0"
    assert texts.text({"prompt": "Sort.", "input": float("nan"), "n": None}, "here") == "Sort.||"


@pytest.mark.parametrize("write", [json.dumps, str])
def test_messages_that_were_printed_are_no_prompt(write: Any) -> None:
    with pytest.raises(DataError, match="here: column 'prompt' holds messages written as text"):
        formatter(KNOWN_ROLES).text({"prompt": write([user("Hi")])}, "here")
    assert formatter(KNOWN_ROLES).text({"prompt": "[{1, 2}]"}, "here") == "[{1, 2}]"


@pytest.mark.parametrize(
    "message", [{"from": "human", "value": "Hi"}, {"name": "Ann", "role": "user", "content": "Hi"}]
)
def test_other_forms_of_messages_that_were_printed_are_no_prompt(message: dict[str, str]) -> None:
    for text in (json.dumps([message]), str([message]), json.dumps(message, indent=1), f"array([{message}])"):
        with pytest.raises(DataError, match="here: column 'prompt' holds messages written as text"):
            formatter(KNOWN_ROLES).text({"prompt": text}, "here")
    # a question about such a text, and JSON without messages
    others = '{"role": "admin", "content": "all"}', '{"from": "EUR", "to": "USD", "value": 5}', '[{"from": 1, "to": 2}]'
    for text in (f"Correct this: {json.dumps(message)}", *others):
        assert formatter(KNOWN_ROLES).text({"prompt": text}, "here") == text


def test_a_long_value_is_shown_by_its_beginning() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
    with pytest.raises(DataError, match=r"got \{'type': 'image_url'") as caught:
        prompt(PARTS, {"role": "user", "content": [image]})
    assert len(str(caught.value)) < 500


def test_an_empty_question_is_no_prompt() -> None:
    for content in ("", " \n", [{"type": "text", "text": ""}]):
        with pytest.raises(DataError, match=r"the last message in column 'prompt' is empty; remove the row or fill it"):
            prompt(KNOWN_ROLES, {"role": "user", "content": content})


def test_a_variable_of_a_row_that_the_template_does_not_read_is_not_lost_in_silence() -> None:
    row = {"prompt": [user("Hi")], "chat_template_kwargs": {"custom_instructions": "Be brief.", "xml_tools": []}}
    with pytest.raises(DataError, match=r"here: column 'chat_template_kwargs' sets 'custom_instructions', which the"):
        formatter(KNOWN_ROLES).text(row, "here")
    reads = "{{ custom_instructions }}" + KNOWN_ROLES
    assert formatter(reads).text(row, "here").startswith("Be brief.")
    row["chat_template_kwargs"] |= {"custom_instructions": "", "enable_thinking": False}
    assert formatter(KNOWN_ROLES).text(row, "here") == "<s>user\nHi</s>\n<s>assistant\n"


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("kind", [PromptDataModule, SFTDataModule])
def test_a_template_without_a_beginning_of_the_answer_is_told(kind: Any, tmp_path: Path) -> None:
    rows = [{"prompt": [user("Hi")], "response": "Hello"}]
    ignores = KNOWN_ROLES.partition("{% if add_generation_prompt %}")[0]
    for number, template in enumerate((ignores, KNOWN_ROLES, OPENS_THOUGHT, MOVED_SYSTEM, THINKING)):
        make_tokenizer(chat_template=template).save_pretrained(tmp_path / str(number))
        data = kind(data=rows, tokenizer=str(tmp_path / str(number)), batch_size=1, val_size=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data.setup("fit")
        told = [str(warning.message) for warning in caught if "add_generation_prompt" in str(warning.message)]
        assert bool(told) == (template == ignores)


# Tools and variables


def test_tools_and_calls() -> None:
    assert prompt(THINKING, user("x"), tools=[TOOL]).startswith('<s>system\n{"type": "function"')
    assert prompt(THINKING, user("x"), tools=json.dumps([TOOL])) == prompt(THINKING, user("x"), tools=[TOOL])
    assert prompt(THINKING, user("x"), tools=None) == prompt(THINKING, user("x"))
    as_text = {**CALL, "function": {**CALL["function"], "arguments": '{"city": "Oslo"}'}}  # type: ignore[dict-item]
    texts = [
        prompt(THINKING, user("x"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "sunny"})
        for call in (CALL, as_text)
    ]
    assert '<call>weather {"city": "Oslo"}</call>' in texts[0]
    assert texts[1] == texts[0]


@pytest.mark.parametrize(
    ("messages", "row", "message"),
    [
        ([user("x")], {"tools": [TOOL]}, r"leaves out the tool 'weather' of column 'tools'"),
        ([user("x"), assistant("", tool_calls=[CALL]), user("y")], {},
         r"leaves out the call of 'weather' in message 1 \(role 'assistant'\)"),
        ([user("x")], {"tools": [{"type": "function", "function": {"name": "s"}}]}, "leaves out the tool 's'"),
        ([user("x"), assistant("y", tool_calls=[{"function": {"name": "s", "arguments": {}}}]), user("z")], {},
         r"leaves out the call of 's' in message 1"),
        ([user("x")], {"tools": "weather"}, r"column 'tools' is not valid JSON"),
        ([user("x")], {"tools": [1]}, r"column 'tools' must be a list of definitions"),
        ([user("x")], {"chat_template_kwargs": {"tokenize": True}}, r"column 'chat_template_kwargs' must hold"),
        ([user(None)], {}, r"message 0 \(role 'user'\): expected content"),
    ],
)  # fmt: skip
def test_what_a_template_without_tools_would_drop(messages: list[Any], row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^a\.jsonl, line 3: .*{message}"):
        prompt(KNOWN_ROLES, *messages, **row)


def test_variables_of_the_template() -> None:
    opened, closed = "<s>assistant\n<think>\n", "<s>assistant\n<think>\n\n</think>\n\n"
    row = {"prompt": [user("x")]}
    assert prompt(THINKING, user("x")).endswith(opened)
    without = formatter(THINKING, template_kwargs={"enable_thinking": False})
    assert without.text(row, "here").endswith(closed)
    assert without.text({**row, "chat_template_kwargs": {"enable_thinking": True}}, "here").endswith(opened)
    for name, message in (("enable_thinkin", "has no variable 'enable_thinkin'"), ("tokenize", "'tokenize' is set")):
        with pytest.raises(UserError, match=rf"data\.loading\.chat_template_kwargs: .*{message}"):
            formatter(THINKING, template_kwargs={name: 1})


def test_variables_are_for_messages(tmp_path: Path) -> None:
    loading = LoadingConfig(chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(UserError, match=r"data\.loading\.chat_template_kwargs is for messages, but .* has text"):
        data_of(PromptDataModule, tmp_path, THINKING, [{"prompt": "plain"}], loading=loading)


def test_variables_reach_every_stage(tmp_path: Path) -> None:
    loading = LoadingConfig(chat_template_kwargs={"enable_thinking": False})
    rows = [{"messages": [user("x"), assistant("yes")]}]
    data = data_of(SFTDataModule, tmp_path, THINKING, rows, prompt_column="messages", loading=loading)
    (batch,) = list(data.train_dataloader())
    assert batch.prompts[0].endswith("<think>\n\n</think>\n\n")
    assert data.tokenizer.decode(batch.response_ids[0]) == "yes</s>"
    pairs = [{"chosen": [user("x"), assistant("yes")], "rejected": [user("x"), assistant("no")]}]
    pair_data = data_of(PreferenceDataModule, tmp_path, THINKING, pairs, loading=loading)
    assert pair_data.reward_chat_template_kwargs == {"enable_thinking": False}


# What is refused


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (STRICT_ROLES, [user("x"), user("y"), user("z")], r"refuses message 1 \(role 'user'\): roles must alternate"),
        (STRICT_ROLES, [user("x"), assistant("y"), {"role": "system", "content": "z"}],
         r"refuses message 2 \(role 'system'\): roles must alternate"),
        (CONCATENATING, [user("x"), assistant("", tool_calls=[call_of(["Oslo"])]), {"role": "tool", "content": "z"}],
         r"refuses message 1 \(role 'assistant'\): TypeError: can only concatenate str"),
        ("{% for m in messages %}{{ m.content / 2 }}{% endfor %}", [user("x")],
         r"refuses message 0 \(role 'user'\): Type"),
        ("{% for m in messages %}{{ m.content }}{{ 1 // (m.role | length - 4) }}{% endfor %}", [user("x")],
         r"refuses message 0 \(role 'user'\): ZeroDivisionError"),
    ],
)  # fmt: skip
def test_whatever_a_template_raises_names_line_and_role(template: str, messages: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^a\.jsonl, line 3: the chat template {message}"):
        prompt(template, *messages)


@pytest.mark.parametrize(
    ("module", "row", "column"),
    [
        (PromptDataModule, {"prompt": "bad \ud83d here"}, "column 'prompt'"),
        (PromptDataModule, {"prompt": [user("bad \ud83d")]}, "column 'prompt'"),
        (PromptDataModule, {"prompt": [user("x")], "tools": [{"name": "\ud83d"}]}, "column 'tools'"),
        (SFTDataModule, {"prompt": "x", "response": "\udc00"}, "column 'response'"),
        (SFTDataModule, {"prompt": [user("x")], "response": [assistant("\udc00")]}, "column 'response'"),
        (PreferenceDataModule, {"prompt": "x", "chosen": "y", "rejected": "\udc00"}, "column 'rejected'"),
    ],
)
def test_half_a_surrogate_pair(tmp_path: Path, module: type, row: dict[str, Any], column: str) -> None:
    message = rf"rows\.jsonl, line 2: {column} holds half a surrogate pair \(\\u(d83d|dc00)\), which is no text"
    good = {"prompt": "ok", "response": "ok", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=message):
        data_of(module, tmp_path, THINKING, [good, row])


def test_half_a_surrogate_pair_that_no_file_holds() -> None:
    texts = formatter(KNOWN_ROLES)
    for row in ({"prompt": "bad \ud83d"}, {"prompt": [user("bad \ud83d")]}):
        with pytest.raises(DataError, match=r"^here: column 'prompt' holds half a surrogate pair \(\\ud83d\)"):
            texts.text(row, "here")
    with pytest.raises(DataError, match=r"^here: the response holds half a surrogate pair \(\\udc00\)"):
        texts.response_text(texts.text({"prompt": [user("x")]}, "here"), assistant("\udc00"), "here")


# What is trained


def response_of(template: str, message: dict[str, Any], **options: Any) -> tuple[str, str]:
    texts = formatter(template, **options)
    start = texts.text({"prompt": [user("Hi")]}, "here")
    return start, texts.response_text(start, message, "here")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (assistant("<think>\nhm\n</think>\n\nHello"), "hm\n</think>\n\nHello</s>"),
        (assistant("Hello"), "\n</think>\n\nHello</s>"),
        (assistant("Hello", reasoning_content="hm"), "hm\n</think>\n\nHello</s>"),
        (assistant(None, tool_calls=[CALL]), '\n</think>\n\n<call>weather {"city": "Oslo"}</call></s>'),
        (assistant("spelled out</s>"), "\n</think>\n\nspelled out</s>"),
    ],
)
def test_the_response_is_what_the_template_writes_after_the_prompt(message: dict[str, Any], expected: str) -> None:
    start, text = response_of(THINKING, message)
    assert text == expected
    whole = make_tokenizer(chat_template=THINKING).apply_chat_template([user("Hi"), message], tokenize=False)
    assert whole.startswith(start + text.removesuffix("</s>"))


def test_a_thought_that_the_template_leaves_out() -> None:
    with pytest.raises(DataError, match=r"leaves out 'reasoning_content' of message 1 \(role 'assistant'\)"):
        response_of(KNOWN_ROLES, assistant("4", reasoning_content="2+2"))
    dropping = KNOWN_ROLES.replace("m.content }}", "m.content.split('</think>')[-1] }}")
    assert response_of(dropping, assistant("4"))[1] == "4</s>"
    with pytest.raises(DataError, match=r"leaves out message 1 \(role 'assistant'\)"):
        response_of(dropping, assistant("<think>2+2</think>4"))


def test_a_template_that_writes_the_prompt_otherwise_before_a_response() -> None:
    template = KNOWN_ROLES.replace("<s>assistant\n{%", "<s>assistant\nSure: {%")
    with pytest.raises(DataError, match=r"here: the chat template writes 'Sure: ' at the end of the prompt, and 'yes"):
        response_of(template, assistant("yes"))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (assistant("yes"), "\n</think>\n\nyes</s>"),
        (assistant("<think>\nhm\n</think>\n\nyes"), "hm\n</think>\n\nyes</s>"),
        (assistant("hm</think>yes"), "hm\n</think>\n\nyes</s>"),
        (assistant("yes", reasoning_content="hm"), "hm\n</think>\n\nyes</s>"),
        (assistant("yes", thinking="hm\n"), "hm\n</think>\n\nyes</s>"),
        (assistant(None, tool_calls=[CALL]), '\n</think>\n\n<call>weather {"city": "Oslo"}</call></s>'),
        (assistant("Hi"), "\n</think>\n\nHi</s>"),  # what the prompt says, too
    ],
)
def test_a_thought_that_the_prompt_opens_is_closed(message: dict[str, Any], expected: str) -> None:
    """The policy is given the opened thought: it has to learn to close it, at once where there is nothing to think."""
    start, text = response_of(OPENS_THOUGHT, message)
    assert start == "<s>user\nHi</s>\n<s>assistant\n<think>\n"
    assert text == expected


@pytest.mark.parametrize(
    "content",
    ["<think>never closed", "<think>a</think>b<think>c</think>d", "first <think>a</think>b", "a</think>b</think>"],
)
def test_a_thought_that_cannot_be_told_apart_is_refused(content: str) -> None:
    with pytest.raises(DataError, match=r"here: the chat template (leaves out message 1|writes )"):
        response_of(OPENS_THOUGHT, assistant(content))


def test_a_response_behind_an_empty_thought() -> None:
    """The prompt says that there is none: the answer follows, and a row with a thought is refused."""
    options: dict[str, Any] = {"template_kwargs": {"no_think": True}}
    start, text = response_of(OPENS_THOUGHT, assistant("yes"), **options)
    assert start.endswith("<think>\n\n</think>\n\n")
    assert text == "yes</s>"
    with pytest.raises(DataError, match=r"leaves out 'reasoning_content' of message 1"):
        response_of(OPENS_THOUGHT, assistant("yes", reasoning_content="hm"), **options)


def test_a_thought_without_line_breaks() -> None:
    """DeepSeek V3.1 writes the end of an empty thought before every answer."""
    template = OPENS_THOUGHT.replace("'<think>\n' }}", "'<think>' }}")
    assert response_of(template, assistant("yes"))[1] == "</think>yes</s>"
    closed = template.replace("<s>assistant\n{{", "<s>assistant\n</think>{{")
    assert response_of(closed, assistant("yes"))[1] == "</think>yes</s>"
    assert response_of(closed, assistant("yes", reasoning_content="hm"))[1] == "hm</think>yes</s>"


def test_a_system_message_that_moves_to_the_last_turn(tmp_path: Path) -> None:
    """The prompt has it where the policy reads it, in supervised training and in pairs."""
    system = {"role": "system", "content": "Be brief."}
    messages = [system, user("a"), assistant("b"), user("c")]
    rows = [{"prompt": messages, "response": "c</u>", "chosen": [assistant("d")], "rejected": [assistant("e")]}]
    (batch,) = data_of(SFTDataModule, tmp_path, MOVED_SYSTEM, rows).train_dataloader()
    assert batch.prompts == ["<u>a</u> b</s><u>Be brief.\n\nc</u>"]
    tokenizer = make_tokenizer()
    assert tokenizer.decode(batch.response_ids[0]) == " c</u></s>"
    (pair,) = data_of(PreferenceDataModule, tmp_path, MOVED_SYSTEM, rows).train_dataloader()
    assert tokenizer.decode(pair.chosen_ids[0]) == "<u>a</u> b</s><u>Be brief.\n\nc</u> d</s>"
    # Only where the prompt has it: with a tool's answer at the end it stands nowhere.
    with pytest.raises(DataError, match=r"leaves out message 0 \(role 'system'\)"):
        prompt(MOVED_SYSTEM, *messages, {"role": "tool", "content": "f"})


def test_a_row_keeps_the_thought_of_its_response(tmp_path: Path) -> None:
    """Rewards and evaluations read it there; a response that is content alone is text."""
    thought = assistant("4", reasoning_content="2+2")
    row = {"chosen": [user("x"), thought], "rejected": [user("x"), assistant("5")]}
    for module, options in ((PromptDataModule, {}), (SFTDataModule, {"response_column": "chosen"})):
        (batch,) = data_of(module, tmp_path, THINKING, [row], **options).train_dataloader()
        assert batch.rows[0]["chosen"] == [thought]
        assert batch.rows[0]["rejected"] == "5"


def test_a_template_that_ends_turns_without_a_special_token(tmp_path: Path) -> None:
    """What it writes behind the content is no end that rollouts know: EOS is trained in its place."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert response_of(template, assistant("yes"))[1] == "yes"
    # Neither is an end that the tokenizer does not know, whatever else the template writes around the content.
    unknown = THINKING.replace("</s>", "<|end|>")
    for message in (assistant("yes", reasoning_content="hm"), assistant("<think>\nhm\n</think>\n\nyes")):
        assert response_of(unknown, message)[1] == "hm\n</think>\n\nyes"
    rows = [{"prompt": [user("x")], "response": "yes\n"}]
    data = data_of(SFTDataModule, tmp_path, template, rows)
    (batch,) = list(data.train_dataloader())
    assert data.tokenizer.decode(batch.response_ids[0]) == "yes\n</s>"


def test_a_turn_ends_with_the_templates_token_and_not_with_eos(tmp_path: Path) -> None:
    tokenizer = with_turn_token()
    tokenizer.save_pretrained(tmp_path / "turns")
    rows = [{"prompt": [user("x")], "response": "yes"}, {"prompt": "x", "response": "no"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SFTDataModule(str(tmp_path / "a.jsonl"), str(tmp_path / "turns"), batch_size=2)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    texts = {tokenizer.decode(ids[mask]) for ids, mask in zip(batch.response_ids, batch.response_mask, strict=True)}
    assert texts == {"yes<turn>", "no</s>"}
    assert data.response_ends == {2, tokenizer.convert_tokens_to_ids("<turn>")}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("x")], "completion": [assistant("yes")]},
        {"prompt": "as text", "completion": [user("x"), assistant("yes")]},
        {"prompt": [user("x")], "completion": [user("x"), assistant("yes")]},
        {"completion": [user("x"), assistant("yes")]},
        {"prompt": [user("x"), assistant("yes")], "completion": None},
    ],
)
def test_responses_that_are_messages(tmp_path: Path, row: dict[str, Any]) -> None:
    data = data_of(SFTDataModule, tmp_path, KNOWN_ROLES, [row], response_column="completion")
    (batch,) = list(data.train_dataloader())
    assert batch.prompts == ["<s>user\nx</s>\n<s>assistant\n"]
    assert data.tokenizer.decode(batch.response_ids[0]) == "yes</s>"
    assert batch.rows[0]["completion"] == "yes"


def test_messages_of_a_response_that_begin_otherwise(tmp_path: Path) -> None:
    row = {"prompt": [user("x")], "completion": [user("y"), assistant("yes")]}
    with pytest.raises(DataError, match=r"line 1: the messages in column 'completion' .* begin otherwise"):
        data_of(SFTDataModule, tmp_path, KNOWN_ROLES, [row], response_column="completion")


# Pairs


def test_pairs_go_through_the_template_whole(tmp_path: Path) -> None:
    thought = assistant("4", reasoning_content="2+2")
    rows = [
        {"chosen": [user("x"), thought], "rejected": [user("x"), assistant("5", reasoning_content="2+3")]},
        {"chosen": [user("x"), thought], "rejected": [user("x"), assistant("4", reasoning_content="guess")]},
    ]
    data = data_of(PreferenceDataModule, tmp_path, THINKING, rows, batch_size=2)
    (batch,) = list(data.train_dataloader())
    start = "<s>user\nx</s>\n<s>assistant\n<think>\n"
    texts = {
        side: {
            data.tokenizer.decode(ids[mask])
            for ids, mask in zip(getattr(batch, f"{side}_ids"), getattr(batch, f"{side}_mask"), strict=True)
        }
        for side in ("chosen", "rejected")
    }
    ends = {"2+2\n</think>\n\n4", "2+3\n</think>\n\n5", "guess\n</think>\n\n4"}
    assert texts["chosen"] == {f"{start}2+2\n</think>\n\n4</s>\n"}
    assert texts["chosen"] | texts["rejected"] == {f"{start}{end}</s>\n" for end in ends}
    with pytest.raises(DataError, match=r"leaves out 'reasoning_content' of message 1 \(role 'assistant'\)"):
        data_of(PreferenceDataModule, tmp_path, KNOWN_ROLES, rows)


def transcripts(chosen: str) -> dict[str, str]:
    return {side: f"\n\nHuman: hi\n\nAssistant:{text}" for side, text in (("chosen", chosen), ("rejected", " no"))}


@pytest.mark.parametrize(
    "empty",
    [
        transcripts(""),
        transcripts(" "),
        {"chosen": [user("hi"), assistant(" ")], "rejected": [user("hi"), assistant("no")]},
        {"chosen": [user("hi"), assistant(None)], "rejected": [user("hi"), assistant("no")]},
    ],
)
@pytest.mark.parametrize("module", [SFTDataModule, PreferenceDataModule])
def test_an_empty_chosen_response_is_dropped_in_every_stage(
    tmp_path: Path, module: type, empty: dict[str, Any]
) -> None:
    is_chat = isinstance(empty["chosen"], list)
    good = {side: [user("hi"), assistant(text)] for side, text in (("chosen", "yes"), ("rejected", "no"))}
    rows = [empty, good if is_chat else transcripts(" yes")]
    options = {"response_column": "chosen"} if module is SFTDataModule else {}
    with pytest.raises(DataError, match=r"line 1: the (chosen )?response in column 'chosen' is empty"):
        data_of(module, tmp_path, KNOWN_ROLES, rows, **options)
    with pytest.warns(UserWarning, match=r"dropped 1 of 2 rows.*data\.loading\.on_bad_row"):
        data = data_of(module, tmp_path, KNOWN_ROLES, rows, loading=LoadingConfig(on_bad_row="drop"), **options)
    (batch,) = list(data.train_dataloader())
    assert batch.rows[0]["chosen"].strip() == "yes"


@pytest.mark.parametrize("chosen", [None, [], [assistant(None)], 3])
def test_a_good_prompt_needs_no_pair(tmp_path: Path, chosen: Any) -> None:
    row = {"prompt": [user("x")], "chosen": chosen, "rejected": None}
    data = data_of(PromptDataModule, tmp_path, KNOWN_ROLES, [row, {"prompt": "text", "chosen": None, "rejected": "a"}])
    assert sorted(text for batch in data.train_dataloader() for text in batch.prompts) == [
        "<s>user\nx</s>\n<s>assistant\n",
        "text",
    ]


# The conversation travels


@pytest.mark.parametrize("column", ["prompt", "conversation"])
def test_a_prompt_knows_its_messages_in_every_batch(tmp_path: Path, column: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("Hi")]
    other = [user("another")]
    row = {column: messages, "messages": other}
    data = data_of(PromptDataModule, tmp_path, KNOWN_ROLES, [row], prompt_column=column)
    (batch,) = list(data.train_dataloader())
    assert batch.prompts[0].conversation.messages == messages
    assert [form.conversation.messages for form in data.prompt_forms()] == [messages]
    supervised = data_of(SFTDataModule, tmp_path, KNOWN_ROLES, [{**row, "response": "x"}], prompt_column=column)
    (examples,) = list(supervised.train_dataloader())
    assert examples.prompts[0].conversation.messages == messages
    text_row = {"prompt": "First question?", "messages": [*messages, assistant("a"), user("Second question?")]}
    (batch,) = list(data_of(PromptDataModule, tmp_path, KNOWN_ROLES, [text_row]).train_dataloader())
    assert (batch.prompts[0], batch.prompts[0].conversation) == ("First question?", None)


def test_one_prompt_of_each_form(tmp_path: Path) -> None:
    prompts = ("a", [user("b")], "c", [user("d")], [user("e"), assistant("f"), user("g")])
    data = data_of(PromptDataModule, tmp_path, KNOWN_ROLES, [{"prompt": prompt} for prompt in prompts])
    forms = data.prompt_forms()
    assert [form.conversation and len(form.conversation.messages) for form in forms] == [None, 1, 3]


# Calls of tools

PRINTING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    " {{ call.function.arguments }}{% endfor %}\n{% endfor %}"
)
"""Prints arguments whatever they are, an object as a program does."""
QUOTING = PRINTING.replace("arguments }}", "arguments | tojson }}")
"""Writes an object as JSON, and JSON within quotes."""
CALL_ENDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}<call>"
    "{% else %}<turn>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Ends a call with another token than an answer (gpt-oss)."""
WITH_TOOLS = (
    "{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "<turn>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Takes no conversation without tools (Hermes 3)."""


@pytest.mark.parametrize("template", [CONCATENATING, PRINTING, QUOTING])
@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_arguments_of_a_call_are_an_object_in_the_text(template: str, arguments: Any) -> None:
    """Whether the row has them as an object or as JSON, and whatever the template is made for."""
    messages = [user("x"), assistant("", tool_calls=[call_of(arguments)]), {"role": "tool", "content": "17"}]
    assert '{"city": "Oslo"}' in prompt(template, *messages)


def data_with_tokens(folder: Path, template: str, tokens: list[str], row: dict[str, Any]) -> SFTDataModule:
    """A data set of one row, and a tokenizer with special tokens that have no name of their own; EOS is `</s>`."""
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens], special_tokens=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    data = SFTDataModule(data=[row], tokenizer=str(folder / "tokenizer"), batch_size=1)
    data.setup("fit")
    return data


def test_a_call_ends_with_a_token_of_its_own(tmp_path: Path) -> None:
    row = {"prompt": [user("x")], "response": [assistant("", tool_calls=[CALL])]}
    data = data_with_tokens(tmp_path, CALL_ENDS, ["<turn>", "<call>"], row)
    (batch,) = data.train_dataloader()
    assert data.tokenizer.decode(batch.response_ids[0]) == "weather<call>"
    assert data.response_ends == {data.tokenizer.convert_tokens_to_ids("<call>")}


def test_the_end_of_a_turn_where_the_template_needs_tools(tmp_path: Path) -> None:
    row = {"prompt": [user("x")], "response": [assistant("yes")], "tools": [TOOL]}
    data = data_with_tokens(tmp_path, WITH_TOOLS, ["<turn>"], row)
    (batch,) = data.train_dataloader()
    assert data.tokenizer.decode(batch.response_ids[0]) == "yes<turn>"
    assert data.turn_end_id() == data.tokenizer.convert_tokens_to_ids("<turn>")


def test_a_template_that_takes_the_thought_out_of_the_content() -> None:
    template = KNOWN_ROLES.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    texts = formatter(template)
    with pytest.raises(DataError, match=r"the template takes the thought out of content; remove it from the row"):
        texts.response_text(
            texts.text({"prompt": [user("x")]}, "here"), assistant("<think>a long thought</think>yes"), "here"
        )
