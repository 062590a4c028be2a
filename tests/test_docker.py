"""The Dockerfile against the package: what it installs, copies and starts is there, and its page says what it does."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from typing import Any, NamedTuple

import pytest
from helpers.pages import README, ROOT

PAGE = (ROOT / "docs" / "docker.md").read_text()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Instruction(NamedTuple):
    """One instruction, with its continued lines joined."""

    name: str
    value: str


def read_instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


INSTRUCTIONS = read_instructions((ROOT / "Dockerfile").read_text())


def values(name: str) -> list[str]:
    return [instruction.value for instruction in INSTRUCTIONS if instruction.name == name]


ARGUMENTS = dict(value.split("=", 1) for value in values("ARG"))


def sent_to_the_builder(path: str) -> bool:
    """Whether `.dockerignore` leaves in what is at the top of the checkout; the last pattern that fits counts."""
    is_sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#") and fnmatch(path, pattern.removeprefix("!").removeprefix("**/")):
            is_sent = pattern.startswith("!")
    return is_sent


def test_every_instruction_is_one_of_docker() -> None:
    known = {"ARG", "FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "ENTRYPOINT", "CMD"}
    assert {instruction.name for instruction in INSTRUCTIONS} <= known
    assert INSTRUCTIONS[-1].name == "CMD"


def test_each_device_of_the_page_has_a_stage() -> None:
    stages = {match[1] for value in values("FROM") if (match := re.search(r" AS (\S+)$", value))}
    row = re.search(r"^\| `DEVICE` .*$", PAGE, re.MULTILINE)
    assert row is not None
    assert {f"base-{device}" for device in re.findall(r"`([a-z]+)`", row[0])} == stages
    assert f"base-{ARGUMENTS['DEVICE']}" in stages
    assert values("FROM")[-1] == "base-${DEVICE}"


def test_the_index_of_wheels_for_a_cpu_is_the_readmes() -> None:
    (index,) = re.findall(r"PIP_EXTRA_INDEX_URL=(\S+?)[`\s]", README)
    assert f"PIP_EXTRA_INDEX_URL={index}" in values("ENV")


def test_python_is_one_of_those_that_are_tested() -> None:
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    (matrix,) = re.findall(r'python: \[(".*?")\]', workflow)
    assert f'"{ARGUMENTS["PYTHON"]}"' in matrix.split(", ")


def test_extras_are_those_of_the_package() -> None:
    chosen = [ARGUMENTS["EXTRAS"], *re.findall(r"EXTRAS=(\S+)", PAGE)]
    names = {name for extras in chosen for name in extras.split(",")}
    assert names <= set(PROJECT["optional-dependencies"])
    assert {"loggers", "verify"} <= names


def test_what_is_installed_is_the_checkout_with_tested_versions() -> None:
    (install,) = [value for value in values("RUN") if "pip install" in value]
    assert '".[${EXTRAS}]"' in install
    assert "--constraint constraints.txt" in install
    assert "--no-cache-dir" in install


def test_everything_copied_is_there_and_sent_to_the_builder() -> None:
    sources = [source for value in values("COPY") for source in value.split()[:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if not sent_to_the_builder(source)] == []
    # What the build of the package reads.
    built = [PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "remax_lightning", "configs"]
    assert set(built) <= set(sources)
    assert not any(sent_to_the_builder(name) for name in (".git", "runs", ".venv", "tests"))


def test_the_command_runs_without_privileges() -> None:
    names = [instruction.name for instruction in INSTRUCTIONS]
    assert values("USER")[-1] not in ("root", "0")
    assert max(i for i, name in enumerate(names) if name == "RUN") < names.index("USER") < names.index("ENTRYPOINT")
    *_, command = re.findall(r'"(.+?)"', values("ENTRYPOINT")[0])
    assert command in PROJECT["scripts"]
    (packages,) = [value for value in values("RUN") if "apt-get install" in value]
    assert "tini" in packages
    assert "--no-install-recommends" in packages


def test_arguments_on_the_page_are_those_of_the_file() -> None:
    rows = dict(re.findall(r"^\| `([A-Z]+)` \| `(.*?)` \|", PAGE, re.MULTILINE))
    assert rows == ARGUMENTS
    assert set(re.findall(r"--build-arg ([A-Z]+)=", PAGE)) <= set(ARGUMENTS)


@pytest.mark.parametrize("command", re.findall(r"remax-lightning(?::cuda)? ([a-z]\S*)", PAGE))
def test_commands_on_the_page_are_subcommands(command: str) -> None:
    from remax_lightning.cli import TOOLS

    assert command in {*TOOLS, "fit", "validate", "test", "predict"}
