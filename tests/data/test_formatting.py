from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy
import pandas
import pytest
from conftest import make_tokenizer

from remax_lightning.data.formatting import PromptFormatter
from remax_lightning.errors import DataError, UserError
from remax_lightning.types import Prompt

BOS, EOS = 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "1+1=?"}]


def encode(formatter: PromptFormatter, row: dict[str, Any]) -> tuple[str, list[int]]:
    prompt = formatter.text(row, "here")
    return prompt, formatter.encode([prompt])[0]


def with_post_processor(single: str, **ids: int) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=list(ids.items()))
    return tokenizer


def characters(text: str) -> list[int]:
    tokenizer = make_tokenizer()
    return [tokenizer.convert_tokens_to_ids(character) for character in text]


def test_plain_text_gets_one_bos(tokenizer: Any) -> None:
    text, ids = encode(PromptFormatter(tokenizer), {"prompt": "1+1="})
    assert text == "1+1="
    assert ids == [BOS, *characters("1+1=")]


def test_bos_that_the_text_spells_out_is_not_doubled(tokenizer: Any) -> None:
    _, ids = encode(PromptFormatter(tokenizer), {"prompt": "<s>1+1="})
    assert ids == [BOS, *characters("1+1=")]


def test_tokenizer_without_bos_adds_none() -> None:
    _, ids = encode(PromptFormatter(make_tokenizer(bos=False)), {"prompt": "1+1="})
    assert ids == characters("1+1=")


@pytest.mark.parametrize("single", ["<s> $A </s>", "$A </s>"])
def test_eos_of_the_post_processor_is_left_out(single: str) -> None:
    tokenizer = with_post_processor(single, **{"<s>": BOS, "</s>": EOS})
    assert tokenizer("1").input_ids[-1] == EOS, "else this test shows nothing"
    _, ids = encode(PromptFormatter(tokenizer), {"prompt": "1"})
    assert ids == [BOS, *characters("1")][single.startswith("$") :]


def test_chat_template_writes_the_only_bos() -> None:
    formatter = PromptFormatter(make_tokenizer(chat_template=CHAT_TEMPLATE), column="messages")
    text, ids = encode(formatter, {"messages": MESSAGES})
    assert text == "<s>user: 1+1=?\nassistant:"
    assert ids == [BOS, *characters("user: 1+1=?\nassistant:")]


def test_plain_and_chat_rows_in_one_batch() -> None:
    formatter = PromptFormatter(make_tokenizer(chat_template="{{ messages[0].content }}"))
    prompts = [Prompt("1"), formatter.text({"prompt": MESSAGES}, "here")]
    assert formatter.encode(prompts) == [[BOS, *characters("1")], characters("1+1=?")]


@pytest.mark.parametrize(
    ("column", "template", "row", "expected"),
    [
        ("prompt", "Human: {prompt}\n\nAssistant:", {"prompt": "hi"}, "Human: hi\n\nAssistant:"),
        ("question", "Q: {prompt}", {"question": "hi"}, "Q: hi"),
        ("question", "{hint.text}: {question}", {"question": "hi", "hint.text": "add"}, "add: hi"),
        ("prompt", "{{x}} {prompt} {n:03d}", {"prompt": "{a}", "n": 7}, "{x} {a} 007"),
    ],
)
def test_template(tokenizer: Any, column: str, template: str, row: dict[str, Any], expected: str) -> None:
    prompt = PromptFormatter(tokenizer, column, template).text(row, "here")
    assert (prompt, prompt.conversation) == (expected, None)


@pytest.mark.parametrize(
    "null", [None, float("nan"), numpy.float32("nan"), Decimal("nan"), pandas.NA, pandas.NaT], ids=repr
)
def test_a_value_that_stands_for_none_is_empty(tokenizer: Any, null: Any) -> None:
    """Whatever a data frame or a columnar file has in its place."""
    assert PromptFormatter(tokenizer, template="{prompt}|{n}|").text({"prompt": "x", "n": null}, "here") == "x||"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Human:", "data.template has no field"),
        ("Human: {}", "data.template has a field without a name"),
        ("Human: {prompt", "data.template cannot be read"),
    ],
)
def test_template_is_checked_at_once(tokenizer: Any, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptFormatter(tokenizer, template=template)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, {"text": "x", "n": 1}, r"here: there is no column 'prompt' \(data\.prompt_column\); .*'text', 'n'"),
        (None, {}, "here: there is no column 'prompt'.*the columns are none"),
        (None, {"prompt": 3}, "here: column 'prompt' must be text or messages, got int"),
        (None, {"prompt": None}, "here: column 'prompt' must be text or messages, got NoneType"),
        (None, {"prompt": " \n"}, "here: the prompt in column 'prompt' is empty"),
        ("{prompt} {hint}", {"prompt": "x", "n": 1}, "data.template names 'hint', but the columns are 'prompt', 'n'"),
        ("{prompt} {n:03d}", {"prompt": "x", "n": "y"}, "here: data.template cannot be filled"),
        ("{prompt} {n}", {"prompt": "x", "n": ["y", None]}, r"here: .*\(column 'n' holds a list, which"),
        ("{prompt} {n}", {"prompt": "x", "n": {"y": None}}, r"here: .*\(column 'n' holds a dict"),
        ("{prompt} {n}", {"prompt": "x", "n": b"y"}, r"here: .*\(column 'n' holds a bytes"),
        (None, {"prompt": []}, "here: column 'prompt' holds no message"),
        (None, {"prompt": ["hi"]}, "message 0: expected .*got 'hi'"),
        (None, {"prompt": [*MESSAGES, {"role": "user"}]}, r"message 1 \(role 'user'\): expected"),
        (None, {"prompt": [*MESSAGES, {"role": "assistant", "content": "2"}]}, "ends with a message of the assistant"),
        (None, {"prompt": [{"role": "system", "content": "x"}]}, "here: the chat template refuses.*no system role"),
    ],
)  # fmt: skip
def test_bad_rows(template: str | None, row: dict[str, Any], message: str) -> None:
    formatter = PromptFormatter(make_tokenizer(chat_template=CHAT_TEMPLATE), template=template)
    with pytest.raises(DataError, match=message):
        formatter.text(row, "here")


def test_messages_need_a_chat_template_and_no_other(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: .* has no chat template"):
        PromptFormatter(tokenizer).text({"prompt": MESSAGES}, "here")
    with pytest.raises(UserError, match=r"data\.template is for plain prompts"):
        PromptFormatter(tokenizer, template="{prompt}").text({"prompt": MESSAGES}, "here")
