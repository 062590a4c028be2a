"""Rows with responses: examples to imitate for the supervised stage, pairs for the reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from remax_lightning.data.base import TextDataModule
from remax_lightning.data.collate import Example, PairExample, collate_pairs, collate_supervised
from remax_lightning.data.conversations import Message, conversation_ids, is_empty, read_message
from remax_lightning.data.formatting import (
    PairColumns,
    PairError,
    get_column,
    row_value,
    separate_pair,
    separate_prompt,
    split_last,
    text_response,
)
from remax_lightning.data.options import DEFAULT_LOADING, Count, Limit, LoadingConfig, ValSize
from remax_lightning.data.reading import Row
from remax_lightning.data.records import Outcome, PreparedExamples
from remax_lightning.data.text_files import parse_number
from remax_lightning.errors import DataError, at_least, check_ranges
from remax_lightning.types import PreferenceBatch, SupervisedBatch

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader


# ---- Supervised examples ----


class SFTDataModule(TextDataModule):
    r"""Yields `SupervisedBatch`: prompts made as `PromptDataModule` makes them, and their responses.

    A response becomes the tokens that read as it stands in the file behind its prompt, as the policy writes it. It ends
    with the end-of-sequence token, which is trained. After messages it is what the chat template writes behind the
    prompt, thoughts and calls of tools included, through the token that ends the turn. A thought that the prompt opens
    is closed before the answer, whether the row has one or not. Earlier turns of the assistant belong to the prompt,
    and a response with `weight: 0` is refused.

    Args:
        path: training rows: files, a pattern, a folder or a data set on the hub, or a list of these. JSON lines, JSON,
            CSV, TSV (also compressed), Parquet, Arrow and what else `datasets` reads. Null where `data` has them.
        tokenizer: folder or hub name of the policy's tokenizer.
        val_path: validation rows, of the same kinds. Testing and predicting read them too.
        val_size: rows of `path` to hold out for validation where there is no `val_path`, drawn by `seed`. None holds
            out one row in 20, and 64 at most: enough to see whether a run learns, at little cost.
        prompt_column: column of the prompt: text, or a list of messages for the tokenizer's chat template. Pairs of
            whole conversations in `chosen` and `rejected` have it at their beginning instead.
        response_column: column of the response: text, or messages that end with it; `chosen` of a pair. Messages
            without such a column end with it.
        template: text around a plain prompt, with columns in braces, for instance `"Human:
            {prompt}\n\nAssistant:"`.
        batch_size: examples per pass and device.
        max_prompt_length: longest prompt, in tokens.
        max_response_length: longest response, in tokens, the end-of-sequence token included. Longer ones are
            left out and
            counted: a cut response would teach the policy never to end.
        seed: fixes the order of each epoch and the rows held out.
        loading: rarer choices: overlong prompts, workers, pad token, splits on the hub.
        data: training rows in memory, from Python, in place of `path`: a `datasets.Dataset`, a DataFrame or a list of
            dictionaries.
        val_data: validation rows in memory, in place of `val_path`.

    Raises:
        UserError: if a value is out of its range; the message names its key.
    """

    stage = "supervised"

    def __init__(
        self,
        path: str | list[str] | None = None,
        tokenizer: str | None = None,
        val_path: str | list[str] | None = None,
        val_size: ValSize = None,
        prompt_column: str = "prompt",
        response_column: str = "response",
        template: str | None = None,
        batch_size: Count = 64,
        max_prompt_length: Count = 512,
        max_response_length: Count = 512,
        seed: int = 0,
        loading: LoadingConfig = DEFAULT_LOADING,
        data: Any = None,
        val_data: Any = None,
    ) -> None:
        super().__init__(
            path=path,
            tokenizer=tokenizer,
            val_path=val_path,
            val_size=val_size,
            prompt_column=prompt_column,
            template=template,
            batch_size=batch_size,
            max_prompt_length=max_prompt_length,
            seed=seed,
            loading=loading,
            data=data,
            val_data=val_data,
        )
        check_ranges(SFTDataModule.__init__, locals(), "data")
        self.response_column = response_column
        self.max_response_length = max_response_length
        self.response_ends: set[int] = set()
        """Token ids that responses end with: the end-of-sequence token, and what a chat template ends turns with."""

    def train_dataloader(self) -> StatefulDataLoader[Any]:
        """Shuffled batches, those of an optimizer step together, without the last short step. Resumable at each."""
        # The batches of an optimizer step come together, so that its loss is a mean over the tokens of the whole step.
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        ranks = 1 if self.trainer is None else self.trainer.world_size
        # A data set shorter than a step has no whole step to yield: its batches come one by one.
        short = self._train is not None and len(self._train) < self.batch_size * accumulate * ranks
        alone = short or getattr(self.trainer, "overfit_batches", 0) > 0  # Lightning takes its own order then
        self.num_micro_batches = 1 if alone else accumulate
        return super().train_dataloader()

    def _loader_batch_size(self, num_micro_batches: int) -> int:
        return self.batch_size * num_micro_batches

    def _collate(self, num_micro_batches: int) -> Callable[..., SupervisedBatch]:
        return partial(collate_supervised, pad_id=int(self.tokenizer.pad_token_id), num_micro_batches=num_micro_batches)

    def _make_example(self, row: Row, where: str) -> Example:
        # ---- The response as a message, and the prompt without it ----
        row, message = self._split_response(row, where)
        self._check_response(message, row, where)
        message = read_message(message, where, self.response_column)
        # ---- Texts ----
        prompt = self.formatter.text(row, where)
        return Example([], prompt, row, where, texts=(self.formatter.response_text(prompt, message, where),))

    def _split_response(self, row: Row, where: str) -> tuple[Row, Message]:
        """Return a row without the response at the end of its messages, and the response as a message."""
        # ---- A pair: one of its responses ----
        name, messages = self.response_column, row.get(self.prompt_column)
        marker = self.loading.response_marker
        row, responses = separate_pair(row, where, self.prompt_column, marker, self.template)
        if name in responses:
            return row, responses[name]
        # ---- A column of the response: text, or messages ----
        value = row.get(name)
        if isinstance(value, str):
            return row, text_response(value, messages, where, name, marker)
        if isinstance(value, list):  # the response alone, or the whole conversation that ends with it
            before, message = split_last(value, where, name)
            prompt = row.get(self.prompt_column)
            if before and before != prompt and not (prompt is None or isinstance(prompt, str)):
                raise DataError(
                    f"{where}: the messages in column {name!r} (data.response_column) begin otherwise than those in"
                    f" {self.prompt_column!r}; give the response alone, or the whole conversation"
                )
            return {**row, self.prompt_column: before or prompt, name: row_value(message)}, message
        # ---- No such column: messages that end with the response ----
        if value is None and isinstance(messages, list) and messages:
            last = messages[-1]
            if isinstance(last, dict) and last.get("role") == "assistant":
                return {**row, self.prompt_column: messages[:-1], name: row_value(last)}, last
        value = get_column(row, name, where, key="data.response_column")
        raise DataError(f"{where}: column {name!r} must be text or messages, got {type(value).__name__}")

    def _check_response(self, message: Message, row: Row, where: str) -> None:
        """Refuse a response that says nothing, which the policy would learn, and one that is not to be trained."""
        # {"role": "assistant", "content": ..., "weight": 0}: OpenAI's mark
        if "weight" in message and parse_number(message["weight"]) == 0:
            raise DataError(
                f"{where}: the response in column {self.response_column!r} has weight 0, so it is not to be trained;"
                " remove the row, or set data.loading.on_bad_row: drop"
            )
        if not is_empty(message):
            return
        text = f"{where}: the response in column {self.response_column!r} is empty"
        columns = PairColumns()
        if self.response_column in (columns.chosen, columns.rejected) and columns.rejected in row:
            raise PairError(f"{text}; remove the pair, or set data.loading.on_bad_row: drop")
        raise DataError(f"{text}; remove the row or fill it")

    def _finish_examples(self, examples: list[Example]) -> list[Outcome]:
        prompts, texts = [example.prompt for example in examples], [example.texts[0] for example in examples]
        response_ids = self.formatter.renderer.response_ids(prompts, texts)
        outcomes: list[Outcome] = []
        for example, ids in zip(examples, response_ids, strict=True):
            if token := self.formatter.renderer.early_end(example.prompt, ids):
                outcomes.append(
                    DataError(
                        f"{example.where}: the response in column {self.response_column!r} goes on behind {token!r},"
                        " which ends a response, so that the policy could never write the rest; remove the token, or it"
                        " and all that follows"
                    )
                )
            else:
                outcomes.append(example._replace(response_ids=ids, texts=()))
        return outcomes

    def _examples_prepared(self, examples: PreparedExamples) -> None:
        self.response_ends |= examples.last_ids("response_ids")

    def _limits(self) -> list[Limit]:
        limit = Limit(("response_ids",), self.max_response_length, "data.max_response_length", "drop")
        return [*super()._limits(), limit]


# ---- Preference pairs, as whole conversations ----


TEXT_TEMPLATE = "{prompt}{response}{eos}"
"""The text of a plain pair for the reward model, written as a `ClassifierReward.template`."""

_MIXED = (
    "some prompts are text and some are messages, which a reward model cannot tell apart later; make them alike, or set"
    " data.template where rows have both"
)


class PreferenceDataModule(TextDataModule):
    r"""Yields `PreferenceBatch`: a prompt with a chosen and a rejected response, as whole conversations.

    Plain text becomes prompt, response and end-of-sequence token, and is tokenized as one text, as `ClassifierReward`
    does with the template `"{prompt}{response}{eos}"`; messages go through the tokenizer's chat template, as there
    without one. Three forms are read: text beside a prompt, whole transcripts (hh-rlhf), and lists of messages.

    Args:
        path: training rows: files, a pattern, a folder or a data set on the hub, or a list of these. JSON lines, JSON,
            CSV, TSV (also compressed), Parquet, Arrow and what else `datasets` reads. Null where `data` has them.
        tokenizer: folder or hub name of the reward model's tokenizer.
        val_path: validation rows, of the same kinds. Testing and predicting read them too.
        val_size: rows of `path` to hold out for validation where there is no `val_path`, drawn by `seed`. None holds
            out one row in 20, and 64 at most: enough to see whether a run learns, at little cost.
        prompt_column: column of the prompt: text, or a list of messages. Rows without it are whole conversations,
            whose common beginning is the prompt.
        pair_columns: columns of the two responses, and of a margin.
        template: text around a plain prompt, with columns in braces, for instance `"Human: {prompt}\n\nAssistant:"`.
        batch_size: pairs per pass and device.
        max_prompt_length: longest prompt, in tokens.
        max_length: longest conversation, in tokens; a pair with a longer one is left out and counted, since neither
            prompt nor end can be spared.
        seed: fixes the order of each epoch and the rows held out.
        loading: rarer choices: pairs that cannot be used, overlong prompts, the three stages' shares, pad token.
        data: training rows in memory, from Python, in place of `path`: a `datasets.Dataset`, a DataFrame or a list of
            dictionaries.
        val_data: validation rows in memory, in place of `val_path`.

    Raises:
        UserError: if a value is out of its range; the message names its key.
    """

    stage = "reward_model"
    example_type = PairExample
    needs_eos = False

    def __init__(
        self,
        path: str | list[str] | None = None,
        tokenizer: str | None = None,
        val_path: str | list[str] | None = None,
        val_size: ValSize = None,
        prompt_column: str = "prompt",
        pair_columns: PairColumns = PairColumns(),  # noqa: B008 (frozen)
        template: str | None = None,
        batch_size: Count = 16,
        max_prompt_length: Count = 512,
        max_length: Annotated[int, at_least(2)] = 1024,
        seed: int = 0,
        loading: LoadingConfig = DEFAULT_LOADING,
        data: Any = None,
        val_data: Any = None,
    ) -> None:
        super().__init__(
            path=path,
            tokenizer=tokenizer,
            val_path=val_path,
            val_size=val_size,
            prompt_column=prompt_column,
            template=template,
            batch_size=batch_size,
            max_prompt_length=max_prompt_length,
            seed=seed,
            loading=loading,
            data=data,
            val_data=val_data,
        )
        check_ranges(PreferenceDataModule.__init__, locals(), "data")
        self.pair_columns = pair_columns
        self.max_length = max_length
        self._kinds: set[bool] = set()  # {True} for chats, {False} for plain text; both are refused

    @property
    def reward_template(self) -> str | None:
        """How `ClassifierReward` makes the same text of prompt and response; None for its chat template."""
        return None if True in self._kinds else TEXT_TEMPLATE

    @property
    def reward_chat_template_kwargs(self) -> dict[str, Any] | None:
        """Variables of the chat template that `ClassifierReward` has to set, too; None where it uses none."""
        return self.loading.chat_template_kwargs if True in self._kinds else None

    def _collate(self, num_micro_batches: int) -> Callable[..., PreferenceBatch]:  # noqa: ARG002 - there is one split
        return partial(collate_pairs, pad_id=int(self.tokenizer.pad_token_id))

    def _make_example(self, row: Row, where: str) -> Example:
        # ---- Prompt, and both responses as messages ----
        columns, marker = self.pair_columns, self.loading.response_marker
        row, responses = separate_prompt(row, where, self.prompt_column, columns, marker, self.template)
        row = self._with_margin(row, where)
        chosen, rejected = (
            read_message(response, where, name)
            for response, name in zip(responses, (columns.chosen, columns.rejected), strict=True)
        )
        # ---- Pairs that teach nothing ----
        if chosen == rejected:
            raise PairError(f"{where}: {columns.chosen!r} and {columns.rejected!r} are equal, so neither is preferred")
        if is_empty(chosen):
            raise PairError(f"{where}: the chosen response in column {columns.chosen!r} is empty")
        # ---- Texts: the whole conversation with either response ----
        prompt = self.formatter.text(row, where)
        texts = tuple(self.formatter.conversation_text(prompt, message, where) for message in (chosen, rejected))
        is_chat = prompt.conversation is not None
        if self._kinds and is_chat not in self._kinds:
            raise DataError(f"{where}: {_MIXED}")
        self._kinds.add(is_chat)
        return Example([], prompt, row, where, texts=texts)

    def _finish_examples(self, examples: list[Example]) -> Sequence[Outcome]:
        # Compared once more as tokens: a tokenizer that normalizes may write two texts alike.
        chosen, rejected = (self._token_ids(examples, side) for side in (0, 1))
        columns, outcomes = self.pair_columns, list[Outcome]()
        for example, first, second in zip(examples, chosen, rejected, strict=True):
            if first == second:
                sides = f"{columns.chosen!r} and {columns.rejected!r}"
                outcomes.append(PairError(f"{example.where}: {sides} are the same tokens, so neither is preferred"))
                continue
            margin = 0.0 if columns.margin is None else example.row[columns.margin]
            # the number is set when the record is read
            outcomes.append(PairExample(first, second, margin, example.prompt, example.row, example.where, 0))
        return outcomes

    def _examples_prepared(self, examples: PreparedExamples) -> None:
        self._kinds |= examples.chat_kinds()
        if len(self._kinds) > 1:
            raise DataError(f"{examples.where(0)}: {_MIXED}")

    def _limits(self) -> list[Limit]:
        sides = ("chosen_ids", "rejected_ids")
        return [*super()._limits(), Limit(sides, self.max_length, "data.max_length", self.loading.long_prompts)]

    def _token_ids(self, examples: list[Example], side: int) -> list[list[int]]:
        """Return the token ids of every chosen (side 0) or rejected (1) conversation; plain text ends with EOS."""
        # A chat template writes its own end; plain text ends as TEXT_TEMPLATE says.
        is_chat, eos = True in self._kinds, self.tokenizer.eos_token or ""
        texts = [example.texts[side] for example in examples]
        if not is_chat and eos:
            # a response in the data may spell EOS out
            texts = [text if text.endswith(eos) else text + eos for text in texts]
        return conversation_ids(self.tokenizer, texts, is_chat=is_chat)

    def _with_margin(self, row: Row, where: str) -> Row:
        """Return a row whose margin, where it has one, is a number; files such as CSV have it as text."""
        name = self.pair_columns.margin
        if name is None:
            return row
        value = get_column(row, name, where, key="data.pair_columns.margin")
        margin = parse_number(value)  # CSV has "0.5" as text
        if margin is None:
            raise DataError(f"{where}: column {name!r} must be a number, the margin of the pair, got {value!r}")
        return {**row, name: margin}
