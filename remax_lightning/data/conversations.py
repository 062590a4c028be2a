"""From messages to text and token ids: the one place where a chat template writes, for policy and reward model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from remax_lightning.errors import DataError, UserError
from remax_lightning.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Where messages of data sets have what the assistant thought; a template reads one of them."""
_THOUGHT = re.compile(r"</?think(?:ing)?>|\[/?THINK\]|</?reasoning>")
"""Marks around a thought that stands inside of `content`; templates drop that of earlier turns on purpose."""
_SHORT = 32
"""Characters below which a content may stand in a text by accident, so that finding it proves nothing."""
_RESERVED = frozenset(
    {
        *("conversation", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        "tokenizer_kwargs",
    }
)
"""Arguments of `apply_chat_template` that are set here."""


# Reading


def read_conversation(
    messages: Sequence[Any], where: str, column: str, *, tools: Any = None, template_kwargs: Any = None
) -> Conversation:
    """Return messages of a row as a conversation, whose parts a chat template can be given.

    Null fields go, as columnar files have them in every message that lacks a field of another one. `content` is text, a
    list of text parts, or null beside `tool_calls`.

    Args:
        messages: as the row has them.
        where: where the row stands, for messages.
        column: the column of the messages, for messages.
        tools: the row's `tools`: a list of definitions, such a list as JSON, or None.
        template_kwargs: the row's `chat_template_kwargs`, a mapping or None.

    Raises:
        DataError: if something else stands there; the message names line, column, message and role.
    """
    what = f"{where}: column {column!r}"
    if not messages:
        raise DataError(f"{what} holds no message; remove the row or fill it")
    read = [_read_message(message, f"{what}, message {i}") for i, message in enumerate(messages)]
    return Conversation(read, _read_tools(tools, where), _read_kwargs(template_kwargs, where), where)


def read_message(message: Any, where: str, column: str) -> Message:
    """Return a response of a row as `read_conversation` does its messages; without content it is an empty one.

    Raises:
        DataError: if it is none; the message names `where` and `column`.
    """
    if isinstance(message, dict) and message.get("content") is None and not message.get("tool_calls"):
        message = {**message, "content": ""}
    return _read_message(message, f"{where}: column {column!r}, the last message")


def _read_message(message: Any, what: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f'{what}: expected {{"role": text, "content": text}}, got {message!r}')
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**_without_nulls(message), "content": None}
    if not isinstance(content, str):
        for part in content if isinstance(content, list) and content else [content]:
            if (
                not isinstance(part, dict)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise DataError(
                    f"{what} (role {message['role']!r}): expected content that is text, a list of"
                    f' {{"type": "text", "text": text}}, or null beside tool_calls, got {part!r}'
                )
    simple = all(isinstance(value, str) for value in message.values())
    return message if simple else _without_nulls(message)


def _read_tools(tools: Any, where: str) -> list[Any]:
    if isinstance(tools, str) and tools.strip():  # columnar files cannot hold definitions of different forms
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{where}: column 'tools' is not valid JSON ({error})") from error
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: column 'tools' must be a list of definitions for the chat template, got {tools!r}")
    return [_without_nulls(tool) for tool in tools]


def _read_kwargs(kwargs: Any, where: str) -> dict[str, Any]:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict) or not _RESERVED.isdisjoint(kwargs):
        raise DataError(
            f"{where}: column 'chat_template_kwargs' must hold variables of the chat template, got {kwargs!r}"
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
    """Whether a message says, thinks and calls nothing."""
    thoughts = (message.get(field) for field in REASONING_FIELDS)
    return not (content_text(message).strip() or message.get("tool_calls") or any(thoughts))


def check_characters(text: str, what: str) -> None:
    r"""Refuse half a surrogate pair, which JSON can spell (`"\ud83d"`) and no tokenizer takes.

    Args:
        text: a text of the data set.
        what: where it stands, for messages.

    Raises:
        DataError: if it holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = ascii(text[error.start])[1:-1]
        raise DataError(
            f"{what} holds half a surrogate pair ({character}), which is no text; write the whole character, or remove"
            " it"
        ) from None


# Rendering


class _Form(NamedTuple):
    """How messages are written for a template: templates differ in what they read of one and the same content."""

    content: Literal["given", "text", "parts"] = "given"
    null_is_empty: bool = False
    arguments_are_objects: bool = False


class _Fit(NamedTuple):
    """The form in which a template keeps the most of messages of one shape, and the messages that it loses even so."""

    form: _Form
    lost: tuple[tuple[int, str], ...] = ()


class ChatRenderer:
    """Writes conversations with a tokenizer's chat template, and refuses to lose anything of them.

    Templates skip without an error what they do not know: roles, text where they read parts, thoughts, tools. Once for
    each shape of a conversation (its roles, and the kinds of its contents) a probe with marked contents shows what a
    template leaves out; and in each text that is written the contents are looked for.

    Args:
        tokenizer: it has a chat template.
        template_kwargs: variables of the template, such as `enable_thinking`; a row's own come before them.
        name: what messages call the template.

    Raises:
        UserError: if `template_kwargs` names what the template does not read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: Mapping[str, Any] | None = None,
        name: str = "the chat template",
    ) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.template_kwargs = dict(template_kwargs or {})
        self._fits: dict[tuple[Any, ...], _Fit] = {}
        for variable in self.template_kwargs:
            _check_variable(variable, tokenizer)

    def prompt(self, conversation: Conversation) -> str:
        """Return the messages as the text that a response is written after.

        Raises:
            DataError: if the template refuses a message or leaves one out; the message names line and role.
        """
        return self._render(conversation, conversation.messages, is_prompt=True)

    def whole(self, conversation: Conversation, response: Message, *, is_generated: bool = False) -> str:
        """Return the messages and a response as the template writes them all.

        Args:
            conversation: what stands before the response.
            response: a message of the assistant.
            is_generated: whether a policy wrote the response, which may be anything: it is not looked for then, and
                neither are the tools, since the text is for a reward model.

        Raises:
            DataError: as in `prompt`.
        """
        return self._render(conversation, [*conversation.messages, response], is_generated=is_generated)

    @cached_property
    def turn_end(self) -> str:
        """The special token that the template writes after a message of the assistant; empty where it writes none."""
        marks = ("probe-of-the-user", "probe-of-the-assistant")
        messages = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant"), marks, strict=True)]
        try:
            text = self._render(Conversation(messages[:1]), messages)
        except DataError:  # a template for other conversations than these two messages
            return ""
        tail = text.rpartition(marks[1])[2]
        places = [(tail.find(token), -len(token), token) for token in special_tokens(self.tokenizer) if token in tail]
        return min(places)[2] if places else ""

    def _render(
        self,
        conversation: Conversation,
        messages: list[Message],
        *,
        is_prompt: bool = False,
        is_generated: bool = False,
    ) -> str:
        fit = self._fit(conversation, messages, is_prompt)
        try:
            text = self._apply(conversation, messages, fit.form, is_prompt)
        except Exception as error:  # a template is a program: it may raise anything
            raise self._refusal(conversation, messages, fit.form, error) from error
        self._check(conversation, messages, text, fit.lost, is_prompt, is_generated)
        return text

    def _apply(self, conversation: Conversation, messages: Sequence[Message], form: _Form, is_prompt: bool) -> str:
        formed: Any = list(messages) if form == _Form() else [_formed(message, form) for message in messages]
        options = self.template_kwargs | conversation.template_kwargs
        return str(
            self.tokenizer.apply_chat_template(
                formed,
                tools=conversation.tools or None,
                tokenize=False,
                add_generation_prompt=is_prompt,
                **options,
            )
        )

    # What is lost

    def _fit(self, conversation: Conversation, messages: Sequence[Message], is_prompt: bool) -> _Fit:
        """Return how to write messages of this shape, found by a probe the first time that it comes."""
        options = repr(conversation.template_kwargs) if conversation.template_kwargs else ""
        shape = (is_prompt, bool(conversation.tools), options, *map(_shape, messages))
        fit = self._fits.get(shape)
        if fit is None:
            fit = self._fits[shape] = self._probe(conversation, messages, is_prompt)
        return fit

    def _probe(self, conversation: Conversation, messages: Sequence[Message], is_prompt: bool) -> _Fit:
        """Try the forms in order; the first in which nothing is lost is right, else the one that loses the least."""
        marked = [_marked(message, i) for i, message in enumerate(messages)]
        best: tuple[int, _Fit] | None = None
        for form in _forms(messages):
            try:
                text = self._apply(conversation, [message for message, _ in marked], form, is_prompt)
            except Exception:
                continue
            lost = tuple(
                (i, field)
                for i, (_, marks) in enumerate(marked)
                for field, mark in marks
                # Thoughts of earlier turns are left out on purpose; those of the response are what is trained.
                if mark not in text and (field == "content" or (i == len(messages) - 1 and not is_prompt))
            )
            # A template that takes everything for text writes null as the word, and a list as it stands in a program.
            written_raw = form.content != "text" and any(
                isinstance(_formed(message, form)["content"], list) and _is_quoted(text, marks)
                for message, marks in marked
            )
            cost = len(lost) + ("None" in text) + written_raw
            if best is None or cost < best[0]:
                best = (cost, _Fit(form, lost))
            if cost == 0:
                break
        return _Fit(_Form()) if best is None else best[1]

    def _check(
        self,
        conversation: Conversation,
        messages: Sequence[Message],
        text: str,
        lost: tuple[tuple[int, str], ...],
        is_prompt: bool,
        is_generated: bool,
    ) -> None:
        """Look for all contents in the text that was made of them."""
        last = len(messages) - 1
        for i, message in enumerate(messages):
            if i == last and is_generated:
                break
            content = message["content"]
            # The whole of it stands in nearly every text as it is; everything else costs more.
            if isinstance(content, str) and content in text and not lost:
                pass
            elif not _holds(text, content, whole=i == last, by_accident=(i, "content") in lost):
                raise self._loss(conversation, message, i)
            if len(message) > 2:
                self._check_fields(conversation, message, i, text, is_response=i == last and not is_prompt, lost=lost)
        if conversation.tools and not is_generated:
            for tool in conversation.tools:
                name = _function_name(tool)
                if name and name not in text:
                    raise DataError(
                        f"{conversation.where}: {self.name} leaves out the tool {name!r} of column 'tools'; take a"
                        " tokenizer whose template reads tools, or remove the column"
                    )

    def _check_fields(
        self,
        conversation: Conversation,
        message: Message,
        i: int,
        text: str,
        *,
        is_response: bool,
        lost: tuple[tuple[int, str], ...],
    ) -> None:
        for call in message.get("tool_calls") or []:
            if isinstance(call, dict) and (name := _function_name(call)) and name not in text:
                raise self._loss(conversation, message, i, f"the call of {name!r} in ")
        for field in REASONING_FIELDS if is_response else ():
            thought = message.get(field)
            if thought and not _holds(text, thought, whole=True, by_accident=(i, field) in lost):
                raise self._loss(conversation, message, i, f"{field!r} of ")

    def _loss(self, conversation: Conversation, message: Message, i: int, what: str = "") -> DataError:
        if not what:
            advice = "its place or its role is none that the template writes; correct the row"
        elif what.startswith("'"):
            advice = "the template does not read the field; write it into content, as the template has thoughts there"
        else:
            advice = "the template does not read it; remove it"
        return DataError(
            f"{_in_front(conversation)}{self.name} leaves out {what}message {i} (role {message['role']!r}): {advice},"
            " or take a tokenizer whose template writes it"
        )

    def _refusal(
        self, conversation: Conversation, messages: Sequence[Message], form: _Form, error: Exception
    ) -> DataError:
        """Say which message a template stumbles over: the last of the shortest beginning that it refuses."""
        from jinja2 import TemplateError

        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        for count in range(1, len(messages) + 1):
            try:
                self._apply(conversation, messages[:count], form, is_prompt=False)
            except Exception:
                which = f"message {count - 1} (role {messages[count - 1]['role']!r})"
                break
        else:
            which = f"these messages (roles {', '.join(repr(message['role']) for message in messages)})"
        return DataError(f"{_in_front(conversation)}{self.name} refuses {which}: {reason}")


def _in_front(conversation: Conversation) -> str:
    return f"{conversation.where}: " if conversation.where else ""


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return every special token of a tokenizer, those without a name of their own too."""
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)


def _check_variable(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    key = "data.loading.chat_template_kwargs"
    if name in _RESERVED:
        raise UserError(f"{key}: {name!r} is set by the data module; give variables of the chat template")
    templates: Any = tokenizer.chat_template or ""
    text = templates if isinstance(templates, str) else "\n".join(templates.values())
    if name != "chat_template" and not re.search(rf"\b{re.escape(name)}\b", text):
        raise UserError(
            f"{key}: the chat template of {tokenizer.name_or_path!r} has no variable {name!r}; correct the name, or"
            " remove it"
        )


def _shape(message: Message) -> tuple[Any, ...]:
    """What a template may treat differently, whatever the contents are."""
    content = message["content"]
    kind = len(content) if isinstance(content, list) else type(content).__name__
    if len(message) == 2:
        return message["role"], kind
    calls = [type(_arguments(call)).__name__ for call in message.get("tool_calls") or []]
    return message["role"], kind, *calls, *sorted(message)


def _marked(message: Message, i: int) -> tuple[Message, list[tuple[str, str]]]:
    """Return a message whose texts are marks, and the marks by field."""
    content, marks = message["content"], []
    marked = dict(message)
    if isinstance(content, list):
        marked["content"] = [{**part, "text": f"probe-{i}-{j}-end"} for j, part in enumerate(content)]
        marks = [("content", part["text"]) for part in marked["content"]]
    elif content is not None:
        marked["content"] = f"probe-{i}-end"
        marks = [("content", marked["content"])]
    for field in REASONING_FIELDS:
        if message.get(field):
            marked[field] = f"probe-{i}-{field}-end"
            marks.append((field, marked[field]))
    return marked, marks


def _is_quoted(text: str, marks: list[tuple[str, str]]) -> bool:
    return any(f"{quote}{mark}{quote}" in text for field, mark in marks if field == "content" for quote in "'\"")


def _forms(messages: Sequence[Message]) -> Iterator[_Form]:
    """Yield the forms that messages can be written in, the likeliest first."""
    contents = [message["content"] for message in messages]
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    kinds: list[Literal["given", "text", "parts"]] = ["given"]
    kinds += ["text"] if any(isinstance(content, list) for content in contents) else []
    kinds += ["parts"] if any(isinstance(content, str) for content in contents) else []
    nulls = (False, True) if None in contents else (False,)
    # OpenAI writes arguments as JSON in a string, and templates are made for objects: those would quote it once more.
    objects = (True, False) if any(isinstance(_arguments(call), str) for call in calls) else (False,)
    for arguments_are_objects, kind, null_is_empty in product(objects, kinds, nulls):
        yield _Form(kind, null_is_empty, arguments_are_objects)


def _formed(message: Message, form: _Form) -> Message:
    content = message["content"]
    if content is None and form.null_is_empty:
        content = ""
    if form.content == "text" and isinstance(content, list):
        content = content_text(message)
    elif form.content == "parts" and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    formed = {**message, "content": content}
    if form.arguments_are_objects and message.get("tool_calls"):
        formed["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
    return formed


def _arguments(call: Any) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else None
    return function.get("arguments") if isinstance(function, dict) else None


def _with_object(call: Any) -> Any:
    arguments = _arguments(call)
    if not isinstance(arguments, str):
        return call
    try:
        value = json.loads(arguments)
    except ValueError:
        return call
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": value}}
    return {**call, "arguments": value}


def _function_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _holds(text: str, content: Any, *, whole: bool, by_accident: bool) -> bool:
    """Whether a text holds a content.

    Args:
        text: what a template wrote.
        content: text, a list of text parts, or None.
        whole: whether a thought inside of the content has to stand there too; that of an earlier turn need not.
        by_accident: whether the template leaves such a message out, so that a short content proves nothing.
    """
    if isinstance(content, list):
        return all(_holds(text, part["text"], whole=whole, by_accident=by_accident) for part in content)
    if not isinstance(content, str) or not content.strip():
        return True
    if by_accident and len(content.strip()) < _SHORT:
        return False
    if content.strip() in text:
        return True
    pieces = [piece.strip() for piece in _THOUGHT.split(content)]
    return all(_holds_piece(text, piece) for piece in (pieces if whole else pieces[-1:]))


def _holds_piece(text: str, piece: str) -> bool:
    """Whether a text holds a piece as it is, as JSON, or with other white space."""
    if piece in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text or json.dumps(piece)[1:-1] in text:
        return True
    return "".join(piece.split()) in "".join(text.split())


# Tokenizing


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, is_chat: bool = False
) -> list[list[int]]:
    """Return the token ids of whole conversations: a reward model reads in every stage what it learned.

    Plain text gets the special tokens of the tokenizer. A chat template has written its own, so it gets none. Where
    either spells out the first or the last of them, it stands there once.

    Args:
        tokenizer: the reward model's.
        texts: prompt and response, and what a template puts around them, as one text.
        is_chat: whether a chat template wrote the texts.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=not is_chat, return_attention_mask=False, verbose=False)
    first, last = (tokenizer.bos_token_id, tokenizer.cls_token_id), (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return [_once(list(ids), first, last) for ids in encoded["input_ids"]]


def _once(ids: list[int], first: tuple[int | None, ...], last: tuple[int | None, ...]) -> list[int]:
    if len(ids) > 1 and ids[0] == ids[1] and ids[0] in first:
        ids = ids[1:]
    return ids[:-1] if len(ids) > 1 and ids[-1] == ids[-2] and ids[-1] in last else ids
