"""The tutorials, run from their first cell to their last in a kernel of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow(12)

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.ipynb"))
HANGS = 900
"""Seconds after which a cell hangs. Readers wait 40 seconds for a tutorial, which is no matter of a busy machine."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path: Path, tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    # A cell that raises is an error here, with its traceback. A kernel on a busy machine starts slowly, too.
    nbclient.NotebookClient(
        notebook,
        timeout=HANGS,
        startup_timeout=HANGS,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "Traceback" not in text
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    assert list(tmp_path.iterdir()) == []  # a reader's folder stays as it was
