"""Prompts for ReMax: the policy writes the responses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from remax_lightning.data.base import TextDataModule
from remax_lightning.data.collate import collate_prompts
from remax_lightning.data.options import DEFAULT_LOADING, LoadingConfig, check_at_least
from remax_lightning.errors import UserError
from remax_lightning.types import PromptBatch


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
        val_size: int | None = None,
        prompt_column: str = "prompt",
        template: str | None = None,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        tokens_per_micro_batch: int | None = None,
        max_prompt_length: int = 512,
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
        # ---- A budget of tokens: the batch arrives once, and is cut when its lengths are known ----
        if tokens_per_micro_batch is not None:
            check_at_least(1, tokens_per_micro_batch=tokens_per_micro_batch)
            if micro_batch_size is not None:
                raise UserError(
                    f"data.tokens_per_micro_batch must be null beside data.micro_batch_size {micro_batch_size}, got"
                    f" {tokens_per_micro_batch}: micro-batches are counted in prompts or in tokens; remove one"
                )
        self.tokens_per_micro_batch = tokens_per_micro_batch
        # ---- Parts of a rollout batch: 64 prompts in micro-batches of 16 arrive 4 times ----
        if micro_batch_size is None:
            micro_batch_size = batch_size
        check_at_least(1, micro_batch_size=micro_batch_size)
        if batch_size % micro_batch_size:
            raise UserError(
                f"data.micro_batch_size must divide data.batch_size {batch_size}, got {micro_batch_size}; "
                "choose a divisor"
            )
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = batch_size // micro_batch_size

    def _collate(self, num_micro_batches: int) -> Callable[..., PromptBatch]:
        return partial(
            collate_prompts,
            pad_id=int(self.tokenizer.pad_token_id),
            num_micro_batches=num_micro_batches,
            tokens_per_micro_batch=self.tokens_per_micro_batch,
        )
