"""Two ranks, of which the second does not join; run by test_processes.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch


def fails() -> None:
    """The second rank ends, as a script does that finds a mistake."""
    if os.environ["LOCAL_RANK"] == "1":
        sys.exit(3)
    join()


def stays_away() -> None:
    """The second rank is done without having joined."""
    if os.environ["LOCAL_RANK"] == "0":
        join()


def join() -> None:
    torch.distributed.init_process_group("gloo", rank=0, world_size=int(os.environ["WORLD_SIZE"]))


def writes(folder: Path) -> None:
    """Write down which process each rank is."""
    print("a word of rank", os.environ["LOCAL_RANK"])
    (folder / os.environ["LOCAL_RANK"]).write_text(f"{os.getpid()} {torch.get_default_dtype()}")


def forgets(folder: Path) -> None:
    """Leave the process otherwise than it was."""
    writes(folder)
    torch.set_default_dtype(torch.float64)


def ends(*_: Any) -> None:
    """In place of what waits for functions to call."""
    raise SystemExit(1)
