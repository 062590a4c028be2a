"""Read the evaluations that `remax test` saves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from remax_lightning.errors import UserError
from remax_lightning.types import PromptRecord


class SavedEvaluation(NamedTuple):
    """An evaluation that `remax test` saved.

    Args:
        path: the JSON file.
        answer: its content.
        prompts: records of prompts, by text and number of earlier prompts with the same text.
        pieces: records of the pieces of a text file, by the same kind of key.
    """

    path: Path
    answer: dict[str, Any]
    prompts: dict[tuple[str, int], PromptRecord]
    pieces: dict[tuple[str, int], PromptRecord]


def read_evaluation(path: Path) -> SavedEvaluation:
    """Return the evaluation in a file or folder.

    Raises:
        UserError: if there is no evaluation, or more than one.
    """
    if path.is_dir():
        files = sorted(path.glob("evaluation*.json"))
        if len(files) != 1:
            listing = (
                f"{', '.join(item.name for item in files)}: give one of them" if files else "none: run `remax test`"
            )
            raise UserError(f"{path} must hold one evaluation.json, got {listing}")
        (path,) = files
    lines = path.with_suffix(".jsonl")
    for file in (path, lines):
        if not file.is_file():
            raise UserError(f"there is no file {file}; `remax test` writes an evaluation.json and .jsonl side by side")
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
        # Not `splitlines`, which also splits at characters that may be inside a text.
        records = [_parse_record(line) for line in lines.read_text(encoding="utf-8").split("\n") if line]
        answer["settings"]["reward"], answer["figures"]  # raises KeyError if it is another kind of file
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} (or {lines.name}) is not an evaluation of `remax test` ({error!r})") from error
    prompts = _index_by_text([item for item in records if item.responses])
    return SavedEvaluation(path, answer, prompts, _index_by_text([item for item in records if not item.responses]))


def _parse_record(line: str) -> PromptRecord:
    record = PromptRecord(**json.loads(line))
    if record.responses:
        record.rewards["sampled"], record.rewards["greedy"]
    return record._replace(sums={name: (float(total), float(count)) for name, (total, count) in record.sums.items()})


def _index_by_text(records: Sequence[PromptRecord]) -> dict[tuple[str, int], PromptRecord]:
    seen: Counter[str] = Counter()
    prompts = {}
    for record in records:
        prompts[record.prompt, seen[record.prompt]] = record
        seen[record.prompt] += 1
    return prompts
