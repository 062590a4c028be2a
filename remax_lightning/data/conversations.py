"""Read conversations from rows, and tokenize whole conversations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from remax_lightning.data.tokenizers import encode_batch
from remax_lightning.errors import DataError
from remax_lightning.files import load_json
from remax_lightning.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

# reasoning_content, reasoning, thinking, thought, cot, reasoning_details; not finish_reason
_THOUGHT_FIELD = re.compile(
    r"(?:reasoning|think|thinking|thoughts?|rationale|scratchpad|chain_of_thought|cot|analysis)"
    r"(?:_(?:content|text|details|blocks|traces?))?",
    re.I,
)
"""Fields in which data sets store the thoughts of the assistant; a template reads one of them."""
# <think>, </thinking>, <seed:think>, [/THINK], <reasoning>, <thought>, ◁/think▷, <|START_THINKING|>, <|end_of_thought|>
THOUGHT_MARKS = re.compile(
    r"</?(?:\w+:)?think(?:ing)?>|\[/?THINK\]|</?(?:reasoning|thought)>|◁/?think▷|<\|(?:START|END)_THINKING\|>"
    r"|<\|(?:begin|end)_of_thought\|>"
)
"""Marks around a thought inside `content`; templates drop the thoughts of earlier turns on purpose."""
# "...<|im_start|>assistant\n<think>\n" -> ("<think>", "\n")
_OPEN_THOUGHT = re.compile(
    r"(<(?:\w+:)?think(?:ing)?>|\[THINK\]|<(?:reasoning|thought)>|◁think▷|<\|START_THINKING\|>|<\|begin_of_thought\|>)(\s*)\Z"
)
"""A thought that the end of a generation prompt opens, and the white space behind the mark."""
TOOL_FIELDS = ("function_call", "functions", "tools")
"""Further fields of a message with tools or a call of one: OpenAI's older form, and definitions in a system message."""
RESERVED_KWARGS = frozenset(
    {
        *("conversation", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        "tokenizer_kwargs",
    }
)
"""Arguments of `apply_chat_template` that are set here."""


# ---- Reading ----


def read_conversation(
    messages: Sequence[Any], where: str, column: str, *, tools: Any = None, template_kwargs: Any = None
) -> Conversation:
    """Return the messages of a row as a conversation that can be passed to a chat template.

    Null fields go, as columnar files have them in every message that lacks a field of another one. `content` is text, a
    list of text parts, or null beside `tool_calls`.

    Args:
        messages: as the row has them.
        where: where the row stands, for messages.
        column: the column of the messages, for messages.
        tools: the row's `tools`: a list of definitions, such a list as JSON, or None.
        template_kwargs: the row's `chat_template_kwargs`, a mapping or None.

    Raises:
        DataError: for anything else; the message names line, column, message and role.
    """
    what = f"{where}: column {column!r}"
    if not messages:
        raise DataError(f"{what} holds no message; remove the row or fill it")
    read = [_read_message(message, f"{what}, message {i}") for i, message in enumerate(messages)]
    return Conversation(read, _read_tools(tools, where), _read_kwargs(template_kwargs, where), where)


def read_message(message: Any, where: str, column: str) -> Message:
    """Return a response of a row as a message, like `read_conversation`; missing content becomes empty text.

    Raises:
        DataError: if it is not a message; the error names `where` and `column`.
    """
    if isinstance(message, dict) and message.get("content") is None and not message.get("tool_calls"):
        message = {**message, "content": ""}
    return _read_message(message, f"{where}: column {column!r}, the last message")


def _read_message(message: Any, what: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f'{what}: expected {{"role": text, "content": text}}, got {message!r:.200}')
    message = _with_read_calls(message, what)
    # Valid without text: {"content": null, "tool_calls": [...]}, {"content": [{"type": "text", "text": ...}, ...]}
    content = message.get("content")
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        return {**_without_nulls(message), "content": None}
    if not isinstance(content, str):
        for part in content if isinstance(content, list) and content else [content]:
            if (
                part is content  # an object in place of the list, which a template would print
                or not isinstance(part, dict)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise DataError(
                    f"{what} (role {message['role']!r}): expected content that is text, a list of"
                    f' {{"type": "text", "text": text}}, or null beside tool_calls, got {part!r:.200}'
                )
    # A message of texts has no null to remove, so it is not copied.
    simple = all(isinstance(value, str) for value in message.values())
    read: Message = message if simple else _without_nulls(message)
    return read


def _with_read_calls(message: dict[Any, Any], what: str) -> Message:
    """Return a message whose calls of tools are a list of objects with names; columnar files may have them as JSON."""
    calls: Any = message.get("tool_calls")
    if not calls:
        return message
    if isinstance(calls, str):
        try:
            calls = load_json(calls)
        except ValueError as error:
            raise DataError(f"{what}: tool_calls are not valid JSON ({error})") from error
    if not isinstance(calls, list) or not all(map(function_name, calls)):
        raise DataError(
            f'{what}: expected tool_calls that are a list of {{"type": "function", "function": {{"name": text,'
            f' "arguments": object}}}}, got {calls!r:.200}'
        )
    return {**message, "tool_calls": calls}


def _read_tools(tools: Any, where: str) -> list[Any]:
    if isinstance(tools, str) and tools.strip():  # columnar files cannot hold definitions of different forms
        try:
            tools = load_json(tools)
        except ValueError as error:
            raise DataError(f"{where}: column 'tools' is not valid JSON ({error})") from error
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{where}: column 'tools' must be a list of definitions for the chat template, got {tools!r:.200}"
        )
    return [_without_nulls(tool) for tool in tools]


def _read_kwargs(kwargs: Any, where: str) -> dict[str, Any]:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict) or not RESERVED_KWARGS.isdisjoint(kwargs):
        raise DataError(
            f"{where}: column 'chat_template_kwargs' must hold variables of the chat template, got {kwargs!r:.200}"
        )
    return {name: value for name, value in kwargs.items() if value is not None}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def content_text(message: Mapping[str, Any]) -> str:
    """Return the content of a message as text; text parts are joined by line breaks, null is empty."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if isinstance(part, dict) and part.get("text"))
    return content if isinstance(content, str) else ""


def is_empty(message: Mapping[str, Any]) -> bool:
    """Whether a message has no content, no thoughts and no tool calls."""
    calls = (message.get(field) for field in ("tool_calls", *TOOL_FIELDS))
    return not (content_text(message).strip() or any(calls) or thoughts(message))


def thoughts(message: Mapping[str, Any]) -> dict[str, str]:
    """Return the thoughts of a message that stand in fields of their own, by field.

    A list of parts counts where no field has the thought as text (`reasoning_details` beside `reasoning` repeats it).
    """
    fields = {name: value for name, value in message.items() if value and _THOUGHT_FIELD.fullmatch(name)}
    texts = {name: value for name, value in fields.items() if isinstance(value, str)}
    return texts or {name: _part_texts(value) for name, value in fields.items() if _part_texts(value)}


def _part_texts(value: Any) -> str:
    # [{"type": "thinking", "thinking": "..."}], [{"type": "reasoning.text", "text": "..."}]
    parts = [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []
    texts = (part.get("text") or part.get("thinking") or part.get("summary") for part in parts)
    return "\n".join(text for text in texts if isinstance(text, str))


def message_form(message: Message) -> tuple[Any, ...]:
    """Return the properties of a message that a template may branch on: role, kind of content, further fields."""
    content = message["content"]
    kind = len(content) if isinstance(content, list) else type(content).__name__
    # {"role": "user", "content": "2 + 2?"} -> ("user", "str"); parts -> ("user", 3), their number
    if len(message) == 2:
        return message["role"], kind
    calls = [type(call_arguments(call)).__name__ for call in message.get("tool_calls") or []]
    # A field that one row has filled and another one empty makes two forms.
    return message["role"], kind, *calls, *sorted(name if value else f"no {name}" for name, value in message.items())


def call_arguments(call: Any) -> Any:
    """Return the arguments of a tool call, None where there are none."""
    # {"type": "function", "function": {"name": ..., "arguments": ...}}, or {"name": ..., "arguments": ...} alone
    function = call.get("function", call) if isinstance(call, dict) else None
    return function.get("arguments") if isinstance(function, dict) else None


def function_name(tool: Any) -> str:
    """Return the name of a tool, or of the function that a call calls; empty where there is none."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def with_opened_thought(prompt: str, response: str) -> str:
    """Return a response with the mark that opens its thought, if the prompt ends with that mark.

    A generation prompt may open the thought. The message of the assistant is then that opening and the response.
    """
    # prompt "...<think>\n", response "It is even.</think>4" -> "<think>\nIt is even.</think>4"
    mark, space = opened_thought(prompt) or ("", "")
    if not mark or mark in response or closing_mark(mark) not in response:
        return response
    return mark + space + response


def opened_thought(prompt: str) -> tuple[str, str] | None:
    """Return the mark of a thought that the end of a prompt opens, and the white space behind it; None without one."""
    opened = _OPEN_THOUGHT.search(prompt)
    return None if opened is None else (opened[1], opened[2])


def closing_mark(mark: str) -> str:
    """Return the mark that ends a thought which another mark opens: `</think>` for `<think>`."""
    # "<|START_THINKING|>" -> "<|END_THINKING|>", "[THINK]" -> "[/THINK]"
    for start, end in (("START_", "END_"), ("begin_", "end_")):
        if start in mark:
            return mark.replace(start, end)
    return f"{mark[0]}/{mark[1:]}"


def behind_thought(response: str, prompt: str = "") -> str:
    """Return what a response says behind its last thought, all of it where there is none.

    That is nothing where a thought, opened in the response or by the end of its prompt, is not closed.
    """
    # "<think>Maybe 42?</think>41" -> "41"; "<think>Maybe 42" -> ""
    marks = list(THOUGHT_MARKS.finditer(response))
    if not marks:
        return response if opened_thought(prompt) is None else ""
    return response[marks[-1].end() :] if _closes(marks[-1][0]) else ""


def _closes(mark: str) -> bool:
    return any(end in mark for end in ("/", "END_", "end_"))


def take_thought(message: Message) -> tuple[str, Message] | None:
    """Split a message into its thought and the message without the thought.

    A thought stands in a field of its own or at the beginning of the content, between marks. It is empty where there is
    none. None is returned where it cannot be told apart: marks that are not closed, several thoughts, lists of parts.
    """
    # ---- A thought in a field of its own, or none ----
    fields = thoughts(message)
    content = message["content"]
    text = content_text(message)
    marks = list(THOUGHT_MARKS.finditer(text))
    if not marks:
        thought = next(iter(fields.values()), "")
        return thought.strip(), {name: value for name, value in message.items() if not _THOUGHT_FIELD.fullmatch(name)}
    # The opening mark may be missing: a row may hold what a policy wrote behind a prompt that has it.
    # ---- A thought in the content: "<think>It is even.</think>4" ----
    opening, closing = (None, marks[0]) if len(marks) == 1 else (marks[0], marks[1])
    is_pair = opening is None or (closing_mark(opening[0]) == closing[0] and not text[: opening.start()].strip())
    if fields or len(marks) > 2 or not (is_pair and _closes(closing[0])) or not isinstance(content, str):
        return None
    start = 0 if opening is None else opening.end()
    return text[start : closing.start()].strip(), {**message, "content": text[closing.end() :].lstrip()}


def is_plain(message: Mapping[str, Any]) -> bool:
    """Whether a message has only content: no thoughts in separate fields, and no tool calls."""
    return not any(message.get(field) for field in ("tool_calls", *TOOL_FIELDS)) and not thoughts(message)


# ---- Tokenizing ----


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, is_chat: bool = False
) -> list[list[int]]:
    """Return the token ids of whole conversations, the same for training a reward model and for scoring with it.

    Plain text gets the special tokens of the tokenizer. A chat template has written its own, so it gets none. Where
    either spells out the first or the last of them, it stands there once.

    Args:
        tokenizer: the reward model's.
        texts: prompt and response, and what a template puts around them, as one text.
        is_chat: whether a chat template wrote the texts.
    """
    # ---- BOS or CLS in front, EOS or SEP behind ----
    encoded = encode_batch(tokenizer, texts, add_special_tokens=not is_chat)
    first, last = (tokenizer.bos_token_id, tokenizer.cls_token_id), (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return [_once(ids, first, last) for ids in encoded]


def _once(ids: list[int], first: tuple[int | None, ...], last: tuple[int | None, ...]) -> list[int]:
    # [bos, bos, 5, 6, eos, eos] -> [bos, 5, 6, eos]
    if len(ids) > 1 and ids[0] == ids[1] and ids[0] in first:
        ids = ids[1:]
    return ids[:-1] if len(ids) > 1 and ids[-1] == ids[-2] and ids[-1] in last else ids
