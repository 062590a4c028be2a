"""The base class of the data modules: it reads, formats, filters, splits and loads rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.data.collate import Example, ExampleDataset, MicroBatchSampler, PairExample
from remax_lightning.data.formatting import PromptFormatter, check_template, separate_pair
from remax_lightning.data.options import (
    Count,
    Limit,
    LoadingConfig,
    Stage,
    ValSize,
    as_text,
    check_sources,
    check_stage_split,
    check_val_rows,
    hold_out,
    report_left_out,
    select_stage_rows,
    warn_of_unseen_columns,
    within_limit,
)
from remax_lightning.data.preparation import Recipe, preparation_key, prepare, settings_of_rows, source_files
from remax_lightning.data.reading import Row, Rows, is_on_hub, load_hub, read_rows, rows_in_memory
from remax_lightning.data.records import Outcome, PreparedExamples
from remax_lightning.data.scorable import ChecksRows, check_examples, scorable_examples
from remax_lightning.data.tokenizers import load_tokenizer
from remax_lightning.errors import DataError, UserError, check_ranges
from remax_lightning.types import Prompt

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from transformers import PreTrainedTokenizerBase


class TextDataModule(LightningDataModule, ABC):
    """Reads rows, turns them into prompts and yields them in an order that the seed determines.

    A subclass implements `_collate`, which makes batches of examples, and may override `_finish_examples`.
    The subclasses describe the arguments.
    """

    stage: ClassVar[Stage | None] = None
    """The stage whose share of the rows it reads if `loading.stage_split` is set."""
    example_type: ClassVar[type[Example | PairExample]] = Example
    """The type that a row is converted to."""
    needs_eos: ClassVar[bool] = True
    """Whether the tokenizer must have an end-of-sequence token."""

    def __init__(
        self,
        path: str | list[str] | None,
        tokenizer: str | None,
        val_path: str | list[str] | None,
        val_size: ValSize,
        prompt_column: str,
        template: str | None,
        batch_size: Count,
        max_prompt_length: Count,
        seed: int,
        loading: LoadingConfig,
        data: Any = None,
        val_data: Any = None,
    ) -> None:
        super().__init__()
        # ---- Refuse options that contradict each other, before a tokenizer or a row is read ----
        check_sources(path, tokenizer, data, val_path, val_data)
        check_ranges(TextDataModule.__init__, locals(), "data")
        if val_size and not (val_path is None and val_data is None):
            other = "val_data" if val_path is None else "val_path"
            raise UserError(f"data.val_size must be 0 beside data.{other}, got {val_size}; remove one")
        if template is not None:
            check_template(template)
        check_stage_split(loading.stage_split, self.stage, type(self).__name__)
        self.path, self.data = as_text(path), data
        self.tokenizer_path = str(tokenizer)
        self.tokenizer_key = "data.tokenizer"
        """What messages call the path; the command line sets the key that it follows from."""
        self.val_path, self.val_data = as_text(val_path), val_data
        self.val_size = val_size
        self.prompt_column, self.template = prompt_column, template
        self.batch_size = batch_size
        self.max_prompt_length = max_prompt_length
        self.seed = seed
        self.loading = loading
        self.num_micro_batches = 1  # `PromptDataModule` and `SFTDataModule` set it
        self.looks_ahead = False
        """Whether training batches hold the next one as well; `ReMaxModule` sets it where an engine writes ahead."""
        self.num_rows = self.num_left_out = 0
        """Rows that were read, and those of them that are too long or cannot be used."""
        # Loaded or read when first needed: making the object must stay cheap, `remax plan` only reads its options.
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._train: ExampleDataset | None = None
        self._val: ExampleDataset | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                self.tokenizer_path,
                trust_remote_code=self.loading.trust_remote_code,
                revision=self.loading.tokenizer_revision,
                pad_token=self.loading.pad_token,
                needs_eos=self.needs_eos,
                key=self.tokenizer_key,
            )
        return self._tokenizer

    def prompt_forms(self) -> list[Prompt]:
        """Return one prompt for each form of conversation in the rows; call it after `setup`.

        A form is the sequence of roles and kinds of content. A chat template treats all prompts of one form alike.
        """
        forms: dict[str, Prompt] = {}  # form -> the first prompt that has it
        for dataset in (self._train, self._val):
            if dataset is not None:
                examples = cast(PreparedExamples, dataset.examples)
                for form, index in examples.first_of_each_form().items():
                    forms.setdefault(form, examples[index].prompt)
        return list(forms.values())

    def check_scorable(self, reward: ChecksRows, *, train: bool = True) -> None:
        """Let a reward look at the rows that it will score; call it after `setup`.

        What `loading.on_bad_row` says of rows that cannot be used holds for those that it refuses, too.

        Args:
            reward: the reward.
            train: whether it will score the training rows.

        Raises:
            UserError: for the first row that it refuses, or if too few are left.
        """
        drop = self.loading.on_bad_row == "drop"
        for name in ("_train", "_val") if train else ("_val",):
            dataset: ExampleDataset | None = getattr(self, name)
            if dataset is None or not reward.checks_rows:
                continue
            examples = cast(PreparedExamples, dataset.examples)
            if not drop:
                check_examples(examples, reward)
                continue
            scorable = scorable_examples(examples, reward)
            self.num_left_out += len(examples) - len(scorable)
            setattr(self, name, ExampleDataset(scorable))
        if self._train is not None:
            self._check_size(self._train)

    def turn_end_id(self) -> int | None:
        """Return the token that the chat template ends a turn with; None where it writes none, or no row is a chat."""
        conversations = (prompt.conversation for prompt in self.prompt_forms())
        conversation = next((item for item in conversations if item is not None), None)
        if conversation is None:
            return None
        turn_end = self.formatter.renderer.turn_end_after(conversation)
        return int(cast(int, self.tokenizer.convert_tokens_to_ids(turn_end))) if turn_end else None

    def prepare_data(self) -> None:
        """Download tokenizer and data sets from the hub, in one process per machine."""
        # ---- Download: tokenizer and data sets on the hub ----
        _ = self.tokenizer
        for path, split, key in (  # a local path downloads nothing
            (self.path, self.loading.train_split, "data.path"),
            (self.val_path, self.loading.val_split, "data.val_path"),
        ):
            for item in [path] if isinstance(path, str) else path or []:
                if is_on_hub(item):
                    load_hub(item, split=split, name=self.loading.hub_name, key=key)
        # ---- Fill the cache of prepared rows ----
        if self.trainer is not None and self.trainer.world_size > 1 and self.loading.cache:
            # Once for all processes of the machine, which find it prepared; what is wrong is raised by all of them.
            with suppress(UserError):
                for rows in self._rows_of_stage(self.trainer.state.fn):
                    self._prepare(rows)

    def setup(self, stage: str | None = None) -> None:
        """Read, format and tokenize the rows that `stage` needs; each file is read once.

        Raises:
            DataError: if a file or row cannot be used, or there are too few rows.
            UserError: if the stage needs validation rows and there is no source of them.
        """
        # Validation rows without a source of their own are held out of the training rows, so every stage reads these.
        if self._train is None and (stage in (None, "fit") or not self._has_val_source):
            check_val_rows(stage, self._has_val_source or self.val_size != 0)
            self._setup_train()
            check_val_rows(stage, self._has_val_source or self._val is not None)
        if self._val is None and self._has_val_source:
            rows = self._read(self.val_path, self.val_data, self.loading.val_split, "val_")
            self._val = self._dataset(rows, rows.dropped)

    def fingerprint(self) -> str:
        """Return a hash of the training rows, in their order, without those left out; `setup` must have run.

        It depends only on the content of the rows: it changes with a row, but not if a file is moved or compressed.
        Tokenizer and template do not matter.
        """
        if self._train is None:
            raise RuntimeError(f"{type(self).__name__}.setup must run before its fingerprint is asked for")
        return cast(PreparedExamples, self._train.examples).fingerprint()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the fingerprint of the training rows."""
        # The position in the epoch is not here: `StatefulDataLoader` saves it.
        return {} if self._train is None else {"fingerprint": self.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if the training rows differ from those of the checkpoint."""
        saved = state_dict.get("fingerprint")
        if self._train is not None and saved is not None and saved != self.fingerprint():
            source = "data" if self.path is None else f"data.path ({self.path})"
            rank_zero_warn(
                f"{source} does not hold the rows of the checkpoint: the run goes on at the same position in other"
                " rows, so some are trained on twice in an epoch and some not at all. To repeat the run exactly, resume"
                " with the old rows; to train on the new ones from their beginning, start from the exported policy"
                " (model.policy.path)."
            )

    def train_dataloader(self) -> StatefulDataLoader[Any]:
        """Shuffled batches, without the last short one. Resumable at every batch.

        Raises:
            UserError: if Lightning would replace the sampler that yields the micro-batches.
        """
        overfit = getattr(self.trainer, "overfit_batches", 0)  # set on the instance, unknown to its type
        if self.num_micro_batches > 1 and overfit > 0:
            raise UserError(
                "data.micro_batch_size must equal data.batch_size where trainer.overfit_batches is set: "
                f"Lightning then takes the batches in its own order; got {self.num_micro_batches} parts per batch"
            )
        if self.looks_ahead and overfit > 0:
            raise UserError(
                "model.rollout.init_args.ahead must be 0 where trainer.overfit_batches is set: Lightning then takes the"
                " batches in its own order, and the next one is not known"
            )
        return self._loader(self._train, shuffle=True)

    def val_dataloader(self) -> StatefulDataLoader[Any] | list[Any]:
        """All validation rows in their order; an empty list, so no validation, where there are none."""
        return [] if self._val is None else self._loader(self._val, shuffle=False)

    def test_dataloader(self) -> StatefulDataLoader[Any] | list[Any]:
        """The validation rows."""
        return self.val_dataloader()

    def predict_dataloader(self) -> StatefulDataLoader[Any] | list[Any]:
        """The validation rows."""
        return self.val_dataloader()

    @abstractmethod
    def _collate(self, num_micro_batches: int) -> Callable[..., Any]:
        """Return the function that makes a batch of examples."""

    @cached_property
    def formatter(self) -> PromptFormatter:
        """The formatter that makes prompts and responses from rows."""
        return PromptFormatter(self.tokenizer, self.prompt_column, self.template, self.loading.chat_template_kwargs)

    def _make_example(self, row: Row, where: str) -> Example:
        """Return the example of one row, without token ids.

        Raises:
            DataError: if the row cannot be used; a `PairError` if it is a pair that teaches nothing.
        """
        row, _ = separate_pair(row, where, self.prompt_column, self.loading.response_marker, self.template)
        return Example([], self.formatter.text(row, where), row, where)

    def _finish_examples(self, examples: list[Example]) -> Sequence[Outcome]:
        """Add to a batch of examples whose prompts have their token ids.

        A subclass returns one outcome for each: an example, or a `DataError` where its row turns out to be of no use.
        """
        return examples

    def _examples_prepared(self, examples: PreparedExamples) -> None:
        """Hook for subclasses that need a figure over all examples, such as the kinds of their prompts."""

    def _limits(self) -> list[Limit]:
        """Return the limits in tokens that an example has to be within, in the order in which they are applied."""
        return [Limit(("prompt",), self.max_prompt_length, "data.max_prompt_length", self.loading.long_prompts)]

    @property
    def _has_val_source(self) -> bool:
        return self.val_path is not None or self.val_data is not None

    def _read(self, path: str | list[str] | None, data: Any, split: str, which: Literal["", "val_"] = "") -> Rows:
        if path is None:
            return rows_in_memory(data, split=split, key=f"{which}data", on_bad_row=self.loading.on_bad_row)
        key = f"data.{which}path"
        return read_rows(path, split=split, name=self.loading.hub_name, key=key, on_bad_row=self.loading.on_bad_row)

    def _rows_of_stage(self, stage: str | None) -> Iterator[Rows]:
        """Yield the rows that `setup` will prepare."""
        if stage in (None, "fit") or not self._has_val_source:
            train, held_out, _ = self._train_rows()
            yield from (rows for rows in (held_out, train) if rows is not None)
        if self._has_val_source:
            yield self._read(self.val_path, self.val_data, self.loading.val_split, "val_")

    def _setup_train(self) -> None:
        # `unreadable` counts rows of the whole source: it is reported once, with the training rows.
        rows, held_out, unreadable = self._train_rows()
        if held_out is not None:
            self._val = self._dataset(held_out)
        train = self._dataset(rows, unreadable)
        self._check_size(train)
        self._train = train

    def _check_size(self, train: ExampleDataset) -> None:
        """Refuse training rows that fill no batch."""
        world_size = 1 if self.trainer is None else self.trainer.world_size
        needed = self.batch_size * world_size
        if len(train) < needed:
            source = cast(PreparedExamples, train.examples).rows.source
            raise DataError(
                f"data.batch_size={self.batch_size} on {world_size} process(es) needs {needed} training rows, but "
                f"{'data' if self.path is None else 'data.path'} ({source}) has {len(train)} to use; lower "
                "data.batch_size or give more rows"
            )

    def _train_rows(self) -> tuple[Rows, Rows | None, Counter[str]]:
        """Return the rows to train on, those held out for validation, and how many could not be read, by reason."""
        # ---- The rows of this stage ----
        rows = self._read(self.path, self.data, self.loading.train_split)
        unreadable = rows.dropped
        if self.loading.stage_split is not None and self.stage is not None:
            rows = select_stage_rows(rows, self.loading.stage_split, self.stage, self.loading.stage_seed)
        # ---- Those that are held out; a batch for every process must remain ----
        val_size = 0 if self.val_size is None and self._has_val_source else self.val_size
        needed = self.batch_size * (1 if self.trainer is None else self.trainer.world_size)
        return *hold_out(rows, val_size, needed, self.seed), unreadable

    def _dataset(self, rows: Rows, unreadable: Counter[str] | None = None) -> ExampleDataset:
        """Return the examples of the rows that can be used and are short enough.

        Args:
            rows: the rows.
            unreadable: how many rows of the same source were left out already, by reason.
        """
        # ---- Left out because they cannot be used ----
        examples = self._prepare(rows)
        dropped = (unreadable or Counter()) + Counter(DataError(text).reason for text in examples.problems.values())
        total = len(examples) + (unreadable or Counter()).total()
        usable = examples.select([i for i in range(len(examples)) if i not in examples.problems])
        report_left_out(dropped, total, examples)
        # ---- Left out because they are too long ----
        for limit in self._limits():
            usable = within_limit(usable, limit)
        warn_of_unseen_columns(usable)
        self.num_rows += total
        self.num_left_out += total - len(usable)
        return ExampleDataset(usable)

    def _prepare(self, rows: Rows) -> PreparedExamples:
        """Render and tokenize all rows, or load them from the cache."""
        recipe = Recipe(self._make_example, self._tokenize_examples, self.example_type)
        content, key = rows.fingerprint(), None  # without a key nothing is cached
        code, options = source_files(self, TextDataModule), settings_of_rows(self)
        if self.loading.cache and code and options is not None:
            key = preparation_key(content, self.tokenizer, options, code)
        stop_at_error = self.loading.on_bad_row == "error"
        examples = prepare(rows, recipe, content=content, key=key, stop_at_error=stop_at_error)
        self._examples_prepared(examples)
        if self.needs_eos and True in examples.chat_kinds() and (start := self.formatter.renderer.unwritten_start()):
            rank_zero_warn(
                f"{self.tokenizer_key}: the chat template of {self.tokenizer.name_or_path!r} ignores"
                f" add_generation_prompt: prompts end without {start!r}, which it writes before an answer, so that the"
                " policy has to write it and the reward reads it. Take a tokenizer whose template ends with {% if"
                " add_generation_prompt %}, or correct this one."
            )
        if self.loading.chat_template_kwargs and examples.chat_kinds() == {False}:
            raise UserError(
                f"data.loading.chat_template_kwargs is for messages, but {rows.source} has text in column"
                f" {self.prompt_column!r}; remove the key, or give messages"
            )
        return examples

    def _tokenize_examples(self, examples: list[Example]) -> Sequence[Outcome]:
        ids = self.formatter.encode([example.prompt for example in examples])
        for example, prompt_ids in zip(examples, ids, strict=True):
            example.prompt_ids[:] = prompt_ids  # in place: an `Example` is a tuple
        return self._finish_examples(examples)

    def _loader_batch_size(self, num_micro_batches: int) -> int:  # noqa: ARG002 - for subclasses
        """Return how many rows the loader hands to `_collate`, for each of `num_micro_batches` micro-batches."""
        return self.batch_size

    def _sampler(self, num_rows: int, rows_at_once: int, num_micro_batches: int, shuffle: bool) -> MicroBatchSampler:
        """Return the sampler of a loader: shuffled and without a short batch in training."""
        return MicroBatchSampler(
            num_rows,
            rows_at_once,
            num_micro_batches=num_micro_batches,
            shuffle=shuffle,
            drop_last=shuffle,
            seed=self.seed,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=1 if self.trainer is None else self.trainer.world_size,
        )

    def _loader(self, dataset: ExampleDataset | None, *, shuffle: bool) -> StatefulDataLoader[Any]:
        from torchdata.stateful_dataloader import StatefulDataLoader

        if dataset is None:
            raise RuntimeError(f"{type(self).__name__}.setup must run before its data loaders are asked for")
        # Validation sees each row once, in one pass, whatever training does.
        num_micro_batches = self.num_micro_batches if shuffle else 1
        rows_at_once = self._loader_batch_size(num_micro_batches)
        sampler = self._sampler(len(dataset), rows_at_once, num_micro_batches, shuffle)
        sampler.looks_ahead = self.looks_ahead and shuffle
        return StatefulDataLoader(
            dataset,
            batch_size=rows_at_once,
            sampler=sampler,
            drop_last=shuffle,
            num_workers=self.loading.num_workers,
            collate_fn=self._collate(num_micro_batches),
        )
