"""The scripts of examples/ run on what is there without a network, and each fits on a screen."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def test_there_are_five():
    names = ["clip_tower", "dinov2_probe", "language_model", "own_model", "timm_classifier"]
    assert [path.stem for path in EXAMPLES] == names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, monkeypatch, capsys):
    assert len(path.read_text().splitlines()) < 60
    monkeypatch.setattr(sys, "argv", [path.name, "--tiny", "--out", str(tmp_path / "out")])
    made = runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "bytes on disk" in printed
    assert f"python examples/{path.name} --tiny" in made["__doc__"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size
