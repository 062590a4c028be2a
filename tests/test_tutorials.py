"""The tutorials as files; tests/real runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import ROOT

FOLDER = ROOT / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_pages_list_every_tutorial() -> None:
    page = (ROOT / "docs" / "README.md").read_text()
    assert len(NOTEBOOKS) >= 5
    assert [path.name for path in NOTEBOOKS if f"(tutorials/{path.name})" not in page] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_is_saved_without_outputs(path: Path) -> None:
    code = cells(path, "code")
    assert code
    assert [cell["outputs"] for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    assert "".join(cells(path, "markdown")[0]["source"]).startswith("# ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_tutorial_lead_somewhere(path: Path) -> None:
    text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    for target, anchor in re.findall(r"\]\(([^)#:]+)(?:#([\w-]+))?\)", text):
        assert (path.parent / target).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (path.parent / target).read_text(), re.MULTILINE)
            names = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in names, f"{target}#{anchor}"
