"""The layers of the package: what `eval/studies/structure.py` finds in it, and that it finds what is wrong."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def structure():
    spec = importlib.util.spec_from_file_location("structure", ROOT / "eval" / "studies" / "structure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path):
    """A package that is in order."""
    for name, text in {
        "errors": "",
        "core/oats": "import math\n",
        "models/load": "from small.core.oats import oats\nfrom small.errors import Wrong, Missing\n",
        "data/pictures": "def read():\n    from ..errors import Wrong\n",
        "cli/commands": "import small.models.load, small.data.pictures\n",
    }.items():
        file = tmp_path / "small" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "small"


def _up(structure, package):
    found = structure.modules(package)
    return structure.upward(structure.arrows(found), structure.layers(found))


def test_no_layer_of_ours_imports_one_above_it(structure):
    found = structure.modules(ROOT / "oats_vision")
    layer = structure.layers(found)
    assert {*layer.values()} == {*structure.LAYERS}
    assert structure.upward(structure.arrows(found, for_types=True), layer) == []
    assert structure.cycles(structure.arrows(found)) == []


@pytest.mark.parametrize(
    ("module", "line", "arrow"),
    [
        ("core/oats", "from small.cli import commands\n", ("small.core.oats", "small.cli.commands")),
        ("core/oats", "def late():\n    import small.models.load\n", ("small.core.oats", "small.models.load")),
        ("errors", "from .core.oats import oats\n", ("small.errors", "small.core.oats")),
        ("data/pictures", "from ..models import load\n", ("small.data.pictures", "small.models.load")),
    ],
)
def test_an_import_that_is_turned_round_is_found(structure, package, module, line, arrow):
    assert _up(structure, package) == []
    file = package / f"{module}.py"
    file.write_text(file.read_text() + line)
    assert _up(structure, package) == [arrow]


def test_arrows_cycles_and_names_are_counted(structure, package):
    found = structure.modules(package)
    links = structure.arrows(found)
    assert {name: len(targets) for name, targets in links.items()} == {
        "small.errors": 0,
        "small.core.oats": 0,
        "small.models.load": 2,
        "small.data.pictures": 1,
        "small.cli.commands": 2,
    }
    assert structure.cycles(links) == []
    assert structure.cycles(links | {"small.errors": {"small.models.load"}}) == [{"small.errors", "small.models.load"}]
    file = package / "errors.py"
    file.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import small.cli.commands\n")
    assert structure.arrows(found)["small.errors"] == set()
    assert structure.arrows(found, for_types=True)["small.errors"] == {"small.cli.commands"}
    file.write_text("def a(rate): ...\ndef b(x):\n    return c(x.rate)\ndef d(x):\n    return x\n")
    assert structure.handled(found, "rate") == {"small.errors": 2}


def test_the_graph_shows_no_arrow_that_others_imply(structure, capsys, monkeypatch):
    graph = structure.mermaid({("cli", "data"): 3, ("data", "top"): 2, ("cli", "top"): 9})
    assert graph.splitlines() == ["graph TD", "    cli -->|3| data", "    data -->|2| top"]
    monkeypatch.setattr(sys, "argv", ["structure.py"])
    structure.main()
    printed = capsys.readouterr().out
    assert re.search(r"arrows that go up +0\n", printed)
    assert re.search(r"modules +\d{2,3}\n", printed)
