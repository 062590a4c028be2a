"""Render prompts, responses and ends of turns with a chat template, for policy and reward model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from remax_lightning.data.conversations import (
    RESERVED_KWARGS,
    THOUGHT_MARKS,
    Message,
    closing_mark,
    content_text,
    opened_thought,
    take_thought,
)
from remax_lightning.data.rendering import LostMessageError, StoppedTemplateError, TemplateRenderer, in_front
from remax_lightning.data.templates import mark_message
from remax_lightning.data.tokenizers import encode_responses
from remax_lightning.errors import DataError, UserError
from remax_lightning.types import Conversation, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _TurnStart(NamedTuple):
    """What a template writes behind the last message of a prompt.

    Args:
        mark: the content of that message in a probe.
        in_prompt: what follows it at the end of a prompt.
        in_whole: what follows it before the content of a response.
    """

    mark: str
    in_prompt: str
    in_whole: str


class ChatRenderer(TemplateRenderer):
    """Renders prompts, responses and whole conversations with a tokenizer's chat template.

    Args:
        tokenizer: whose chat template it is.
        name: what messages call the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "the chat template") -> None:
        super().__init__(tokenizer, name)
        # What texts and probes have shown so far; each probe costs a run of the template.
        self._turn_starts: dict[tuple[Any, ...], _TurnStart | None] = {}
        self._tail: str | None = None  # behind the content of an answer: "<|im_end|>\n"
        self._turn_end: str | None = None  # the special token in it: "<|im_end|>"
        self._call_ends: set[str] = set()  # what ends a turn with a tool call: "<|eom_id|>" of Llama 3.1

    def prompt(self, conversation: Conversation) -> str:
        """Return the messages as the text that a response is written after.

        Raises:
            DataError: if the template refuses a message or leaves one out; the message names line and role.
        """
        return self.render(conversation, conversation.messages, is_prompt=True)

    def whole(self, conversation: Conversation, response: Message, *, is_generated: bool = False) -> str:
        """Return the messages and a response as the template writes them all.

        Some templates leave a message out once a response follows (Mistral Nemo writes the system message into the last
        turn if that is the user's). There the prompt, which has it, and what is written behind it stand together.

        Args:
            conversation: what stands before the response.
            response: a message of the assistant.
            is_generated: whether a policy wrote the response, which may be anything: it is not looked for then, and
                neither are the tools, since the text is for a reward model.

        Raises:
            DataError: as in `prompt`.
        """
        messages = [*conversation.messages, response]
        try:
            return self.render(conversation, messages, is_generated=is_generated)
        except LostMessageError as error:
            if error.index == len(conversation.messages):
                raise
            prompt = Prompt(self.prompt(conversation), conversation)  # raises where the message is lost in it, too
            if (turn := self._turn_behind(prompt, response, is_generated=is_generated)) is None:
                raise
            return prompt + turn

    def response(self, prompt: Prompt, message: Message) -> str:
        """Return the text to imitate after a prompt: what the template writes there, through the end of the turn.

        Where the prompt ends with an opened thought that the template does not write in a conversation which has its
        response (R1 distill, QwQ), the response begins with the thought of the message and closes it; a message without
        a thought closes it at once.

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
        text, end = self._continuation(prompt, message), self.turn_end_after(prompt.conversation)
        if message.get("tool_calls") and (call_end := self._special_end(text)):
            self._call_ends.add(call_end)  # a call may end with a token of its own
            end = call_end
        if not end or end not in text:
            return text.removesuffix(self._turn_tail(prompt.conversation))
        # "4<|im_end|>\n" -> "4<|im_end|>"
        text = text[: text.rindex(end) + len(end)]
        while text.endswith(end + end):  # the data spells it out, too
            text = text[: -len(end)]
        return text

    def _continuation(self, prompt: Prompt, message: Message) -> str:
        """Return all that the template writes for a response behind a prompt, to the end of the text."""
        assert prompt.conversation is not None
        try:
            # The usual case: the text of the whole conversation begins with the text of the prompt.
            whole = self.whole(prompt.conversation, message)
            if whole.startswith(prompt):
                return whole[len(prompt) :]
            refusal = self._mismatch(prompt, whole)
        except LostMessageError as error:  # a thought that the template takes out of the response
            refusal = error
        if (turn := self._turn_behind(prompt, message)) is None:
            raise refusal
        return turn

    def _mismatch(self, prompt: Prompt, whole: str) -> DataError:
        assert prompt.conversation is not None
        # the first character that differs
        place = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
        return DataError(
            f"{in_front(prompt.conversation)}{self.name} writes {prompt[place : place + 40]!r} at the end of the"
            f" prompt, and {whole[place : place + 40]!r} there in a conversation that has its response; training"
            " needs a response that continues the prompt. Write the response as the template has it, set"
            " data.loading.chat_template_kwargs (enable_thinking: false where there are no thoughts), or take a"
            " template whose generation prompt begins as its assistant's turns do"
        )

    # ---- Responses behind prompts that no whole conversation begins with ----

    def _turn_behind(self, prompt: Prompt, response: Message, *, is_generated: bool = False) -> str | None:
        """Return what the template writes for a response behind the last message of its prompt, to the end of the text.

        It is rendered behind marks in place of the messages, so that the place where it begins is certain. What stands
        at the end of the prompt and not before a response must be a thought that is opened, or empty, or white space;
        None is returned where it is something else.

        Raises:
            DataError: if the template refuses the response or leaves out a part of it.
        """
        # ---- Where a turn begins ----
        conversation = prompt.conversation
        start = None if conversation is None else self._turn_start(conversation)
        if conversation is None or start is None or not prompt.endswith(start.in_prompt):
            return None
        # What the generation prompt has beyond the beginning of a turn: R1's `<think>`, or an empty thought. DeepSeek
        # V3.1 writes only the end of a thought before an answer.
        extra = "" if start.in_whole.startswith(start.in_prompt) else "".join(opened_thought(start.in_prompt) or ())
        if start.in_prompt.startswith(start.in_whole):
            extra = start.in_prompt.removeprefix(start.in_whole)
        # R1: in_prompt "<Assistant><think>\n", in_whole "<Assistant>" -> extra "<think>\n", begin "<Assistant>"
        begin = start.in_prompt.removesuffix(extra)
        if not start.in_whole.startswith(begin) or (parts := self._parts_behind(extra, response)) is None:
            return None
        # ---- What follows the last mark: the beginning of the turn, then the answer ----
        thought, message = parts
        text = self._render_behind_marks(conversation, message, is_generated).rpartition(start.mark)[2]
        if not text.startswith(begin):
            return None
        text = text[len(begin) :]
        # ---- Behind an opened thought: the thought, the mark that closes it, the answer ----
        if (opened := opened_thought(extra)) is None:
            return text
        space, closing = opened[1], closing_mark(opened[0])
        return thought + text if text.startswith(closing) else f"{thought}{space}{closing}{space * 2}{text}"

    @staticmethod
    def _parts_behind(extra: str, response: Message) -> tuple[str, Message] | None:
        """Return thought and rest of a response behind the end of a generation prompt; None where it fits none."""
        if not extra.strip():  # nothing, or white space
            return "", response
        if THOUGHT_MARKS.sub("", extra).strip():  # other words
            return None
        parts = take_thought(response)
        # An empty thought in the prompt says that there is none.
        return None if parts is None or (parts[0] and opened_thought(extra) is None) else parts

    def _render_behind_marks(self, conversation: Conversation, response: Message, is_generated: bool) -> str:
        """Return the text of a conversation whose messages are marks, except the response."""
        messages = [*conversation.messages, response]
        marked = [mark_message(message, i)[0] for i, message in enumerate(conversation.messages)]
        fit = self.fit(conversation, messages, is_prompt=False)
        try:
            text = self.apply(conversation, [*marked, response], fit.form, is_prompt=False)
        except Exception as error:
            raise self.refusal(conversation, messages, fit.form, error) from error
        if not is_generated:
            self.check_message(conversation, response, len(marked), text, fit.lost, is_last=True, is_response=True)
        return text

    def _turn_start(self, conversation: Conversation) -> _TurnStart | None:
        """Return what the template writes behind the last message, found once for each shape of a conversation."""
        messages = conversation.messages
        shape = self.shape(conversation, messages, is_prompt=True)
        if shape not in self._turn_starts:
            marked = [mark_message(message, i)[0] for i, message in enumerate(messages)]
            # The last message, as it is marked: what follows its content is the beginning of the next turn.
            marks = [text for field, text in mark_message(messages[-1], len(messages) - 1)[1] if field == "content"]
            answer = "probe-of-the-assistant"
            whole = [*messages, {"role": "assistant", "content": answer}]
            try:
                mark = marks[-1]
                forms = [self.fit(conversation, *case).form for case in ((messages, True), (whole, False))]
                # "...probe-1-end<|im_end|>\n<|im_start|>assistant\n" -> what follows the mark
                in_prompt = self.apply(conversation, marked, forms[0], is_prompt=True).rpartition(mark)[2]
                text = self.apply(conversation, [*marked, whole[-1]], forms[1], is_prompt=False)
                # "...probe-1-end<|im_end|>\n<|im_start|>assistant\nprobe-of-the-assistant..." -> what is between
                in_whole = text.rpartition(mark)[2].partition(answer)[0]
                self._turn_starts[shape] = _TurnStart(mark, in_prompt, in_whole)
            except StoppedTemplateError:
                raise
            except Exception:  # whatever a template raises, and a last message without content
                self._turn_starts[shape] = None
        return self._turn_starts[shape]

    def unwritten_start(self) -> str:
        """Return what the template writes before an answer and not behind a prompt; empty where it writes both alike.

        A template that ignores `add_generation_prompt` leaves it to the policy to begin its own turn. White space and
        marks of a thought do not count.
        """
        user, answer = {"role": "user", "content": "probe-of-the-user"}, "probe-of-the-assistant"
        conversation = Conversation([user])
        form = self.fit(conversation, [user], is_prompt=True).form
        try:
            prompt, other = (self.apply(conversation, [user], form, is_prompt=is_prompt) for is_prompt in (True, False))
            whole = self.apply(conversation, [user, {"role": "assistant", "content": answer}], form, is_prompt=False)
        except StoppedTemplateError:
            raise
        except Exception:  # a template for other conversations than these two messages
            return ""
        if prompt != other or not whole.startswith(prompt) or answer not in whole:
            return ""
        return THOUGHT_MARKS.sub("", whole[len(prompt) :].partition(answer)[0]).strip()

    def early_end(self, prompt: Prompt, ids: Sequence[int]) -> str:
        """Return the token inside of a response that ends one, so that nothing can be drawn behind it; else empty.

        Args:
            prompt: what the response is to.
            ids: its tokens, of `response_ids`.
        """
        ends = {int(cast(int, self.tokenizer.eos_token_id))}
        if prompt.conversation is not None and (name := self.turn_end_after(prompt.conversation)):
            ends.add(cast(int, self.tokenizer.convert_tokens_to_ids(name)))
        early = ends.intersection(ids[:-1])
        return str(self.tokenizer.convert_ids_to_tokens(min(early))) if early else ""

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
        # ---- Tokens that end a response: after plain text only EOS ----
        eos_id = int(cast(int, self.tokenizer.eos_token_id))
        conversation = next((prompt.conversation for prompt in prompts if prompt.conversation is not None), None)
        plain_ends, chat_ends = {eos_id}, {eos_id}
        if conversation is not None:
            names = {self.turn_end_after(conversation), *self._call_ends} - {""}
            chat_ends |= {cast(int, self.tokenizer.convert_tokens_to_ids(name)) for name in names}
        # ---- Append EOS where the text has no end of its own ----
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
        if self._turn_end is None:
            tail = self._turn_tail(conversation)
            # the first special token; of several that begin there, the longest
            places = [(tail.find(token), -len(token), token) for token in self._special_tokens if token in tail]
            turn_end = min(places)[2] if places else ""
            if self._tail is None:  # no conversation so far had an answer; the next one may
                return turn_end
            self._turn_end = turn_end
        return self._turn_end

    def _turn_tail(self, conversation: Conversation) -> str:
        """Return all that the template writes after the content of the last message, which is the assistant's."""
        if self._tail is not None:
            return self._tail
        marks = ("probe-of-the-user", "probe-of-the-assistant")
        # A plain exchange shows it for most templates; some need the system message, tools or variables of the data.
        for start in (Conversation([{"role": "user", "content": marks[0]}]), conversation):
            try:
                text = self.render(start, [*start.messages, {"role": "assistant", "content": marks[1]}])
            except DataError:  # a template for other conversations than these two messages
                continue
            self._tail = text.rpartition(marks[1])[2]
            return self._tail
        return ""

    def _special_end(self, text: str) -> str:
        """Return the special token that a text ends with, white space aside; empty where it ends with none."""
        text = text.rstrip()
        return max((token for token in self._special_tokens if text.endswith(token)), key=len, default="")

    @cached_property
    def _special_tokens(self) -> set[str]:
        """Special tokens of the tokenizer, which builds a list of all added tokens whenever it is asked."""
        return special_tokens(self.tokenizer)


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
    for name in kwargs:
        if name in RESERVED_KWARGS:
            raise UserError(f"{key}: {name!r} is set by the data module; give variables of the chat template")
        if _is_unread(name, tokenizer):
            raise UserError(
                f"{key}: the chat template of {tokenizer.name_or_path!r} has no variable {name!r}; correct the name, or"
                " remove it"
            )


def unread_variables(kwargs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the variables of a row that its chat template does not read, and that would say something.

    An empty text or list, 0 and False are what a template takes a variable for that is not set: data sets have them in
    every row that does not use a variable (smoltalk2).
    """
    if "chat_template" in kwargs:  # the row brings the template that reads the others
        return []
    return [name for name, value in kwargs.items() if value and _is_unread(name, tokenizer)]


def _is_unread(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template has no variable of this name."""
    templates: Any = tokenizer.chat_template or ""
    # one template, or {"default": ..., "tool_use": ...}
    text = templates if isinstance(templates, str) else "\n".join(templates.values())
    return name != "chat_template" and not re.search(rf"\b{re.escape(name)}\b", text)
