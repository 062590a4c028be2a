"""`remax report`: write one self-contained HTML page about a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from remax_lightning.errors import UserError
from remax_lightning.tools.report.page import render_page
from remax_lightning.tools.report.run import read_run


def main(args: Sequence[str]) -> Path:
    """Write the page of a run.

    Args:
        args: the arguments after `remax report`.

    Returns:
        Path of the page.

    Raises:
        UserError: if the folder is not a run, or the page cannot be written.
    """
    # ---- Options ----
    options = make_parser().parse_args(args)
    if options.max_samples < 1:
        raise UserError(f"--max_samples must be at least 1, got {options.max_samples}")
    out: Path = options.out or options.run / "report.html"
    if out.is_dir():
        raise UserError(f"--out must be a file, and {out} is a folder; give {out / 'report.html'}")
    if out.is_file() and out.stat().st_size and not _is_page(out):
        raise UserError(f"--out: {out} is there and is no page; name another file, or move it away")
    # ---- Read, render, write ----
    text = render_page(read_run(options.run, options.evaluation), options.max_samples)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror}") from error
    print(f"wrote {out} ({out.stat().st_size / 1000:,.0f} kB)")
    return out


def _is_page(file: Path) -> bool:
    with suppress(OSError), file.open("rb") as stream:
        return stream.read(15).lower() == b"<!doctype html>"
    return False


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments after `remax report`."""
    parser = argparse.ArgumentParser(
        prog="remax report",
        description="Write one HTML page about a run: curves, KL against reward, statistics of the baseline, times, and"
        " samples with search, sorting, and tokens shaded by KL or advantage. The page needs no network.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run, such as runs/remax/version_0")
    parser.add_argument("--out", type=Path, metavar="FILE", help="path of the page (default: report.html in RUN)")
    parser.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="figures of `remax test` (default: the latest in RUN)"
    )
    parser.add_argument(
        "--max_samples",
        type=int,
        default=2000,
        metavar="N",
        help="sampled responses in the page (default: %(default)s)",
    )
    return parser
