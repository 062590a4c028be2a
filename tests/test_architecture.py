"""The figures of `docs/architecture.md`: the script measures what it says, and the page has its table."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_architecture", DOCS / "measure_architecture.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table(script: ModuleType) -> None:
    made = (DOCS / "architecture.md").read_text().split(script.BEGIN)[1].split(script.END)[0]
    labels = [line.split(" | ")[0].removeprefix("| ") for line in made.strip().splitlines()[2:]]
    assert labels == [row.what for row in script.ROWS]


def test_the_map_has_every_part_of_the_package(script: ModuleType) -> None:
    page = (DOCS / "architecture.md").read_text()
    folders = {path.parent.name for path in script.PACKAGE.glob("*/*.py")}
    assert [folder for folder in sorted(folders) if f"`{folder}/`" not in page] == []


def test_comments_without_instructions_to_tools_count(script: ModuleType) -> None:
    assert script.count_comments("# why\nx = '# text'  # noqa: E501\ny = 1  # here\n") == 2


@pytest.mark.parametrize(
    ("source", "count"),
    [("found = 1", 1), ("for each in x: pass", 1), ("def f(own): pass", 1), ("print(found)", 0), ("score = 1", 0)],
)
def test_vague_names_count_where_they_are_bound(script: ModuleType, source: str, count: int) -> None:
    assert script.count_vague_names(ast.parse(source)) == count


@pytest.mark.parametrize(
    ("source", "sharding", "collective"),
    [
        ("hasattr(weight, 'ds_id')", True, False),
        ("from torch.distributed.fsdp import FSDPModule", True, False),
        ("dist.all_reduce(x)", False, True),
        ("self.trainer.strategy.reduce(x)", False, True),
        ("functools.reduce(f, xs)", False, False),
        ("'a text about ds_id'", False, False),
    ],
)
def test_markers_and_collectives_are_seen(script: ModuleType, source: str, sharding: bool, collective: bool) -> None:
    tree = ast.parse(source)
    assert (script.reads_sharding(tree), script.calls_collective(tree)) == (sharding, collective)


@pytest.mark.slow
def test_a_step_is_measured(script: ModuleType) -> None:
    step = script.measure_step()
    assert "ReMaxModule.training_step" in step.functions["modules/remax.py"]
    assert "remax_advantages" in step.functions["functional/advantages.py"]
    assert 3 < step.depth < 30
    assert "data/collate.py" in step.data_files
