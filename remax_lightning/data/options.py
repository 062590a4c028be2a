"""Choices that the DataModules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class LoadingConfig:
    """How rows and the tokenizer are loaded, where the defaults do not do.

    Args:
        long_prompts: what happens to a prompt over the limit: `drop` leaves the row out and counts it,
            `error` stops. A prompt is never cut, because its end is what the policy answers.
        on_bad_row: what happens to a row that cannot be used: that cannot be read, lacks a column, is refused by the
            chat template, has no response, or is a pair that teaches nothing. `error` stops and says where it stands,
            `drop` leaves it out; one line says how many were left out, and why.
        response_marker: what stands before each response in whole transcripts; the prompt of a pair reaches through
            the last one. The default is that of hh-rlhf.
        stage_split: shares of the rows of `path` that go to supervised fine-tuning, reward model and ReMax, such as
            `[2, 4, 4]`, the paper's: each row to one of them. The data module takes that of its own stage. None gives
            all rows to each.
        stage_seed: which rows go where. The same in all three stages, or they overlap.
        chat_template_kwargs: variables of the chat template, such as `{enable_thinking: false}`; a row's own, in a
            column `chat_template_kwargs`, come before them. A column `tools` goes to the template, too.
        cache: whether rendered and tokenized rows are kept for later runs, beside what `datasets` keeps
            (`HF_DATASETS_CACHE`). Other rows, another tokenizer, template or option make them anew.
        num_workers: processes that collate; 0 does it in the training process, which is enough for tokenized
            text.
        pad_token: `eos`, or the text of a token of the vocabulary, for a tokenizer without a pad token.
        trust_remote_code: whether code that comes with the tokenizer may run.
        tokenizer_revision: branch, tag or commit of the tokenizer on the hub.
        hub_name: configuration of a data set on the hub, for instance `main`.
        train_split: split of `path` on the hub.
        val_split: split of `val_path` on the hub.
    """

    long_prompts: Literal["drop", "error"] = "drop"
    on_bad_row: Literal["error", "drop"] = "error"
    response_marker: str = "\n\nAssistant:"
    stage_split: tuple[float, float, float] | None = None
    stage_seed: int = 0
    chat_template_kwargs: dict[str, Any] | None = None
    cache: bool = True
    num_workers: int = 0
    pad_token: str | None = None
    trust_remote_code: bool = False
    tokenizer_revision: str | None = None
    hub_name: str | None = None
    train_split: str = "train"
    val_split: str = "test"


DEFAULT_LOADING = LoadingConfig()
