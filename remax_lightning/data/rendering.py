"""Render messages with a chat template, and check that no part of them is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from remax_lightning.data.conversations import (
    THOUGHT_MARKS,
    TOOL_FIELDS,
    Message,
    content_text,
    function_name,
    message_form,
    thoughts,
)
from remax_lightning.data.templates import (
    ARGUMENT,
    MessageForm,
    TemplateLimitError,
    holds_content,
    is_quoted,
    mark_message,
    message_forms,
    rename_function,
    run_template,
    write_in_form,
)
from remax_lightning.errors import DataError, UserError
from remax_lightning.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOOLS = -1
"""Index that stands for the tools, in place of the index of a message."""


class _Fit(NamedTuple):
    """The form of messages that loses the least under a template, and the fields that it still loses."""

    form: MessageForm
    lost: tuple[tuple[int, str], ...] = ()


class LostMessageError(DataError):
    """A template leaves a message out, or a part of it.

    Args:
        text: says what is lost.
        index: which message it is, counted from 0.
    """

    def __init__(self, text: str, index: int) -> None:
        super().__init__(text)
        self.index = index


class StoppedTemplateError(UserError):
    """A template ran too long or wrote too much: none of the rows can be used with it."""


class TemplateRenderer:
    """Renders conversations with a tokenizer's chat template, and raises an error if a part of them is lost.

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

    def render(
        self,
        conversation: Conversation,
        messages: list[Message],
        *,
        is_prompt: bool = False,
        is_generated: bool = False,
    ) -> str:
        """Return messages as the template writes them.

        Args:
            conversation: has tools and variables.
            messages: what is written; those of the conversation, or others.
            is_prompt: whether a response follows.
            is_generated: whether the last message is a policy's, which may be anything.

        Raises:
            DataError: if the template refuses a message or leaves one out.
        """
        # ---- In the form that this template reads ----
        fit = self.fit(conversation, messages, is_prompt)
        try:
            text = self.apply(conversation, messages, fit.form, is_prompt)
        except Exception as error:  # a template is a program: it may raise anything
            raise self.refusal(conversation, messages, fit.form, error) from error
        # ---- Nothing may be lost ----
        self._check(conversation, messages, text, fit.lost, is_prompt, is_generated)
        return text

    def apply(self, conversation: Conversation, messages: Sequence[Message], form: MessageForm, is_prompt: bool) -> str:
        """Return what transformers makes of messages in one form; it raises whatever the template raises.

        Raises:
            StoppedTemplateError: if it runs too long or writes too much.
        """
        formed: Any = (
            list(messages) if form == MessageForm() else [write_in_form(message, form) for message in messages]
        )
        try:
            return run_template(
                lambda: str(
                    self.tokenizer.apply_chat_template(
                        formed,
                        tools=conversation.tools or None,
                        tokenize=False,
                        add_generation_prompt=is_prompt,
                        **conversation.template_kwargs,
                    )
                )
            )
        except TemplateLimitError as error:
            raise StoppedTemplateError(
                f"{in_front(conversation)}{self.name} was stopped: {error}; take a tokenizer with another chat"
                " template, or correct this one"
            ) from None

    # ---- What is lost ----

    def fit(self, conversation: Conversation, messages: Sequence[Message], is_prompt: bool) -> _Fit:
        """Return the best form for messages of this shape; a probe finds it when the shape occurs first."""
        shape = self.shape(conversation, messages, is_prompt)
        fit = self._fits.get(shape)
        if fit is None:
            fit = self._fits[shape] = self._probe(conversation, messages, is_prompt)
        return fit

    def shape(self, conversation: Conversation, messages: Sequence[Message], is_prompt: bool) -> tuple[Any, ...]:
        """Return everything that a template may branch on, apart from the texts."""
        # A template may branch on these: variables, kinds of tools, roles, kinds of content.
        options = repr(conversation.template_kwargs) if conversation.template_kwargs else ""
        tools = tuple("function" in tool for tool in conversation.tools)
        return (is_prompt, tools, options, *map(message_form, messages))

    def _probe(self, conversation: Conversation, messages: Sequence[Message], is_prompt: bool) -> _Fit:
        """Try the forms in order; the first in which nothing is lost is right, else the one that loses the least."""
        # ---- Marks in place of all texts: "probe-0-end", "probe-1-end", ... ----
        marked = [mark_message(message, i) for i, message in enumerate(messages)]
        tool_marks = [f"probe-tool-{j}-end" for j in range(len(conversation.tools))]
        tools = [rename_function(tool, mark) for tool, mark in zip(conversation.tools, tool_marks, strict=True)]
        conversation = conversation._replace(tools=tools)
        # ---- Each form costs what it loses and what it writes as a program prints it ----
        best: tuple[int, _Fit] | None = None
        for form in message_forms(messages):
            try:
                text = self.apply(conversation, [message for message, _ in marked], form, is_prompt)
            except StoppedTemplateError:  # in every other form, too, after as long
                raise
            except Exception:
                continue
            lost = tuple(
                (i, field)
                for i, (message, marks) in enumerate(marked)
                for field, mark in marks
                # Thoughts of earlier turns are left out on purpose; those of the response are what is trained.
                if mark not in text and (field not in thoughts(message) or (i == len(messages) - 1 and not is_prompt))
            )
            if any(mark not in text for mark in tool_marks):
                lost = (*lost, (_TOOLS, "tools"))
            # A template that takes everything for text writes null as the word, and a list as it stands in a program.
            written_raw = form.content != "text" and any(
                isinstance(write_in_form(message, form)["content"], list) and is_quoted(text, marks)
                for message, marks in marked
            )
            # Arguments are an object in the text, neither as a program prints it nor as text within quotes.
            quoted = sum(f"{quote}{ARGUMENT}" in text for quote in ("'", '\\"'))
            cost = len(lost) + ("None" in text) + written_raw + quoted
            if best is None or cost < best[0]:
                best = (cost, _Fit(form, lost))
            if cost == 0:
                break
        return _Fit(MessageForm()) if best is None else best[1]

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
        # ---- Messages ----
        last = len(messages) - 1
        for i, message in enumerate(messages):
            if i == last and is_generated:
                break
            is_last = i == last
            self.check_message(
                conversation, message, i, text, lost, is_last=is_last, is_response=is_last and not is_prompt
            )
        # ---- Tools ----
        if conversation.tools and not is_generated:
            for tool in conversation.tools:
                name = function_name(tool)
                if name not in text or (_TOOLS, "tools") in lost:
                    raise DataError(
                        f"{conversation.where}: {self.name} leaves out the tool {name!r} of column 'tools'; take a"
                        " tokenizer whose template reads tools, or remove the column"
                    )

    def check_message(
        self,
        conversation: Conversation,
        message: Message,
        i: int,
        text: str,
        lost: tuple[tuple[int, str], ...],
        *,
        is_last: bool,
        is_response: bool,
    ) -> None:
        """Look for one message in the text."""
        # ---- Content ----
        content = message["content"]
        # The whole of it stands in nearly every text as it is; everything else costs more.
        if isinstance(content, str) and content in text and not lost:
            pass
        elif not holds_content(text, content, whole=is_last, by_accident=(i, "content") in lost):
            raise self._loss(conversation, message, i)
        if len(message) == 2:  # role and content
            return
        # ---- Calls of tools, and thoughts of the response ----
        for call in message.get("tool_calls") or []:
            name = function_name(call)
            if name not in text or (i, "tool_calls") in lost:
                raise self._loss(conversation, message, i, f"the call of {name!r} in ")
        for field in TOOL_FIELDS:
            if message.get(field) and (i, field) in lost:
                raise self._loss(conversation, message, i, f"{field!r} of ")
        for field, thought in thoughts(message).items() if is_response else ():
            if not holds_content(text, thought, whole=True, by_accident=(i, field) in lost):
                raise self._loss(conversation, message, i, f"{field!r} of ")

    def _loss(self, conversation: Conversation, message: Message, i: int, what: str = "") -> LostMessageError:
        if not what and THOUGHT_MARKS.search(content_text(message)):
            advice = "the template takes the thought out of content; remove it from the row"
        elif not what:
            advice = "its place or its role is none that the template writes; correct the row"
        elif what == "'function_call' of ":
            advice = 'write it as "tool_calls": [{"type": "function", "function": ...}], which templates read'
        elif what.endswith(("'functions' of ", "'tools' of ")):
            advice = "move the definitions to the column 'tools', which goes to the template"
        elif what.startswith("'"):  # the name of a field with a thought
            advice = "the template does not read the field; write it into content, as the template has thoughts there"
        else:
            advice = "the template does not read it; remove it"
        text = f"{self.name} leaves out {what}message {i} (role {message['role']!r}): {advice}"
        return LostMessageError(
            f"{in_front(conversation)}{text}, or take a tokenizer whose template writes it", index=i
        )

    def refusal(
        self, conversation: Conversation, messages: Sequence[Message], form: MessageForm, error: Exception
    ) -> UserError:
        """Say which message a template stumbles over: the last of the shortest beginning that it refuses."""
        from jinja2 import TemplateError

        if isinstance(error, StoppedTemplateError):  # trying again would take as long
            return error
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        for count in range(1, len(messages) + 1):
            try:
                self.apply(conversation, messages[:count], form, is_prompt=False)
            except StoppedTemplateError:
                raise
            except Exception:
                which = f"message {count - 1} (role {messages[count - 1]['role']!r})"
                break
        else:
            which = f"these messages (roles {', '.join(repr(message['role']) for message in messages)})"
        return DataError(f"{in_front(conversation)}{self.name} refuses {which}: {reason}")


def in_front(conversation: Conversation) -> str:
    """Return the beginning of a message: where the conversation stands, if that is known."""
    return f"{conversation.where}: " if conversation.where else ""
