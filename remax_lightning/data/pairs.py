"""Read preference pairs in the formats that data sets use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from remax_lightning.data.conversations import Message, content_text, is_plain
from remax_lightning.data.formatting import get_column
from remax_lightning.data.reading import Row
from remax_lightning.errors import DataError


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
        prompt = prompt if not first or (template is not None and isinstance(prompt, str)) else first
    else:
        if prompt is None:
            # whole transcripts, as in hh-rlhf; beside a prompt the texts are the responses
            prompt, chosen, rejected = _split_transcripts(chosen, rejected, marker, where, prompt_column)
        responses = (as_response(chosen), as_response(rejected))
    # ---- The row, with prompt and responses apart ----
    if prompt is None:
        get_column(row, prompt_column, where, key="data.prompt_column")  # says which columns there are
    values = dict(zip((columns.chosen, columns.rejected), map(row_value, responses), strict=True))
    return {**row, prompt_column: prompt, **values}, responses


def row_value(message: Message) -> str | list[Message]:
    """Return a response in the form in which rewards and evaluations read it from a row.

    It is text if the message has only content; otherwise a list with the message, which keeps thoughts and tool calls.
    """
    return content_text(message) if is_plain(message) else [message]


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
            f" {last!r}"
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
