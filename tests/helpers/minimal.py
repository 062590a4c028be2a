"""An environment that has some packages with what they require, and nothing else that is installed here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path


def closure(*names: str) -> list[Distribution]:
    """The distributions of these packages and of all that they require, without extras."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        required = [line for line in found[name].requires or [] if "extra ==" not in line]
        waiting += [re.match(r"[\w.-]+", line)[0] for line in required]
    return list(found.values())


def run_with_only(names: tuple[str, ...], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where only these packages can be imported, or asked for their versions.

    Args:
        names: of distributions.
        folder: an empty one, for links to them.
        arguments: of Python.
    """
    for package in closure(*names):
        tops = {file.parts[0] for file in package.files or () if not file.parts[0].startswith(".")}
        for top in tops - {"bin", "__pycache__"}:
            target = Path(str(package.locate_file(top)))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    # -S leaves out the folder of what is installed.
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=900,
    )
