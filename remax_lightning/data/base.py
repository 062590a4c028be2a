"""What the DataModules share: reading, formatting, length limits, splitting and loading."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.data.collate import Example, ExampleDataset
from remax_lightning.data.conversations import Message
from remax_lightning.data.formatting import PromptFormatter, check_template
from remax_lightning.data.limits import check_at_least, within_limit
from remax_lightning.data.options import LoadingConfig
from remax_lightning.data.pairs import PairColumns, PairError, separate_prompt
from remax_lightning.data.reading import Row, Rows, is_on_hub, load_hub, read_rows, rows_in_memory
from remax_lightning.data.sampler import MicroBatchSampler
from remax_lightning.data.stages import Stage, check_stage_split, select_stage_rows
from remax_lightning.data.tokenizers import load_tokenizer
from remax_lightning.errors import DataError, UserError

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from transformers import PreTrainedTokenizerBase


class TextDataModule(LightningDataModule, ABC):
    """Reads rows, makes prompts of them and hands them out in an order known from the seed.

    A subclass says how examples become a batch (`_collate`), and may add to the examples (`_complete`). The
    arguments are those of the subclasses, where they are described.
    """

    stage: ClassVar[Stage | None] = None
    """Whose share of the rows it reads where `loading.stage_split` deals them out."""
    needs_eos: ClassVar[bool] = True
    """Whether the tokenizer must have an end-of-sequence token."""

    def __init__(
        self,
        path: str | list[str] | None,
        tokenizer: str | None,
        val_path: str | list[str] | None,
        val_size: int,
        prompt_column: str,
        template: str | None,
        batch_size: int,
        max_prompt_length: int,
        seed: int,
        loading: LoadingConfig,
        data: Any = None,
        val_data: Any = None,
    ) -> None:
        super().__init__()
        _check_sources(path, tokenizer, data, val_path, val_data)
        check_at_least(1, batch_size=batch_size, max_prompt_length=max_prompt_length)
        check_at_least(0, val_size=val_size, **{"loading.num_workers": loading.num_workers})
        if val_size and not (val_path is None and val_data is None):
            other = "data.val_data" if val_path is None else f"data.val_path={val_path!r}"
            raise UserError(f"data.val_size must be 0 beside {other.partition('=')[0]}, got {val_size}; remove one")
        if template is not None:
            check_template(template)
        check_stage_split(loading.stage_split, self.stage, type(self).__name__)
        self.path, self.data = path, data
        self.tokenizer_path = str(tokenizer)
        self.val_path, self.val_data = val_path, val_data
        self.val_size = val_size
        self.prompt_column = prompt_column
        self.template = template
        self.batch_size = batch_size
        self.max_prompt_length = max_prompt_length
        self.seed = seed
        self.loading = loading
        self.num_micro_batches = 1
        self.num_rows = self.num_left_out = 0
        """Rows that were read, and those of them that are too long or were no pair."""
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
            )
        return self._tokenizer

    def prepare_data(self) -> None:
        """Download what lies on the hub, in one process per machine; nothing is kept on the module."""
        _ = self.tokenizer
        for path, split, key in (
            (self.path, self.loading.train_split, "data.path"),
            (self.val_path, self.loading.val_split, "data.val_path"),
        ):
            for item in [path] if isinstance(path, str) else path or []:
                if is_on_hub(item):
                    load_hub(item, split=split, name=self.loading.hub_name, key=key)

    def setup(self, stage: str | None = None) -> None:
        """Read, format and tokenize the rows that `stage` needs; each file is read once.

        Raises:
            DataError: if a file or row cannot be used, or there are too few rows.
            UserError: if the stage needs validation rows and there is no source of them.
        """
        has_val = self._has_val_source or self.val_size > 0
        if stage in ("validate", "test", "predict") and not has_val:
            raise UserError(
                f"data.val_path must name the rows to {getattr(stage, 'value', stage)} on, got null; set it, or set "
                "data.val_size to hold rows of data.path out"
            )
        if self._train is None and (stage in (None, "fit") or not self._has_val_source):
            self._setup_train()
        if self._val is None and self._has_val_source:
            self._val = self._dataset(self._read(self.val_path, self.val_data, self.loading.val_split, "val_"))

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
        """Return what makes a batch of examples."""

    @cached_property
    def formatter(self) -> PromptFormatter:
        """What makes prompts, and responses after them, of rows."""
        return PromptFormatter(self.tokenizer, self.prompt_column, self.template, self.loading.chat_template_kwargs)

    def _make_example(self, row: Row, where: str) -> Example:
        """Return what is made of one row, its token ids still missing; whatever is wrong with the row shows here.

        Raises:
            DataError: if the row cannot be used; a `PairError` if it is a pair that teaches nothing.
        """
        row, _ = self._separate_pair(row, where)
        return Example([], self.formatter.text(row, where), row, where)

    def _separate_pair(self, row: Row, where: str) -> tuple[Row, dict[str, Message]]:
        """Return a row with a prompt of its own, and the responses by column where it is a pair of conversations.

        Those have the prompt at their beginning. A row with a prompt of its own needs no pair, so that what is missing
        there does not matter.

        Raises:
            PairError: if the two do not share a prompt.
        """
        columns = PairColumns()
        chosen, rejected = row.get(columns.chosen), row.get(columns.rejected)
        if row.get(self.prompt_column) is None:
            is_pair = columns.chosen in row and columns.rejected in row
        else:
            is_pair = isinstance(chosen, list) and isinstance(rejected, list) and bool(chosen) and bool(rejected)
        if not is_pair:
            return row, {}
        marker = self.loading.response_marker
        row, responses = separate_prompt(row, where, self.prompt_column, columns, marker, self.template)
        return row, dict(zip((columns.chosen, columns.rejected), responses, strict=True))

    def _finish_examples(self, examples: list[Example], source: str) -> Sequence[Any]:  # noqa: ARG002 - for subclasses
        """Add to examples of `source` whose prompts have been made; a subclass may leave some out."""
        return examples

    @property
    def _has_val_source(self) -> bool:
        return self.val_path is not None or self.val_data is not None

    def _read(self, path: str | list[str] | None, data: Any, split: str, which: Literal["", "val_"] = "") -> Rows:
        if path is None:
            return rows_in_memory(data, split=split, key=f"{which}data")
        return read_rows(path, split=split, name=self.loading.hub_name, key=f"data.{which}path")

    def _setup_train(self) -> None:
        rows = self._read(self.path, self.data, self.loading.train_split)
        if self.loading.stage_split is not None and self.stage is not None:
            rows = select_stage_rows(rows, self.loading.stage_split, self.stage, self.loading.stage_seed)
        total = len(rows.values)
        if self.val_size >= total:
            raise DataError(f"data.val_size must be below the {total} rows of {rows.source}, got {self.val_size}")
        if self.val_size:
            # Drawn before any filter, so that a new tokenizer or limit moves no row to the other side.
            held_out = set(random.Random(f"val/{self.seed}").sample(range(total), self.val_size))
            self._val = self._dataset(rows.take(sorted(held_out)))
            rows = rows.take([i for i in range(total) if i not in held_out])
        train = self._dataset(rows)
        world_size = 1 if self.trainer is None else self.trainer.world_size
        needed = self.batch_size * world_size
        if len(train) < needed:
            raise DataError(
                f"data.batch_size={self.batch_size} on {world_size} process(es) needs {needed} training rows, but "
                f"{'data' if self.path is None else 'data.path'} ({rows.source}) has {len(train)} to use; lower "
                "data.batch_size or give more rows"
            )
        self._train = train

    def _dataset(self, rows: Rows) -> ExampleDataset:
        total = len(rows.values)
        examples = self._render_rows(rows)
        ids = self.formatter.encode([example.prompt for example in examples])
        examples = [
            example._replace(prompt_ids=prompt_ids, number=i)
            for i, (example, prompt_ids) in enumerate(zip(examples, ids, strict=True))
        ]
        fitting = within_limit(
            examples,
            [len(example.prompt_ids) for example in examples],
            self.max_prompt_length,
            key="data.max_prompt_length",
            source=rows.source,
            policy=self.loading.long_prompts,
        )
        complete = list(self._finish_examples(fitting, rows.source))
        self.num_rows += total
        self.num_left_out += total - len(complete)
        return ExampleDataset(complete)

    def _render_rows(self, rows: Rows) -> list[Example]:
        """Return an example for every row that can be used, as text."""
        examples = []
        for i, row in enumerate(rows.values):
            try:
                examples.append(self._make_example(row, rows.where(i)))
            except PairError:
                if self.loading.bad_pairs == "error":
                    raise
        self._log_bad_pairs(len(rows.values) - len(examples), len(rows.values), rows.source)
        return examples

    def _log_bad_pairs(self, dropped: int, total: int, source: str) -> None:
        if dropped == total:
            raise DataError(f"{source}: not one of {total} pairs can be used; data.loading.bad_pairs: error says why")
        if dropped:
            rank_zero_warn(f"{source}: dropped {dropped} of {total} pairs (data.loading.bad_pairs)")

    def _loader_batch_size(self, num_micro_batches: int) -> int:  # noqa: ARG002 - for subclasses
        """Return how many rows the loader hands to `_collate`, for each of `num_micro_batches` micro-batches."""
        return self.batch_size

    def _loader(self, dataset: ExampleDataset | None, *, shuffle: bool) -> StatefulDataLoader[Any]:
        from torchdata.stateful_dataloader import StatefulDataLoader

        if dataset is None:
            raise RuntimeError(f"{type(self).__name__}.setup must run before its data loaders are asked for")
        num_micro_batches = self.num_micro_batches if shuffle else 1
        rows_at_once = self._loader_batch_size(num_micro_batches)
        sampler = MicroBatchSampler(
            len(dataset),
            rows_at_once,
            num_micro_batches=num_micro_batches,
            shuffle=shuffle,
            drop_last=shuffle,
            seed=self.seed,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=1 if self.trainer is None else self.trainer.world_size,
        )
        return StatefulDataLoader(
            dataset,
            batch_size=rows_at_once,
            sampler=sampler,
            drop_last=shuffle,
            num_workers=self.loading.num_workers,
            collate_fn=self._collate(num_micro_batches),
        )


def _check_sources(path: Any, tokenizer: Any, data: Any, val_path: Any, val_data: Any) -> None:
    """Check that rows and tokenizer come from somewhere, and from one place each.

    Raises:
        UserError: if not.
    """
    missing = "missing, and there is no default; set it in the YAML or on the command line"
    if path is None and data is None:
        raise UserError(f"data.path: {missing}, or give the rows from Python as data=")
    if tokenizer is None:
        raise UserError(f"data.tokenizer: {missing}")
    for name, in_files, in_memory in (("", path, data), ("val_", val_path, val_data)):
        if in_files is not None and in_memory is not None:
            raise UserError(f"data.{name}path must be null beside data.{name}data, got {in_files!r}; remove one")
