"""The Dockerfile against the package: what it installs, copies and starts is there, and its page says what it does."""

from __future__ import annotations

import re
import subprocess
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


def pip_install(device: str) -> subprocess.CompletedProcess[str]:
    """The instruction that installs the package, run by a shell in which Python prints the index and its arguments."""
    (install,) = [value for value in values("RUN") if "pip install" in value]
    python = 'python() { echo "index=${PIP_EXTRA_INDEX_URL}"; echo "$@"; }'
    return subprocess.run(
        ["sh", "-c", f"{python}\n{install}"],
        env={"DEVICE": device, "EXTRAS": ARGUMENTS["EXTRAS"]},
        capture_output=True,
        text=True,
        check=False,
    )


def test_each_device_of_the_page_installs_its_wheels() -> None:
    row = re.search(r"^\| `DEVICE` .*$", PAGE, re.MULTILINE)
    assert row is not None
    (index,) = re.findall(r"PIP_EXTRA_INDEX_URL=(\S+?)[`\s]", README)
    indexes = {"cpu": index, "cuda": ""}
    assert {*re.findall(r"`([a-z]+)`", row[0])} == {*indexes}
    assert ARGUMENTS["DEVICE"] in indexes
    for device, expected in indexes.items():
        done = pip_install(device)
        assert done.returncode == 0
        assert done.stdout.splitlines()[0] == f"index={expected}"
        assert done.stdout.splitlines()[1].endswith(f".[{ARGUMENTS['EXTRAS']}]")


def test_another_device_ends_the_build() -> None:
    done = pip_install("gpu")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "DEVICE must be cpu or cuda, got gpu\n"


def test_one_stage_that_every_builder_knows() -> None:
    assert values("FROM") == [
        "python:${PYTHON}-slim"
    ]  # older releases of Podman's builder know no `FROM base-${DEVICE}`


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
