"""The notebooks run from top to bottom on the demo, use public names, and are committed with their figures."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["inside_a_layer", "linear_probe", "rank_ratio", "rate_and_values"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_notebook(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    source = "\n".join(cell.source for cell in code)
    assert not re.search(r"oats_vision\.(core|pipeline|layers)|[\s.(]_[a-z]", source)

    def figures() -> int:
        return sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)

    committed = figures()
    assert committed >= 1
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert figures() == committed
