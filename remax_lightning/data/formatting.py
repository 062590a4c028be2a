"""Turn a row into the text and the token ids of its prompt.

Preference pairs are read in the formats that data sets use.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from remax_lightning.data.chat_templates import ChatRenderer, check_template_kwargs, unread_variables
from remax_lightning.data.conversations import (
    Message,
    content_text,
    function_name,
    is_empty,
    is_plain,
    read_conversation,
)
from remax_lightning.data.reading import Row
from remax_lightning.data.tokenizers import check_characters, encode_batch
from remax_lightning.errors import DataError, UserError
from remax_lightning.files import load_json
from remax_lightning.types import Conversation, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# '[{"role": "user", ...' as JSON, or "[{'content': ..." as `str` of Python; '[{"from": "human", "value": ...' of
# ShareGPT, and '{"name": "Ann", "role": "user", "content": ...', which have to name a speaker and have both keys
_SPEAKER = r"""["'](?:system|developer|user|human|assistant|gpt|chatgpt|bot|tool|function|observation)["']"""
_MESSAGES_AS_TEXT = re.compile(
    r"""\s*\[\s*\{\s*["'](role|content)["']\s*:"""
    rf"""|(?=\s*(?:array\()?\[?\s*\{{\s*["'])(?:(?=.*["']role["']\s*:\s*{_SPEAKER})(?=.*["']content["']\s*:)"""
    rf"""|(?=.*["']from["']\s*:\s*{_SPEAKER})(?=.*["']value["']\s*:))""",
    re.DOTALL,
)
"""A list of messages that something has printed, in JSON or as Python does."""


class PromptFormatter:
    r"""Makes prompts from rows: plain text, text in a template, or messages in the tokenizer's chat template.

    It also makes the response to imitate, and the whole conversation of a pair.

    Args:
        tokenizer: the policy's tokenizer.
        column: column of the prompt: text, or a list of `{"role": ..., "content": ...}`.
        template: text around a plain prompt, for instance `"Human: {prompt}\n\nAssistant:"`. `{prompt}`
            stands for the prompt column whatever its name, and every other column for itself. None uses the
            prompt as it is.
        template_kwargs: variables of the chat template; those of a row's column `chat_template_kwargs` come first.

    Raises:
        UserError: if the template cannot be read or names no column, or the chat template has no such variable.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        column: str = "prompt",
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.column = column
        self.template = template
        if template is not None:
            check_template(template)
        self.special_prefix = special_prefix(tokenizer)
        self.template_kwargs = dict(template_kwargs or {})
        if self.template_kwargs:
            check_template_kwargs(self.template_kwargs, tokenizer, "data.loading.chat_template_kwargs")

    @cached_property
    def renderer(self) -> ChatRenderer:
        """What renders conversations; prompts of plain text need none."""
        return ChatRenderer(self.tokenizer)

    def text(self, row: Row, where: str) -> Prompt:
        """Return the prompt of `row`, with its conversation where it is one.

        Raises:
            DataError: if the column is missing, empty or of another type, if the chat template refuses or leaves out a
                message, or if the text is none; the message begins with `where`.
            UserError: if the row holds messages and the tokenizer has no chat template, or `template` is set.
        """
        # ---- Messages, or text ----
        value = get_column(row, self.column, where, key="data.prompt_column")
        if isinstance(value, list):
            conversation = self._conversation(row, value, where)
            prompt = Prompt(self.renderer.prompt(conversation), conversation)
        elif not isinstance(value, str):
            raise DataError(f"{where}: column {self.column!r} must be text or messages, got {type(value).__name__}")
        elif not value.strip():
            raise DataError(f"{where}: the prompt in column {self.column!r} is empty; remove the row or fill it")
        else:
            check_is_no_printed_list(value, where, self.column)
            prompt = Prompt(value if self.template is None else self._fill(row, value, where))
        self._check(prompt, row, where)
        return prompt

    def response_text(self, prompt: Prompt, message: Message, where: str) -> str:
        """Return the text to imitate after a prompt (`ChatRenderer.response`).

        Raises:
            DataError: as there, or if the text is none; the message begins with `where`.
        """
        _check_is_text(prompt, message, where)
        text = self.renderer.response(prompt, message)
        check_characters(text, f"{where}: the response")
        return text

    def conversation_text(self, prompt: Prompt, message: Message, where: str) -> str:
        """Return prompt and response as one text, as a reward model reads it.

        Raises:
            DataError: as in `response`.
        """
        _check_is_text(prompt, message, where)
        if prompt.conversation is None:
            text = prompt + content_text(message)
        else:
            text = self.renderer.whole(prompt.conversation, message)
        check_characters(text, f"{where}: the response")
        return text

    def _check(self, prompt: Prompt, row: Row, where: str) -> None:
        try:
            # e.g. of JSON inside of JSON: no column shows it
            check_characters(prompt, f"{where}: the prompt, as it is rendered,")
        except DataError:
            for name, value in row.items():  # name the column; the prompt may be made of several
                check_characters(_texts(value), f"{where}: column {name!r}")
            raise

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the token ids of each prompt.

        Plain text gets the special tokens that the tokenizer puts in front, and none behind: an
        end-of-sequence token there would tell the policy that the text is over. A chat template writes its
        own, so nothing is added.
        """
        # B lists of different lengths
        ids: list[list[int]] = encode_text(self.tokenizer, prompts)
        # A template of the user's may spell the tokens out: "<s>{prompt}" must not become "<s><s>...".
        prefix = self.special_prefix
        return [
            tokens if prompt.conversation is not None or tokens[: len(prefix)] == prefix else prefix + tokens
            for prompt, tokens in zip(prompts, ids, strict=True)
        ]

    def _fill(self, row: Row, prompt: str, where: str) -> str:
        # {prompt} is the prompt column, whatever its name
        fields = {**row, "prompt": prompt}
        try:
            return _ColumnFormatter().vformat(self.template or "", (), fields)
        except KeyError as error:
            raise DataError(
                f"{where}: data.template names {error.args[0]!r}, but the columns are {_column_list(row)}"
            ) from error
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: data.template cannot be filled with this row ({error})") from error

    def _conversation(self, row: Row, messages: list[Any], where: str) -> Conversation:
        if self.template is not None:
            raise UserError(
                f"data.template is for plain prompts, but {where} has messages in column {self.column!r}; "
                "remove data.template, the tokenizer's chat template is used"
            )
        if not self.tokenizer.chat_template:
            raise UserError(
                f"data.tokenizer: {self.tokenizer.name_or_path!r} has no chat template, but {where} has messages "
                f"in column {self.column!r}; save the tokenizer with one, or give plain text"
            )
        if row.get("functions") and not row.get("tools") and all(map(function_name, _listed(row["functions"]))):
            raise DataError(
                f"{where}: column 'functions' holds definitions, and templates read them in a column 'tools': write"
                ' each as {"type": "function", "function": {...}} there, or remove the column'
            )
        conversation = read_conversation(
            messages,
            where,
            self.column,
            tools=row.get("tools"),
            template_kwargs=row.get("chat_template_kwargs"),
        )
        if conversation.messages[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: column {self.column!r} ends with a message of the assistant; a prompt ends before it, so"
                " remove that message"
            )
        if conversation.messages[-1]["role"] == "user" and is_empty(conversation.messages[-1]):
            raise DataError(f"{where}: the last message in column {self.column!r} is empty; remove the row or fill it")
        for name in unread_variables(conversation.template_kwargs, self.tokenizer):
            raise DataError(
                f"{where}: column 'chat_template_kwargs' sets {name!r}, which the chat template of"
                f" {self.tokenizer.name_or_path!r} does not read; remove it, or take a tokenizer whose template does"
            )
        if self.template_kwargs:
            merged = self.template_kwargs | conversation.template_kwargs  # a row's own come last, and win
            conversation = conversation._replace(template_kwargs=merged)
        return conversation


def _listed(value: Any) -> list[Any]:
    """Return a list, or one of JSON; an entry without a meaning where it is something else."""
    with suppress(ValueError):
        value = load_json(value) if isinstance(value, str) else value
    return value if isinstance(value, list) else [None]


def _texts(value: Any) -> str:
    """Return all texts inside of a value, for a search."""
    if isinstance(value, dict):
        value = list(value.values())
    return "\n".join(map(_texts, value)) if isinstance(value, list) else value if isinstance(value, str) else ""


def get_column(row: Row, name: str, where: str, key: str) -> Any:
    """Return column `name` of `row`.

    Raises:
        DataError: if there is none; the message names `key` and the columns that exist.
    """
    if name not in row:
        raise DataError(f"{where}: there is no column {name!r} ({key}); the columns are {_column_list(row)}")
    return row[name]


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens but those that the text spells out."""
    return encode_batch(tokenizer, texts)


def check_template(template: str) -> None:
    """Check that a prompt template can be read and has a field.

    Raises:
        UserError: if not; the message says how to write literal braces.
    """
    hint = "write column names in braces, and {{ }} for braces that shall stay"
    try:
        # "Q: {question}\nA: {{}}" -> ["question"]
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"data.template cannot be read ({error}), got {template!r}; {hint}") from error
    if not fields:
        raise UserError(f"data.template has no field, so all prompts would be alike, got {template!r}; {hint}")
    check_characters(template, "data.template")
    if "" in fields:
        raise UserError(f"data.template has a field without a name, got {template!r}; {hint}")


class _ColumnFormatter(string.Formatter):
    """Takes a field for the name of a column as it stands, dots and brackets included."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:  # noqa: ARG002 - the signature is given
        # The base class would read {meta.answer} as an attribute, and {a[0]} as an item.
        value = kwargs[field_name]
        if isinstance(value, Collection) and not isinstance(value, str) and getattr(value, "ndim", None) != 0:
            raise TypeError(
                f"column {field_name!r} holds a {type(value).__name__}, which would stand there as Python prints it;"
                " make it text"
            )
        # null is empty, as it is in CSV, and not the word None
        return "" if _is_null(value) else value, field_name


def _is_null(value: Any) -> bool:
    """Whether a value stands for none: None, or NaN of any type, which differs from itself."""
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA compares to itself
        return True


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts in front of a text, found by looking at one."""
    # BERT: plain [1037], full [101, 1037, 102] with CLS and SEP -> [101]
    plain = encode_text(tokenizer, ["a"])[0]
    full = list(tokenizer("a", return_attention_mask=False)["input_ids"])
    # what stands before the plain tokens
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def _column_list(row: Row) -> str:
    return ", ".join(repr(name) for name in row) or "none"


# ---- Preference pairs ----


class PairError(DataError):
    """A readable pair that cannot be trained on; `data.loading.on_bad_row` decides what happens to it."""


@dataclass(frozen=True)
class PairColumns:
    """The columns of the two responses of a pair.

    Args:
        chosen: column of the preferred one: text, or a list of messages that ends with it.
        rejected: column of the other one, of the same kind.
        margin: column with the required difference between the two scores, a number; None for 0.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    margin: str | None = None


def separate_prompt(
    row: Row, where: str, prompt_column: str, columns: PairColumns, marker: str, template: str | None
) -> tuple[Row, tuple[Message, Message]]:
    """Return a row with separate prompt and responses, and the responses as messages of the assistant.

    Three forms are read. Text beside a prompt stays as it is. Text without a prompt is a pair of whole transcripts,
    whose prompt reaches through the last `marker`. Lists of messages end with a response of the assistant; what stands
    before it is the prompt, unless nothing does or a template wants the prompt as text: then it is that of the prompt's
    own column. In the row the responses are text, and messages where that would lose a thought or a call of a
    tool (`row_value`).

    Args:
        row: the raw row.
        where: where it stands, for messages.
        prompt_column: column of the prompt, whether the row has it or gets it.
        columns: columns of the responses.
        marker: what stands before a response in a transcript.
        template: text around a plain prompt.

    Raises:
        PairError: if the two do not share a prompt.
        DataError: if a column is missing or holds something else.
    """
    # ---- Both text, or both messages ----
    chosen = get_column(row, columns.chosen, where, key="data.pair_columns.chosen")
    rejected = get_column(row, columns.rejected, where, key="data.pair_columns.rejected")
    for name, value in ((columns.chosen, chosen), (columns.rejected, rejected)):
        if not isinstance(value, str | list):
            raise DataError(f"{where}: column {name!r} must be text or messages, got {type(value).__name__}")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise DataError(
            f"{where}: columns {columns.chosen!r} and {columns.rejected!r} must both be text or both be messages"
        )
    prompt = row.get(prompt_column)
    if isinstance(chosen, list):
        # [{"role": "user", ...}, {"role": "assistant", ...}]: the prompt is what stands before the response
        first, first_response = split_last(chosen, where, columns.chosen)
        second, second_response = split_last(rejected, where, columns.rejected)
        if first != second:
            raise PairError(
                f"{where}: the messages in {columns.chosen!r} and {columns.rejected!r} do not share a prompt: they"
                " differ before their last ones"
            )
        responses = (first_response, second_response)
        if first and prompt is not None:
            _check_same_prompt(prompt, first, f"{where}: column {prompt_column!r}", columns.chosen, template)
        prompt = prompt if not first or (template is not None and isinstance(prompt, str)) else first
    else:
        if prompt is None:
            # whole transcripts, as in hh-rlhf; beside a prompt the texts are the responses
            prompt, chosen, rejected = _split_transcripts(chosen, rejected, marker, where, prompt_column)
        responses = (
            text_response(chosen, prompt, where, columns.chosen, marker),
            text_response(rejected, prompt, where, columns.rejected, marker),
        )
    # ---- The row, with prompt and responses apart ----
    if prompt is None:
        get_column(row, prompt_column, where, key="data.prompt_column")  # says which columns there are
    values = dict(zip((columns.chosen, columns.rejected), map(row_value, responses), strict=True))
    return {**row, prompt_column: prompt, **values}, responses


def _check_same_prompt(prompt: Any, first: list[Any], what: str, name: str, template: str | None) -> None:
    """Refuse a prompt of its own that is not what stands before the responses of a pair: one of them would be lost."""
    advice = f"make them alike, or remove the column of the prompt, as {name!r} has the whole conversation"
    # ---- Messages: those of the pair, or the last of them ----
    if isinstance(prompt, list):
        # files with columns have null fields, which may differ
        own, before = ([(m["role"], content_text(m).strip()) for m in of if isinstance(m, Mapping) and "role" in m]
                       for of in (prompt, first))  # fmt: skip
        if own and own != before[-len(own) :]:
            raise DataError(f"{what} has other messages than those before the response in {name!r}; {advice}")
        return
    # ---- Text, which a template writes in place of the messages ----
    texts = ["".join(content_text(message).split()) for message in first if isinstance(message, Mapping)]
    if template is not None and texts != ["".join(str(prompt).split())]:
        raise DataError(
            f"{what} is written into data.template, so what else stands before the response in {name!r} would be lost;"
            " remove data.template, and the chat template writes all of it"
        )


def row_value(message: Message) -> str | list[Message]:
    """Return a response in the form in which rewards and evaluations read it from a row.

    It is text if the message has only content; otherwise a list with the message, which keeps thoughts and tool calls.
    """
    return content_text(message) if is_plain(message) else [message]


def check_is_no_printed_list(text: str, where: str, column: str) -> None:
    """Refuse messages that something has printed.

    Raises:
        DataError: if the text is a list of messages.
    """
    if _MESSAGES_AS_TEXT.match(text):
        raise DataError(
            f"{where}: column {column!r} holds messages written as text, as CSV does; save them as a list, in"
            " JSON lines or Parquet, or the policy would read brackets and quotes"
        )


def _check_is_text(prompt: Prompt, message: Message, where: str) -> None:
    """Refuse a response with more than text behind a prompt that is text: nothing says how the rest is written."""
    if prompt.conversation is None and not is_plain(message):
        fields = [name for name in message if name not in ("role", "content") and message[name]]
        raise DataError(
            f"{where}: the response has {' and '.join(map(repr, fields))}, for which there is no place behind a prompt"
            " that is plain text; give the prompt as messages, or write all of the response into its content"
        )


def text_response(text: str, prompt: Any, where: str, column: str, marker: str) -> Message:
    """Return a response that is text as a message.

    Args:
        text: the response.
        prompt: what the row has in the column of the prompt.
        where: where the row stands, for messages.
        column: of the response, for messages.
        marker: what stands before a response in a transcript.

    Raises:
        DataError: if it is messages that something has printed, or a transcript that repeats the prompt.
    """
    check_is_no_printed_list(text, where, column)
    if isinstance(prompt, str) and marker in prompt and text.startswith(prompt):
        raise DataError(
            f"{where}: column {column!r} begins with the whole prompt, which would stand there twice; give the response"
            " alone, or remove the column of the prompt"
        )
    return as_response(text)


def as_response(text: str) -> Message:
    """Return text as a message of the assistant."""
    return {"role": "assistant", "content": text}


def split_last(messages: list[Any], where: str, name: str) -> tuple[list[Any], Message]:
    """Return the messages before the last one, and that one, which has to be the assistant's.

    Args:
        messages: of a row.
        where: where the row stands, for messages.
        name: their column, for messages.

    Raises:
        DataError: if the last one is not.
    """
    last = messages[-1] if messages else None
    # A list that ends with the user's message has no response.
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise DataError(
            f'{where}: the messages in column {name!r} must end with {{"role": "assistant", "content": text}}, got'
            f" {last!r:.200}"
        )
    return messages[:-1], last


def _split_transcripts(chosen: str, rejected: str, marker: str, where: str, prompt_column: str) -> tuple[str, str, str]:
    # "\n\nHuman: Hi\n\nAssistant: Hello!" -> prompt "\n\nHuman: Hi\n\nAssistant:", response " Hello!"
    ends = [text.rfind(marker) + len(marker) if marker in text else 0 for text in (chosen, rejected)]
    prompt = chosen[: ends[0]]
    if 0 in ends or prompt != rejected[: ends[1]]:
        raise PairError(
            f"{where}: there is no column {prompt_column!r} (data.prompt_column), and the transcripts do not share a"
            f" prompt: they differ before the last {marker!r} (data.loading.response_marker), or have none"
        )
    if not prompt.removesuffix(marker).strip():
        raise PairError(f"{where}: the prompt is empty: nothing stands before {marker!r}")
    return prompt, chosen[ends[0] :], rejected[ends[1] :]


def separate_pair(
    row: Row, where: str, prompt_column: str, marker: str, template: str | None
) -> tuple[Row, dict[str, Message]]:
    """Return a row with a separate prompt, and the responses by column if the row is a pair of conversations.

    Those have the prompt at their beginning. A row with a prompt of its own needs no pair, so that what is missing
    there does not matter.

    The arguments are those of `separate_prompt`.

    Raises:
        PairError: if the two do not share a prompt.
    """
    columns = PairColumns()  # the default names: "chosen", "rejected"
    chosen, rejected = row.get(columns.chosen), row.get(columns.rejected)
    # {"chosen": ..., "rejected": ...}: the prompt is their common beginning.
    # {"prompt": ..., "chosen": [...], "rejected": [...]}: the lists may begin with the prompt's messages.
    if row.get(prompt_column) is None:
        is_pair = columns.chosen in row and columns.rejected in row
    else:
        is_pair = isinstance(chosen, list) and isinstance(rejected, list) and bool(chosen) and bool(rejected)
    if not is_pair:
        return row, {}
    row, responses = separate_prompt(row, where, prompt_column, columns, marker, template)
    return row, dict(zip((columns.chosen, columns.rejected), responses, strict=True))
