"""What every figure is written down with: the machine, the versions, the date."""

from __future__ import annotations

import datetime
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from remax_lightning import __version__

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "lightning", "deepspeed")


def description() -> dict[str, Any]:
    """Return machine, versions and date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": installed(*PACKAGES) | {"remax-lightning": __version__},
    }


def installed(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def resident(name: str) -> int:
    """Return the resident memory of this process, `VmRSS` now or `VmHWM` at its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [match] = [line for line in lines if line.startswith(name + ":")]
    return int(match.split()[1]) * 1024


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
