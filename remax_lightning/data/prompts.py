"""Prompts for ReMax, from files or made by reasoning-gym: the policy writes the responses."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Annotated, Any, TypeAlias, cast, overload

from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.data.base import TextDataModule
from remax_lightning.data.collate import MicroBatchSampler, collate_prompts
from remax_lightning.data.options import DEFAULT_LOADING, SELECTION, Count, LoadingConfig, SelectionConfig, ValSize
from remax_lightning.data.reading import Row
from remax_lightning.data.records import PreparedExamples
from remax_lightning.data.selection import PromptStream, SelectingSampler
from remax_lightning.errors import DataError, UserError, at_least, check_ranges
from remax_lightning.types import PromptBatch

DEFAULT_SELECTION = SelectionConfig()
MicroBatchSize: TypeAlias = Annotated[int | None, at_least(1, divides="batch_size")]
"""Prompts of a training pass; None takes those of a rollout."""


class PromptDataModule(TextDataModule):
    r"""Yields `PromptBatch`: each rollout batch of prompts once per micro-batch that is trained on.

    Args:
        path: training rows: files, a pattern, a folder or a data set on the hub, or a list of these. JSON lines, JSON,
            CSV, TSV (also compressed), Parquet, Arrow and what else `datasets` reads. Null where `data` has them.
        tokenizer: folder or hub name of the policy's tokenizer.
        val_path: validation rows, of the same kinds. Testing and predicting read them too.
        val_size: rows of `path` to hold out for validation where there is no `val_path`, drawn by `seed`. None holds
            out one row in 20, and 64 at most: enough to see whether a run learns, at little cost.
        prompt_column: column of the prompt: text, or a list of messages for the tokenizer's chat template. Pairs of
            whole conversations in `chosen` and `rejected` have it at their beginning instead.
        template: text around a plain prompt, with columns in braces, for instance `"Human:
            {prompt}\n\nAssistant:"`.
        batch_size: prompts per rollout and device.
        micro_batch_size: prompts per training pass and device; divides `batch_size`. The same rollout batch
            arrives `batch_size / micro_batch_size` times, once per part. None trains on the whole batch in
            one pass.
        tokens_per_micro_batch: tokens per training pass and device, those of prompts and responses, in place of
            `micro_batch_size`: passes are filled up to it once the lengths of the responses are known, so that their
            memory is bounded and short responses make fewer passes. At least one prompt with its responses has to
            fit. The gradient is the same; `trainer.accumulate_grad_batches` stays 1.
        max_prompt_length: longest prompt, in tokens.
        seed: fixes the order of each epoch and the rows held out.
        loading: rarer choices: overlong prompts, workers, pad token, splits on the hub.
        selection: prompts that are left out, drawn more often or beyond a batch, by what earlier responses gave.
        data: training rows in memory, from Python, in place of `path`: a `datasets.Dataset`, a DataFrame or a list of
            dictionaries.
        val_data: validation rows in memory, in place of `val_path`.

    Raises:
        UserError: if a value is out of its range; the message names its key.
    """

    stage = "remax"

    def __init__(
        self,
        path: str | list[str] | None = None,
        tokenizer: str | None = None,
        val_path: str | list[str] | None = None,
        val_size: ValSize = None,
        prompt_column: str = "prompt",
        template: str | None = None,
        batch_size: Count = 64,
        micro_batch_size: MicroBatchSize = None,
        tokens_per_micro_batch: Count | None = None,
        max_prompt_length: Count = 512,
        seed: int = 0,
        loading: LoadingConfig = DEFAULT_LOADING,
        selection: SelectionConfig = DEFAULT_SELECTION,
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
        check_ranges(PromptDataModule.__init__, locals(), "data")
        # ---- A budget of tokens: the batch arrives once, and is cut when its lengths are known ----
        if tokens_per_micro_batch is not None and micro_batch_size is not None:
            raise UserError(
                f"data.tokens_per_micro_batch must be null beside data.micro_batch_size {micro_batch_size}, got"
                f" {tokens_per_micro_batch}: micro-batches are counted in prompts or in tokens; remove one"
            )
        self.tokens_per_micro_batch = tokens_per_micro_batch
        # ---- Parts of a rollout batch: 64 prompts in micro-batches of 16 arrive 4 times ----
        if micro_batch_size is None:
            micro_batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = batch_size // micro_batch_size
        # ---- A selection of prompts, which learns from the rollouts of this process ----
        if selection.is_on and loading.num_workers:
            raise UserError(
                f"data.loading.num_workers must be 0 with {SELECTION}, got {loading.num_workers}: workers draw prompts"
                " before the rollouts are known that decide on them"
            )
        self.selection = selection
        self._selecting: SelectingSampler | None = None

    def _collate(self, num_micro_batches: int) -> Callable[..., PromptBatch]:
        return partial(
            collate_prompts,
            pad_id=int(self.tokenizer.pad_token_id),
            num_micro_batches=num_micro_batches,
            tokens_per_micro_batch=self.tokens_per_micro_batch,
        )

    # ---- Selection ----

    def _sampler(self, num_rows: int, rows_at_once: int, num_micro_batches: int, shuffle: bool) -> MicroBatchSampler:
        plain = super()._sampler(num_rows, rows_at_once, num_micro_batches, shuffle)
        if not (shuffle and self.selection.is_on):
            return plain
        # A step may draw several batches, and no prompt twice.
        needed = rows_at_once * plain.num_replicas * self.selection.oversample
        if needed > num_rows:
            raise DataError(
                f"{SELECTION}.oversample={self.selection.oversample} may draw {needed} prompts in a step, and there are"
                f" {num_rows}; lower it or data.batch_size"
            )
        self._selecting = SelectingSampler(
            PromptStream(num_rows, self.seed, self.selection),
            rows_at_once,
            num_micro_batches=num_micro_batches,
            seed=self.seed,
            rank=plain.rank,
            world_size=plain.num_replicas,
        )
        return self._selecting

    def more_prompts(self) -> PromptBatch:
        """Return another rollout batch of this rank for the step that is being made."""
        sampler = cast(SelectingSampler, self._selecting)
        rows = sampler.mine(sampler.draw(starts_step=False))
        return self._collate(1)([cast(Any, self._train)[row] for row in rows])

    def observe(self, places: Sequence[int], informative: Sequence[bool], rates: Sequence[float], n: int) -> None:
        """Remember the visits of a rollout batch, those of all ranks.

        Args:
            places: numbers of the prompts, as in `PromptBatch.indices`.
            informative: whether one of its samples has an advantage, for each prompt.
            rates: mean reward of its samples.
            n: samples per prompt.
        """
        stream = cast(SelectingSampler, self._selecting).stream
        for place, gives, rate in zip(places, informative, rates, strict=True):
            stream.observe(self._rows_by_place[place], gives, rate, n)

    def selection_metrics(self) -> dict[str, float]:
        """Return what the selection does, by the name that it is logged under."""
        stream = cast(SelectingSampler, self._selecting).stream
        return {"data/resting": float(stream.num_resting()), "data/skipped": float(stream.skipped)}

    @cached_property
    def _rows_by_place(self) -> dict[int, int]:
        # Rows that were left out have a place among those that were read, and no row.
        examples = cast(PreparedExamples, cast(Any, self._train).examples)
        return {place: row for row, place in enumerate(examples.numbers.tolist())}


# ---- Puzzles and problems without end, each with a function that checks answers ----


class ReasoningGymDataModule(PromptDataModule):
    r"""Yields prompts of tasks of [reasoning-gym](https://github.com/open-thought/reasoning-gym), made from a seed.

    It needs the extra `verify`. The reward is `remax_lightning.rewards.verifiers.reasoning_gym_answer`. No question is
    asked twice, so that a task with few questions gives fewer rows, and validation has none of training.

    Args:
        tasks: options of each task by its name, as in `{chain_sum: {max_digits: 3}, leg_counting: {}}`.
        tokenizer: folder or hub name of the policy's tokenizer.
        size: rows to train on.
        val_size: rows to validate on.
        weights: how often a task is drawn, relative to the others; 1.0 where a name is left out.
        system_prompt: what stands before each question, by default a text that asks for the answer in `<answer>` tags;
            a name in `reasoning_gym.utils.SYSTEM_PROMPTS`, another text, or null for none.
        chat: whether prompts are messages for the tokenizer's chat template, in place of text.
        template: text around a plain prompt, with columns in braces: `prompt`, `question` and `answer`.
        batch_size: prompts per rollout and device.
        micro_batch_size: prompts per training pass and device; divides `batch_size`. None trains on the whole batch in
            one pass.
        tokens_per_micro_batch: tokens per training pass and device, in place of `micro_batch_size`.
        max_prompt_length: longest prompt, in tokens; some tasks write long ones.
        seed: makes the rows, fixes the order of each epoch and the rows held out.
        loading: rarer choices, as in `PromptDataModule`.
        selection: which prompts are drawn, as in `PromptDataModule`.

    Raises:
        UserError: if reasoning-gym is not installed, it has no such task or option, or a value is out of its range.
    """

    def __init__(
        self,
        tasks: dict[str, dict[str, Any]],
        tokenizer: str | None = None,
        size: Count = 10_000,
        val_size: Annotated[int, at_least(0)] = 100,
        weights: dict[str, float] | None = None,
        system_prompt: str | None = "default",
        chat: bool = False,
        template: str | None = None,
        batch_size: Count = 64,
        micro_batch_size: MicroBatchSize = None,
        tokens_per_micro_batch: Count | None = None,
        max_prompt_length: Count = 512,
        seed: int = 0,
        loading: LoadingConfig = DEFAULT_LOADING,
        selection: SelectionConfig = DEFAULT_SELECTION,
    ) -> None:
        check_ranges(ReasoningGymDataModule.__init__, locals(), "data")
        self.tasks, self.weights, self.size, self.system_prompt, self.chat = tasks, weights, size, system_prompt, chat
        # The options are checked here; the rows are made when they are read.
        generated = _GeneratedRows(
            _create(tasks, weights or {}, size + val_size, seed), _instructions(system_prompt), chat
        )
        super().__init__(
            tokenizer=tokenizer,
            val_size=val_size,
            template=template,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            tokens_per_micro_batch=tokens_per_micro_batch,
            max_prompt_length=max_prompt_length,
            seed=seed,
            loading=loading,
            selection=selection,
            data=generated,
        )


class _GeneratedRows(Sequence[Row]):
    """Rows of a data set of reasoning-gym, made when they are first read.

    A row has what its task's scorer reads, `question`, `answer` and `metadata`, and a `prompt`.
    """

    def __init__(self, dataset: Any, instructions: str, chat: bool) -> None:
        self.dataset, self.instructions, self.chat = dataset, instructions, chat

    @cached_property
    def rows(self) -> list[Row]:
        entries: dict[str, Row] = {}  # by question, so that none is asked twice
        for index in range(len(self.dataset)):
            entry = self.dataset[index]
            entries.setdefault(entry["question"], entry)
        if len(entries) < len(self.dataset):
            rank_zero_warn(
                f"data.tasks: {len(self.dataset) - len(entries)} of {len(self.dataset)} rows asked what another one "
                "asks and were left out; give a task options that make more questions, or lower data.size"
            )
        return [{"prompt": self._prompt(question), **entry} for question, entry in entries.items()]

    def _prompt(self, question: str) -> str | list[dict[str, str]]:
        if not self.chat:
            # one text; in a chat, the instructions are the system message
            return f"{self.instructions}\n\n{question}" if self.instructions else question
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return [*system, {"role": "user", "content": question}]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]


def _create(tasks: Mapping[str, Mapping[str, Any] | None], weights: Mapping[str, float], size: int, seed: int) -> Any:
    """Return a data set of reasoning-gym that draws from the tasks.

    Raises:
        UserError: naming the task or option that it does not know.
    """
    if find_spec("reasoning_gym") is None:
        raise UserError("data.tasks need reasoning-gym, which is not installed: pip install 'remax-lightning[verify]'")
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    known = DATASETS.keys() - {"composite"}  # the mixture itself, which is made below
    if not tasks:
        raise UserError("data.tasks: expected the name of at least one task, got none")
    for name, options in tasks.items():
        if name not in known:
            similar = ", ".join(difflib.get_close_matches(name, known)) or ", ".join(sorted(known))
            raise UserError(f"data.tasks.{name}: reasoning-gym has no such task; did you mean {similar}?")
        # A data set of the task alone shows whether its options are right.
        try:
            reasoning_gym.create_dataset(name, **(options or {}))
        except Exception as error:
            raise UserError(
                f"data.tasks.{name}: reasoning-gym refuses the options {dict(options or {})}: {error or 'out of range'}"
            ) from error
    for name, weight in weights.items():
        if name not in tasks or not weight > 0:
            raise UserError(
                f"data.weights.{name}: expected a number above 0 for one of {', '.join(tasks)}, got {weight}"
            )
    # ---- The mixture: each row is drawn from a task by its weight ----
    specs = [DatasetSpec(name, float(weights.get(name, 1.0)), dict(options or {})) for name, options in tasks.items()]
    return reasoning_gym.create_dataset("composite", size=size, seed=seed, datasets=specs)


def _instructions(system_prompt: str | None) -> str:
    from reasoning_gym.utils import SYSTEM_PROMPTS

    # a name such as "default", or the text itself
    return str(SYSTEM_PROMPTS.get(system_prompt, system_prompt or "")).strip()
