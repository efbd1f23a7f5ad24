"""A protocol of one's own: one registration, and it is a command, runs, is written down, and is on the page."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import Field, create_model
from torch import nn
from typer.testing import CliRunner

import oats_vision as ov
from oats_vision.analysis.html_report import write_html
from oats_vision.cli.commands import build
from oats_vision.cli.evaluate import evaluation_command
from oats_vision.errors import ConfigError
from oats_vision.evaluation.paired import Accuracy
from oats_vision.evaluation.protocols import (
    Given,
    LabelledPictures,
    Measurement,
    base,
    find_protocol,
    protocol,
    protocols,
)
from oats_vision.evaluation.protocols.base import rank_of
from oats_vision.evaluation.stored import read_report


@pytest.fixture
def only_here() -> Iterator[None]:
    """Protocols that are registered in one test are forgotten after it."""
    before = dict(base._protocols)
    yield
    base._protocols.clear()
    base._protocols.update(before)


@pytest.fixture
def sure(only_here) -> None:
    """A protocol with a setting of its own."""

    class Settings(LabelledPictures):
        share: float = Field(0.5, gt=0, lt=1, description="of the probability, to be sure of a class")

    @protocol("sure", Settings, title="certainty", examples="  oats-vision eval sure vit_b_50 --data imagenet/val")
    def sure(model: nn.Module, given: Given[Settings]) -> Measurement:
        """How often the model is sure of its answer."""
        with torch.inference_mode():
            shares = torch.cat([model(pictures).softmax(1).amax(1) for pictures, _ in given.data["data"]])
        accuracy = Accuracy(shares > given.settings.share)
        return Measurement({"sure": accuracy}, samples=len(shares), details={"mean_share": float(shares.mean())})


@pytest.fixture
def checkpoint(model_directory, tmp_path) -> Path:
    model, _ = ov.load_model(model_directory)
    ov.compress(model, [torch.randn(4, 3, 28, 28)], rate=0.5, iterations=1)
    ov.save(model, tmp_path / "out")
    write_html(tmp_path / "out", tmp_path / "out" / "report.html")
    return tmp_path / "out"


@pytest.mark.usefixtures("sure")
def test_a_protocol_of_ones_own_is_a_command_with_its_options_and_its_place_on_the_page(checkpoint):
    shown = CliRunner().invoke(build(), ["eval", "--help"]).stdout
    assert "How often the model is sure of its answer." in shown
    shown = CliRunner().invoke(build(), ["eval", "sure", "--help"], env={"COLUMNS": "120"}).stdout
    assert "--share X" in shown
    assert "of the probability, to be sure of a class [in (0, 1); default: 0.5]" in shown
    assert "--data DATA" in shown

    options = ["--data", "demo", "--samples", "20", "--share", "0.12"]
    done = CliRunner().invoke(build(), ["eval", "sure", str(checkpoint), *options, "--json"], catch_exceptions=False)
    result = json.loads(done.stdout)
    assert (result["protocol"], result["data"], result["settings"]["share"]) == ("certainty", "demo", 0.12)
    for which in ("dense", "compressed"):
        assert result[which]["samples"] == 20
        assert result[which]["metrics"][0]["name"] == "sure"
        assert 0.1 < result[which]["mean_share"] < 1
    points = result["compressed"]["metrics"][0]["value"] - result["dense"]["metrics"][0]["value"]
    assert result["difference"]["sure"]["points"] == pytest.approx(points)
    assert json.loads((checkpoint / "report.json").read_text())["evaluations"] == [result]
    (found,) = read_report(checkpoint).evaluations
    assert found.to_dict() == result
    assert "certainty" in (checkpoint / "report.html").read_text()

    table = CliRunner().invoke(build(), ["eval", "sure", str(checkpoint), *options], catch_exceptions=False).stdout
    assert "certainty of" in table
    assert "sure" in table
    wrong = CliRunner().invoke(build(), ["eval", "sure", str(checkpoint), "--data", "demo", "--share", "2"])
    assert str(wrong.exception) == "--share must be in (0, 1), got 2"


@pytest.fixture
def firsts(only_here) -> None:
    """Top-1 and top-2, as a user would write them."""

    @protocol("firsts", LabelledPictures)
    def firsts(model: nn.Module, given: Given[LabelledPictures]) -> Measurement:
        """How often the right class is the first, and among the first two."""
        ranks = [(logits > logits.gather(1, labels[:, None])).sum(1) for logits, labels in given.classified(model)]
        rank = torch.cat(ranks)
        compared = {"top-1": Accuracy(rank < 1), "top-2": Accuracy(rank < 2)}
        return Measurement(compared, samples=len(rank), details={"ranks": rank.tolist()})


@pytest.fixture
def folders(tmp_path, model_directory) -> Path:
    """Folders named by the head's positions: half of the pictures are of the model's first class, half its second."""
    generator = np.random.default_rng(0)
    model, transform = ov.load_model(model_directory)
    for i in range(24):
        picture = Image.fromarray(generator.integers(256, size=(28, 28, 3), dtype=np.uint8))
        label = int(model(transform(picture)[None]).topk(2).indices[0, i % 2])
        (tmp_path / "val" / str(label)).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "val" / str(label) / f"{i}.png")
    return tmp_path / "val"


@pytest.mark.usefixtures("firsts")
@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16"), ("--mixed-precision", "bfloat16")])
def test_a_protocol_of_ones_own_classifies_as_top1_does(options, folders, model_directory):
    """Folders whose order is not the head's, in any dtype."""

    def measured(name: str) -> dict[str, Any]:
        arguments = ["eval", name, str(model_directory), "--data", str(folders), "--json", *options]
        done = CliRunner().invoke(build(), arguments, catch_exceptions=False)
        return json.loads(done.stdout)["dense"]

    ours, top1 = measured("firsts"), measured("top1")
    assert len([*folders.iterdir()]) < 10  # of the head's: labels of the data are not the head's
    first, second = (metric["value"] for metric in ours["metrics"])
    assert first == top1["top1"]
    if not options:
        assert (first, second) == (50, 100)  # as the folders were made
    assert 30 < first < second


def test_a_page_that_cannot_be_written_anew_is_said_in_one_line(checkpoint, monkeypatch, caplog):
    before = (checkpoint / "report.html").read_text()

    def full(*arguments: object) -> str:
        raise ConfigError("no page today")

    monkeypatch.setattr("oats_vision.analysis.html_report.html_report", full)
    arguments = ["eval", "top1", str(checkpoint), "--data", "demo", "--samples", "8", "--no-dense", "--json"]
    done = CliRunner().invoke(build(), arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "the page was not rewritten: no page today" in caplog.text
    assert (checkpoint / "report.html").read_text() == before
    assert json.loads((checkpoint / "report.json").read_text())["evaluations"] == [json.loads(done.stdout)]


def test_names_are_taken_once_and_the_one_that_says_most_is_first():
    assert [one.name for one in protocols() if one.settings.unit == "pictures"] == ["top1", "linear-probe", "knn"]
    assert [one.name for one in protocols() if one.settings.unit == "sequences"] == ["perplexity", "lm"]
    with pytest.raises(ValueError, match="'knn' is registered already"):
        protocol("knn", LabelledPictures)(lambda model, given: Measurement({}, 1))
    with pytest.raises(ConfigError, match=r"must be one of perplexity, top1, .*, knn, got 'kn'"):
        find_protocol("kn")


@pytest.mark.usefixtures("only_here")
def test_a_rank_is_of_the_title_itself_and_not_of_one_that_ends_alike():
    for name, title, rank in (("zero-shot-top1", "", 50), ("robust", "robust top1", 60)):
        protocol(name, LabelledPictures, title=title, rank=rank)(lambda model, given: Measurement({}, 1))
    assert rank_of("zero-shot-top1") == (50, False)
    assert rank_of("robust top1") == (60, False)
    assert rank_of("linear probe") == (2, False)
    assert rank_of("quick linear probe") == (2, True)
    assert rank_of("other-top1") == (1000, True)


@pytest.mark.usefixtures("only_here")
def test_a_cell_that_is_run_again_registers_its_protocol_again():
    def cell(words: str) -> None:
        @protocol("mine", LabelledPictures)
        def mine(model: nn.Module, given: Given[LabelledPictures]) -> Measurement:
            return Measurement({}, 1, unit=words)

    for words in ("first", "second"):
        cell(words)
    assert find_protocol("mine").function(nn.Identity(), Given(LabelledPictures(data="demo"), {})).unit == "second"
    assert [one.name for one in protocols()].count("mine") == 1


@pytest.mark.usefixtures("only_here")
@pytest.mark.filterwarnings("ignore:Field name .json. .* shadows")
def test_a_setting_named_as_an_option_of_every_command_is_refused():
    ours = inspect.signature(evaluation_command(find_protocol("top1"))).parameters.keys()
    assert ours - LabelledPictures.model_fields.keys() == base.OPTIONS - {"json", "help"}
    for name in base.OPTIONS:
        kind = create_model("Mine", __base__=LabelledPictures, **{name: (str, "auto")})
        with pytest.raises(ValueError, match=f"Mine.{name} is an option of every command: give the setting another"):
            protocol("mine", kind)
