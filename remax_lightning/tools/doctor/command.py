"""`remax doctor`: check a configuration with its real models and data before training."""

from __future__ import annotations

import argparse
import json
import logging
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from remax_lightning.errors import UserError
from remax_lightning.tools.doctor import CHECKS, Result, load_context, run_checks

WIDTH = 110
"""Columns of the output."""
COLUMN = max(len(check.name) for check in CHECKS) + 2


def main(args: Sequence[str]) -> list[Result]:
    """Check what `remax fit` would do with the same arguments. Nothing is trained or written.

    Args:
        args: the arguments after `remax doctor`.

    Returns:
        The result of each check.

    Raises:
        UserError: if the configuration is wrong.
        SystemExit: with code 1 if a check failed.
    """
    parser = argparse.ArgumentParser(
        prog="remax doctor",
        usage="remax doctor --config FILE [--config FILE ...] [any argument of remax fit] [--num_prompts N]"
        " [--json FILE]",
        description="Load models and data as `remax fit` would, on one process, and check them on a few prompts."
        " Nothing is trained or written. Exit code 1 if a check failed, 2 for a mistake in the configuration.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--num_prompts", type=int, default=16, metavar="N", help="number of prompts to check (default: 16)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    options, rest = parser.parse_known_args(args)
    if options.num_prompts < 1:
        raise UserError(f"--num_prompts must be at least 1, got {options.num_prompts}")
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json: there is no folder {str(options.json.parent)!r}; make it, or name another file")
    results = []
    with _quiet_lightning():
        for result in run_checks(load_context(rest, options.num_prompts)):
            print(format_result(result), flush=True)
            results.append(result)
    count = Counter(result.status for result in results)
    print(
        f"\n{len(results)} checks: {count['pass']} passed, {count['warn']} warned, {count['fail']} failed,"
        f" {count['skip']} did not apply."
    )
    if options.json is not None:
        written = {"num_prompts": options.num_prompts, "checks": [result._asdict() for result in results]}
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if count["fail"]:
        raise SystemExit(1)
    return results


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Hide Lightning's messages about devices and loaders; its warnings still appear."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def format_result(result: Result) -> str:
    """Return the lines of a result: status, name, what was measured, and below it what to do."""
    start, indent = f"{result.status:6}{result.name:{COLUMN}}", " " * (6 + COLUMN)
    lines = textwrap.wrap(
        result.measured, WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False
    )
    if result.fix:
        lines += textwrap.wrap(
            f"-> {result.fix}", WIDTH, initial_indent=indent, subsequent_indent=f"{indent}   ", break_on_hyphens=False
        )
    return "\n".join(lines or [start])
