"""Records that stay in files: what was measured on each prompt, and which loggers a run had (`run.json`).

Without torch, so that `remax report` and `remax compare` read them at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from remax_lightning.json_text import load_json

RECORD = "run.json"


class PromptRecord(NamedTuple):
    """What was measured on one prompt. The sums of all prompts make the figures.

    Args:
        number: the prompt's place in its data set, or None where that is not known.
        prompt: the prompt as text; empty for a piece of a text.
        responses: responses by whose they are: `sampled`, `greedy`, `reference`, `chosen`.
        rewards: their rewards.
        sums: by the figure's name, a sum and what it is a sum over: rewards and responses, nats and tokens. The
            figure is the ratio of both after they were summed over prompts, for a perplexity its exponential.
    """

    number: int | None
    prompt: str
    responses: dict[str, list[str]]
    rewards: dict[str, list[float]]
    sums: dict[str, tuple[float, float]]


def write_record(folder: Path, loggers: Sequence[dict[str, Any]]) -> None:
    """Write the record of a run, and its folder if it does not exist.

    Args:
        folder: of the run.
        loggers: `class`, `version` and `files` of each, in the order of `trainer.logger`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps({"loggers": list(loggers)}, indent=2) + "\n", encoding="utf-8")


def recorded_loggers(folder: Path) -> list[dict[str, Any]]:
    """Return what was recorded of each logger; nothing of a run without a record, or with one that is damaged."""
    try:
        entries = load_json((folder / RECORD).read_text(encoding="utf-8"))["loggers"]
    except (OSError, ValueError, KeyError, TypeError):  # a run of an earlier version
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def recorded_versions(folder: Path) -> dict[tuple[int, str], str]:
    """Return the versions of a run's loggers, by their number in the list and their class."""
    return {
        (number, str(entry.get("class"))): str(entry["version"])
        for number, entry in enumerate(recorded_loggers(folder))
        if entry.get("version")
    }


def logger_files(folder: Path) -> list[Path]:
    """Return the folders in which loggers of a run have files of their own, such as those of an offline W&B run."""
    return [Path(entry["files"]) for entry in recorded_loggers(folder) if isinstance(entry.get("files"), str)]
