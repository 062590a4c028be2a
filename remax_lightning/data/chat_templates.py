"""What a chat template makes of conversations, for policy and reward model, and the check that nothing is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from remax_lightning.data.conversations import (
    REASONING_FIELDS,
    RESERVED_KWARGS,
    Message,
    call_arguments,
    content_text,
    message_form,
)
from remax_lightning.data.tokenizers import encode_responses
from remax_lightning.errors import DataError, UserError
from remax_lightning.types import Conversation, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THOUGHT = re.compile(r"</?think(?:ing)?>|\[/?THINK\]|</?reasoning>")
"""Marks around a thought that stands inside of `content`; templates drop that of earlier turns on purpose."""
_TOOLS = -1
"""In place of a message's number, where tools are lost."""
_ARGUMENT = "probe-argument"
"""An argument of every tool call in a probe; its quotes show how a template has written the arguments."""
_SHORT = 32
"""Characters below which a content may stand in a text by accident, so that finding it proves nothing."""


class _Form(NamedTuple):
    """How messages are written for a template: templates differ in what they read of one and the same content."""

    content: Literal["given", "text", "parts"] = "given"
    null_is_empty: bool = False
    arguments: Literal["given", "objects", "json"] = "given"


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
        tokenizer: whose chat template it is.
        name: what messages call the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "the chat template") -> None:
        self.tokenizer, self.name = tokenizer, name
        self._fits: dict[tuple[Any, ...], _Fit] = {}
        self._tail: str | None = None
        self._call_ends: set[str] = set()

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

    def response(self, prompt: Prompt, message: Message) -> str:
        """Return the text to imitate after a prompt: what the template writes there, through the end of the turn.

        Behind the token that ends a turn nothing is left. Where the template ends turns without a special token, what
        it writes behind the content is left out, and the end-of-sequence token takes its place (`response_ids`). After
        plain text the response is the content.

        Args:
            prompt: as `prompt` has written it, with its conversation.
            message: the response, a message of the assistant.

        Raises:
            DataError: if the template writes the prompt in another way before a response, so that none of what it
                writes continues the prompt, and as in `prompt`.
        """
        if prompt.conversation is None:
            return content_text(message)
        whole = self.whole(prompt.conversation, message)
        if not whole.startswith(prompt):
            place = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
            raise DataError(
                f"{_in_front(prompt.conversation)}{self.name} writes {prompt[place : place + 40]!r} at the end of the"
                f" prompt, and {whole[place : place + 40]!r} there in a conversation that has its response; training"
                " needs a response that continues the prompt. Write the response as the template has it, set"
                " data.loading.chat_template_kwargs (enable_thinking: false where there are no thoughts), or take a"
                " template whose generation prompt begins as its assistant's turns do"
            )
        text, end = whole[len(prompt) :], self.turn_end_after(prompt.conversation)
        if message.get("tool_calls") and (call_end := self._special_end(text)):
            self._call_ends.add(call_end)  # a call may end with a token of its own
            end = call_end
        if not end or end not in text:
            return text.removesuffix(self._turn_tail(prompt.conversation))
        text = text[: text.rindex(end) + len(end)]
        while text.endswith(end + end):  # the data spells it out, too
            text = text[: -len(end)]
        return text

    def response_ids(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of responses to imitate; each ends with the token that ends a turn.

        They are the tokens that read `texts` behind their prompts, as a policy writes them. The end is what the
        template has written, and the end-of-sequence token where it has written none.

        Args:
            prompts: what the responses are to.
            texts: from `response`.
        """
        if not texts:
            return []
        eos_id = int(cast(int, self.tokenizer.eos_token_id))
        conversation = next((prompt.conversation for prompt in prompts if prompt.conversation is not None), None)
        plain_ends, chat_ends = {eos_id}, {eos_id}
        if conversation is not None:
            names = {self.turn_end_after(conversation), *self._call_ends} - {""}
            chat_ends |= {cast(int, self.tokenizer.convert_tokens_to_ids(name)) for name in names}
        rows = []
        for prompt, ids in zip(prompts, encode_responses(self.tokenizer, prompts, texts), strict=True):
            ends = plain_ends if prompt.conversation is None else chat_ends
            rows.append(list(ids) if len(ids) and ids[-1] in ends else [*ids, eos_id])
        return rows

    def turn_end_after(self, conversation: Conversation) -> str:
        """Return the special token that the template writes after the content of an answer; empty where there is none.

        Args:
            conversation: one of the data, for templates that take no other: they need tools, or variables.
        """
        tail = self._turn_tail(conversation)
        places = [(tail.find(token), -len(token), token) for token in special_tokens(self.tokenizer) if token in tail]
        return min(places)[2] if places else ""

    def _turn_tail(self, conversation: Conversation) -> str:
        """Return all that the template writes after the content of the last message, which is the assistant's."""
        if self._tail is not None:
            return self._tail
        marks = ("probe-of-the-user", "probe-of-the-assistant")
        for start in (Conversation([{"role": "user", "content": marks[0]}]), conversation):
            try:
                text = self._render(start, [*start.messages, {"role": "assistant", "content": marks[1]}])
            except DataError:  # a template for other conversations than these two messages
                continue
            self._tail = text.rpartition(marks[1])[2]
            return self._tail
        return ""

    def _special_end(self, text: str) -> str:
        """Return the special token that a text ends with, white space aside; empty where it ends with none."""
        text = text.rstrip()
        return max((token for token in special_tokens(self.tokenizer) if text.endswith(token)), key=len, default="")

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
        return str(
            self.tokenizer.apply_chat_template(
                formed,
                tools=conversation.tools or None,
                tokenize=False,
                add_generation_prompt=is_prompt,
                **conversation.template_kwargs,
            )
        )

    # What is lost

    def _fit(self, conversation: Conversation, messages: Sequence[Message], is_prompt: bool) -> _Fit:
        """Return how to write messages of this shape, found by a probe the first time that it comes."""
        options = repr(conversation.template_kwargs) if conversation.template_kwargs else ""
        tools = tuple("function" in tool for tool in conversation.tools)
        shape = (is_prompt, tools, options, *map(message_form, messages))
        fit = self._fits.get(shape)
        if fit is None:
            fit = self._fits[shape] = self._probe(conversation, messages, is_prompt)
        return fit

    def _probe(self, conversation: Conversation, messages: Sequence[Message], is_prompt: bool) -> _Fit:
        """Try the forms in order; the first in which nothing is lost is right, else the one that loses the least."""
        marked = [_marked(message, i) for i, message in enumerate(messages)]
        tool_marks = [f"probe-tool-{j}-end" for j in range(len(conversation.tools))]
        tools = [_renamed(tool, mark) for tool, mark in zip(conversation.tools, tool_marks, strict=True)]
        conversation = conversation._replace(tools=tools)
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
                if mark not in text and (field not in REASONING_FIELDS or (i == len(messages) - 1 and not is_prompt))
            )
            if any(mark not in text for mark in tool_marks):
                lost = (*lost, (_TOOLS, "tools"))
            # A template that takes everything for text writes null as the word, and a list as it stands in a program.
            written_raw = form.content != "text" and any(
                isinstance(_formed(message, form)["content"], list) and _is_quoted(text, marks)
                for message, marks in marked
            )
            # Arguments are an object in the text, neither as a program prints it nor as text within quotes.
            quoted = sum(f"{quote}{_ARGUMENT}" in text for quote in ("'", '\\"'))
            cost = len(lost) + ("None" in text) + written_raw + quoted
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
                if name and (name not in text or (_TOOLS, "tools") in lost):
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
            name = _function_name(call)
            if name and (name not in text or (i, "tool_calls") in lost):
                raise self._loss(conversation, message, i, f"the call of {name!r} in ")
        for field in REASONING_FIELDS if is_response else ():
            thought = message.get(field)
            if thought and not _holds(text, thought, whole=True, by_accident=(i, field) in lost):
                raise self._loss(conversation, message, i, f"{field!r} of ")

    def _loss(self, conversation: Conversation, message: Message, i: int, what: str = "") -> DataError:
        if not what and _THOUGHT.search(content_text(message)):
            advice = "the template takes the thought out of content; remove it from the row"
        elif not what:
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


def check_template_kwargs(kwargs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Refuse variables that a chat template does not read: they would change nothing.

    Args:
        kwargs: the variables.
        tokenizer: whose chat template it is.
        key: the configuration key of the variables, for messages.

    Raises:
        UserError: if there is one.
    """
    templates: Any = tokenizer.chat_template or ""
    text = templates if isinstance(templates, str) else "\n".join(templates.values())
    for name in kwargs:
        if name in RESERVED_KWARGS:
            raise UserError(f"{key}: {name!r} is set by the data module; give variables of the chat template")
        if name != "chat_template" and not re.search(rf"\b{re.escape(name)}\b", text):
            raise UserError(
                f"{key}: the chat template of {tokenizer.name_or_path!r} has no variable {name!r}; correct the name, or"
                " remove it"
            )


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
    if message.get("tool_calls"):
        names = [f"probe-{i}-call-{j}-end" for j in range(len(message["tool_calls"]))]
        calls = [_with_arguments(call, _marked_arguments) for call in message["tool_calls"]]
        marked["tool_calls"] = [_renamed(call, name) for call, name in zip(calls, names, strict=True)]
        marks += [("tool_calls", name) for name in names]
    return marked, marks


def _renamed(tool: Any, name: str) -> Any:
    """Return a tool, or a call of one, under another name."""
    if not isinstance(tool, dict):
        return tool
    function = tool.get("function")
    return {**tool, "function": {**function, "name": name}} if isinstance(function, dict) else {**tool, "name": name}


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
    # OpenAI writes arguments as JSON in a string. Most templates are made for objects, and would quote it once more;
    # others add strings up, and need it.
    values = [call_arguments(call) for call in calls]
    arguments: list[Literal["given", "objects", "json"]] = []
    arguments += ["objects"] if any(isinstance(value, str) for value in values) else []
    arguments += ["given"]
    arguments += ["json"] if any(isinstance(value, dict) for value in values) else []
    for written, kind, null_is_empty in product(arguments, kinds, nulls):
        yield _Form(kind, null_is_empty, written)


def _formed(message: Message, form: _Form) -> Message:
    content = message["content"]
    if content is None and form.null_is_empty:
        content = ""
    if form.content == "text" and isinstance(content, list):
        content = content_text(message)
    elif form.content == "parts" and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    formed = {**message, "content": content}
    if form.arguments != "given" and message.get("tool_calls"):
        change = _as_object if form.arguments == "objects" else _as_json
        formed["tool_calls"] = [_with_arguments(call, change) for call in message["tool_calls"]]
    return formed


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    """Return a tool call with changed arguments, where it has any."""
    value = call_arguments(call)
    if value is None:
        return call
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": change(value)}}
    return {**call, "arguments": change(value)}


def _as_object(arguments: Any) -> Any:
    """Return arguments as an object, where they are JSON in a string."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _as_json(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _marked_arguments(arguments: Any) -> Any:
    """Return arguments with one more, of the same kind as they are."""
    value = _as_object(arguments)
    if not isinstance(value, dict):
        return arguments
    marked = {**value, _ARGUMENT: "probe"}
    return _as_json(marked) if isinstance(arguments, str) else marked


def _function_name(tool: Any) -> str:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
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
