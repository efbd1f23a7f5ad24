"""A method of the user's own: one registration, and everything follows."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

import oats_vision as ov
from oats_vision.calibration.statistics import SecondMoment
from oats_vision.cli.commands import app
from oats_vision.compression import methods
from oats_vision.compression.methods import LinearMethod, register
from oats_vision.core.oats import Factors, arithmetic


@pytest.fixture
def checkerboard():
    @register
    class Checkerboard(LinearMethod):
        """Every other weight."""

        name = "checkerboard"
        citation = "None, 2026"

        def statistic(self, settings, in_features, device):
            return SecondMoment(in_features, device)

        def decompose(self, weight, statistic, budget, settings):
            W = arithmetic(weight)
            kept = torch.arange(W.shape[0])[:, None] + torch.arange(W.shape[1])
            return Factors.sparse(W, W * (kept % 2), statistic.scale().to(W))

    yield
    methods.unregister("checkerboard")


def test_it_is_in_help_and_errors_and_runs_saves_and_loads(checkerboard, model_directory, tmp_path):
    run = CliRunner()
    assert "or wanda" in run.invoke(app, ["compress", "--help"]).stdout
    assert "checkerboard" in run.invoke(app, ["compress", "--help"]).stdout
    assert "checkerboard" in run.invoke(app, ["sweep", "--help"]).stdout
    assert json.loads(run.invoke(app, ["models", "--json"]).stdout)["methods"]["checkerboard"] == "None, 2026"
    assert "checkerboard" in str(run.invoke(app, ["compress", "--method", "checker"]).exception)
    command = [
        "compress",
        "--model",
        str(model_directory),
        "--data",
        "demo",
        "--samples",
        "8",
        "--no-eval",
        "--no-report",
    ]
    done = run.invoke(app, [*command, "--method", "checkerboard", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.exception
    assert json.loads((tmp_path / "out" / "config.json").read_text())["settings"]["method"] == "checkerboard"
    layers = [m for m in ov.load(tmp_path / "out").modules() if isinstance(m, ov.SparseLowRankLinear)]
    assert layers
    assert all(layer.spec.nonzeros == layer.in_features * layer.out_features // 2 for layer in layers)


def test_a_checkpoint_of_a_method_that_is_not_registered_here_loads(checkerboard, tiny_vit, pictures, tmp_path):
    dense = copy.deepcopy(tiny_vit)
    ov.compress(tiny_vit, pictures, method="checkerboard").save(tmp_path / "out")
    methods.unregister("checkerboard")
    assert torch.equal(ov.load(tmp_path / "out", model=dense)(pictures[0]), tiny_vit(pictures[0]))


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(ValueError, match="'wanda' is registered already"):

        @register
        class Wanda2(type(methods.find("wanda"))):
            pass
