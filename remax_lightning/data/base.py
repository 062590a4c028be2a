"""What the DataModules share: reading, formatting, length limits, splitting and loading."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from remax_lightning.data.collate import Example, ExampleDataset
from remax_lightning.data.formatting import PromptFormatter, check_template
from remax_lightning.data.reading import Rows, is_file_path, load_hub, read_rows
from remax_lightning.data.sampler import SplitSampler
from remax_lightning.data.tokenizers import load_tokenizer
from remax_lightning.errors import DataError, UserError

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadingConfig:
    """How rows and the tokenizer are loaded, where the defaults do not do.

    Args:
        long_prompts: what happens to a prompt over the limit: `drop` leaves the row out and counts it,
            `error` stops. A prompt is never cut, because its end is what the policy answers.
        num_workers: processes that collate; 0 does it in the training process, which is enough for tokenised
            text.
        pad_token: `eos`, or the text of a token of the vocabulary, for a tokenizer without a pad token.
        trust_remote_code: whether code that comes with the tokenizer may run.
        tokenizer_revision: branch, tag or commit of the tokenizer on the hub.
        hub_name: configuration of a data set on the hub, for instance `main`.
        train_split: split of `path` on the hub.
        val_split: split of `val_path` on the hub.
    """

    long_prompts: Literal["drop", "error"] = "drop"
    num_workers: int = 0
    pad_token: str | None = None
    trust_remote_code: bool = False
    tokenizer_revision: str | None = None
    hub_name: str | None = None
    train_split: str = "train"
    val_split: str = "test"


DEFAULT_LOADING = LoadingConfig()


class TextDataModule(LightningDataModule, ABC):
    """Reads rows, makes prompts of them and hands them out in an order known from the seed.

    A subclass says how examples become a batch (`_collate`), and may add to the examples (`_complete`). The
    arguments are those of the subclasses, where they are described.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        val_path: str | None,
        val_size: int,
        prompt_column: str,
        template: str | None,
        batch_size: int,
        max_prompt_length: int,
        seed: int,
        loading: LoadingConfig,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, max_prompt_length=max_prompt_length)
        check_at_least(0, val_size=val_size, **{"loading.num_workers": loading.num_workers})
        if val_path is not None and val_size:
            raise UserError(
                f"data.val_size must be 0 beside data.val_path, got {val_size} and {val_path!r}; remove one"
            )
        if template is not None:
            check_template(template)
        self.path = path
        self.tokenizer_path = tokenizer
        self.val_path = val_path
        self.val_size = val_size
        self.prompt_column = prompt_column
        self.template = template
        self.batch_size = batch_size
        self.max_prompt_length = max_prompt_length
        self.seed = seed
        self.loading = loading
        self.num_splits = 1
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
            )
        return self._tokenizer

    def prepare_data(self) -> None:
        """Download what lies on the hub, in one process per machine; nothing is kept on the module."""
        _ = self.tokenizer
        for path, split, key in self._sources():
            if not is_file_path(path):
                load_hub(path, split=split, name=self.loading.hub_name, key=key)

    def setup(self, stage: str | None = None) -> None:
        """Read, format and tokenise the rows that `stage` needs; each file is read once.

        Raises:
            DataError: if a file or row cannot be used, or there are too few rows.
            UserError: if the stage needs validation rows and there is no source of them.
        """
        has_val = self.val_path is not None or self.val_size > 0
        if stage in ("validate", "test", "predict") and not has_val:
            raise UserError(
                f"data.val_path must name the rows to {getattr(stage, 'value', stage)} on, got null; set it, or set "
                "data.val_size to hold rows of data.path out"
            )
        if self._train is None and (stage in (None, "fit") or self.val_path is None):
            self._setup_train()
        if self._val is None and self.val_path is not None:
            self._val = self._dataset(self._read(self.val_path, self.loading.val_split, "data.val_path"))

    def train_dataloader(self) -> StatefulDataLoader[Any]:
        """Shuffled batches, without the last short one. Resumable at every batch.

        Raises:
            UserError: if Lightning would replace the sampler that hands out the splits.
        """
        overfit = getattr(self.trainer, "overfit_batches", 0)  # set on the instance, unknown to its type
        if self.num_splits > 1 and overfit > 0:
            raise UserError(
                "data.micro_batch_size must equal data.batch_size where trainer.overfit_batches is set: "
                f"Lightning then takes the batches in its own order; got {self.num_splits} parts per batch"
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
    def _collate(self, num_splits: int) -> Callable[..., Any]:
        """Return what makes a batch of examples."""

    def _complete(self, examples: list[Example], source: str) -> list[Example]:  # noqa: ARG002 - for subclasses
        """Add to examples of `source` whose prompts have been made; a subclass may leave some out."""
        return examples

    def _sources(self) -> list[tuple[str, str, str]]:
        sources = [(self.path, self.loading.train_split, "data.path")]
        if self.val_path is not None:
            sources.append((self.val_path, self.loading.val_split, "data.val_path"))
        return sources

    def _read(self, path: str, split: str, key: str) -> Rows:
        return read_rows(path, split=split, name=self.loading.hub_name, key=key)

    def _setup_train(self) -> None:
        rows = self._read(self.path, self.loading.train_split, "data.path")
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
                f"data.path ({rows.source}) has {len(train)} to use; lower data.batch_size or give more rows"
            )
        self._train = train

    def _dataset(self, rows: Rows) -> ExampleDataset:
        formatter = PromptFormatter(self.tokenizer, self.prompt_column, self.template)
        prompts = [formatter.text(row, rows.where(i)) for i, row in enumerate(rows.values)]
        examples = [
            Example(ids, prompt.text, row, rows.where(i))
            for i, (ids, prompt, row) in enumerate(zip(formatter.encode(prompts), prompts, rows.values, strict=True))
        ]
        kept = within_limit(
            examples,
            [len(example.prompt_ids) for example in examples],
            self.max_prompt_length,
            key="data.max_prompt_length",
            source=rows.source,
            policy=self.loading.long_prompts,
        )
        return ExampleDataset(self._complete(kept, rows.source))

    def _loader(self, dataset: ExampleDataset | None, *, shuffle: bool) -> StatefulDataLoader[Any]:
        from torchdata.stateful_dataloader import StatefulDataLoader

        if dataset is None:
            raise RuntimeError(f"{type(self).__name__}.setup must run before its data loaders are asked for")
        num_splits = self.num_splits if shuffle else 1
        sampler = SplitSampler(
            len(dataset),
            self.batch_size,
            num_splits=num_splits,
            shuffle=shuffle,
            drop_last=shuffle,
            seed=self.seed,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=1 if self.trainer is None else self.trainer.world_size,
        )
        return StatefulDataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=shuffle,
            num_workers=self.loading.num_workers,
            collate_fn=self._collate(num_splits),
        )


def check_at_least(least: int, **values: int) -> None:
    """Check that every value is at least `least`; the names are keys under `data`.

    Raises:
        UserError: if one is below.
    """
    for name, value in values.items():
        if value < least:
            raise UserError(f"data.{name} must be at least {least}, got {value}")


def within_limit(
    examples: Sequence[Example],
    lengths: Sequence[int],
    limit: int,
    *,
    key: str,
    source: str,
    policy: Literal["drop", "error"],
) -> list[Example]:
    """Return the examples that are within a limit in tokens, and say in one line how many are not.

    Raises:
        DataError: if `policy` is `error` and one is too long, or if none is left.
    """
    kept = [example for example, length in zip(examples, lengths, strict=True) if length <= limit]
    dropped = len(examples) - len(kept)
    if dropped and policy == "error":
        first = next(i for i, length in enumerate(lengths) if length > limit)
        raise DataError(
            f"{examples[first].where}: {lengths[first]} tokens, over {key}={limit}, and so are {dropped} of "
            f"{len(examples)} rows; raise the limit, shorten them, or set data.loading.long_prompts: drop"
        )
    message = f"{source}: dropped {dropped} of {len(examples)} rows, longer than {key}={limit} tokens"
    if not kept:
        raise DataError(f"{message}; none is left, the shortest has {min(lengths)} tokens: raise the limit")
    if dropped * 2 > len(examples):
        rank_zero_warn(f"{message}: that is more than half of them")
    else:
        rank_zero_info(message)
    return kept
