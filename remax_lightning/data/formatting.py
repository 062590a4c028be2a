"""From a row to the text and the token ids of its prompt."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from remax_lightning.data.reading import Row
from remax_lightning.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptText(NamedTuple):
    """A prompt as the policy reads it.

    Args:
        text: the text.
        is_chat: whether a chat template wrote it, special tokens included.
    """

    text: str
    is_chat: bool


class PromptFormatter:
    r"""Makes prompts of rows: plain text, text in a template, or messages in the tokenizer's chat template.

    Args:
        tokenizer: the policy's tokenizer.
        column: column of the prompt: text, or a list of `{"role": ..., "content": ...}`.
        template: text around a plain prompt, for instance `"Human: {prompt}\n\nAssistant:"`. `{prompt}`
            stands for the prompt column whatever its name, and every other column for itself. None uses the
            prompt as it is.

    Raises:
        UserError: if the template cannot be read or names no column.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, column: str = "prompt", template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.column = column
        self.template = template
        if template is not None:
            check_template(template)
        self.special_prefix = special_prefix(tokenizer)

    def text(self, row: Row, where: str) -> PromptText:
        """Return the prompt of `row`.

        Raises:
            DataError: if the column is missing, empty or of another type; the message begins with `where`.
            UserError: if the row holds messages and the tokenizer has no chat template, or `template` is set.
        """
        value = get_column(row, self.column, where, key="data.prompt_column")
        if isinstance(value, list):
            return PromptText(self._chat(value, where), is_chat=True)
        if not isinstance(value, str):
            raise DataError(f"{where}: column {self.column!r} must be text or messages, got {type(value).__name__}")
        if not value.strip():
            raise DataError(f"{where}: the prompt in column {self.column!r} is empty; remove the row or fill it")
        return PromptText(value if self.template is None else self._fill(row, value, where), is_chat=False)

    def encode(self, prompts: Sequence[PromptText]) -> list[list[int]]:
        """Return the token ids of each prompt.

        Plain text gets the special tokens that the tokenizer puts in front, and none behind: an
        end-of-sequence token there would tell the policy that the text is over. A chat template writes its
        own, so nothing is added.
        """
        ids: list[list[int]] = encode_text(self.tokenizer, [prompt.text for prompt in prompts])
        prefix = self.special_prefix
        return [
            tokens if prompt.is_chat or tokens[: len(prefix)] == prefix else prefix + tokens
            for prompt, tokens in zip(prompts, ids, strict=True)
        ]

    def _fill(self, row: Row, prompt: str, where: str) -> str:
        fields = {**row, "prompt": prompt}
        try:
            return _ColumnFormatter().vformat(self.template or "", (), fields)
        except KeyError as error:
            raise DataError(
                f"{where}: data.template names {error.args[0]!r}, but the columns are {_column_list(row)}"
            ) from error
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: data.template cannot be filled with this row ({error})") from error

    def _chat(self, messages: list[Any], where: str) -> str:
        from jinja2 import TemplateError

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
        _check_messages(messages, f"{where}: column {self.column!r}")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise DataError(f"{where}: the chat template refuses these messages ({error})") from error
        return str(text)


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
    if not texts:
        return []
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,  # length is judged here, by the limits of the configuration
    )
    return [list(ids) for ids in encoding["input_ids"]]


def check_template(template: str) -> None:
    """Check that a prompt template can be read and has a field.

    Raises:
        UserError: if not; the message says how to write literal braces.
    """
    hint = "write column names in braces, and {{ }} for braces that shall stay"
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"data.template cannot be read ({error}), got {template!r}; {hint}") from error
    if not fields:
        raise UserError(f"data.template has no field, so all prompts would be alike, got {template!r}; {hint}")
    if "" in fields:
        raise UserError(f"data.template has a field without a name, got {template!r}; {hint}")


class _ColumnFormatter(string.Formatter):
    """Takes a field for the name of a column as it stands, dots and brackets included."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:  # noqa: ARG002 - the signature is given
        return kwargs[field_name], field_name


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts in front of a text, found by looking at one."""
    plain = encode_text(tokenizer, ["a"])[0]
    full = list(tokenizer("a", return_attention_mask=False)["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def _check_messages(messages: list[Any], what: str) -> None:
    if not messages:
        raise DataError(f"{what} holds no message; remove the row or fill it")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(part), str) for part in ("role", "content")):
            raise DataError(f'{what}, message {position}: expected {{"role": text, "content": text}}, got {message!r}')
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{what} ends with a message of the assistant; a prompt ends before it, so remove that message")


def _column_list(row: Row) -> str:
    return ", ".join(repr(name) for name in row) or "none"
