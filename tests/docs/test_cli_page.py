"""The command line's page has the help of every command, as the documentation's build makes it."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_is_there_with_its_flags(hooks):
    page = hooks.with_help((DOCS / "cli.md").read_text())
    assert "<!--" not in page
    assert "Usage: oats-vision eval linear-probe" in page
    assert "--rate X" in page
    assert max(map(len, page.splitlines())) < 140


def test_a_command_without_a_place_is_an_error(hooks):
    page = (DOCS / "cli.md").read_text()
    with pytest.raises(ValueError, match="see to oats-vision bench"):
        hooks.with_help(page.replace("<!-- oats-vision bench -->", ""))
    with pytest.raises(ValueError, match="see to oats-vision push"):
        hooks.with_help(f"{page}\n<!-- oats-vision push -->\n")
