"""`oats-vision eval`, `rollout` and the HTML report as a user runs them, on a tiny ViT compressed once."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from command import run
from oats_vision.cli.commands import app
from oats_vision.errors import ConfigError


@pytest.fixture(scope="module")
def compressed(model_directory, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "vit_50"
    done = run(
        "compress", "--model", model_directory, "--data", "demo", "--samples", 20, "--iterations", 5, "--out", out
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Folders a and b with 30 pictures each, told apart by their brightness, and files that are none."""
    directory = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, level in (("a", 60), ("b", 180)):
        (directory / name).mkdir()
        for i in range(30):
            noise = generator.integers(level - 50, level + 50, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(noise).save(directory / name / f"{i}.png")
        (directory / name / "notes.txt").write_text("no picture")
    (directory / "a" / "broken.png").write_bytes(b"no picture")
    return directory


def _probe(protocol: str, model: Path, train: object, val: object, *options: object):
    return run("eval", protocol, model, "--train", train, "--val", val, *options)


PROTOCOLS = {
    "linear-probe": ["--iterations", 50, "--probe-batch", 20],
    "linear-probe --quick": ["--quick"],
    "knn": ["--k", 5],
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_both_models_by_every_protocol_with_interval_cache_and_report(protocol, compressed, pictures, tmp_path):
    model = shutil.copytree(compressed, tmp_path / "model")
    command = [protocol.split()[0], model, pictures, pictures, "--cache", tmp_path / "cache", *PROTOCOLS[protocol]]
    done = _probe(*command, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (difference,) = result["difference"].values()
    assert difference["low"] <= difference["points"] <= difference["high"]
    for which in ("dense", "compressed"):
        score = result[which]["top1"]
        assert (score if isinstance(score, float) else score["5"]) > 90  # the features of bright and dark differ
        assert (result[which]["train_pictures"], result[which]["skipped"]) == (60, 2)
        assert result[which]["extraction_seconds"] > 0
    assert len(list((tmp_path / "cache").iterdir())) == 2  # one set of pictures, two models

    again = _probe(*command)
    assert again.returncode == 0, again.stderr
    for words in ("dense", "compressed", "95% interval", "cached", "60 / 60", " points ["):
        assert words in again.stdout
    (evaluation,) = json.loads((model / "report.json").read_text())["evaluations"]
    assert evaluation["protocol"].replace("-NN", "nn").replace("quick ", "") == protocol.split()[0].replace("-", " ")

    page = tmp_path / "report.html"
    assert run("inspect", model, "--html", page).returncode == 0
    assert evaluation["protocol"] in page.read_text()


def test_mixed_precision_and_other_inputs_of_top1(compressed):
    common = ["eval", "top1", compressed, "--data", "demo", "--samples", 60, "--json"]
    plain = json.loads(run(*common).stdout)
    mixed = json.loads(run(*common, "--mixed-precision", "bfloat16", "--no-dense").stdout)
    assert plain["compressed"]["pictures_per_second"] > 0
    assert "dense" not in mixed
    assert mixed["compressed"]["top1"] == pytest.approx(plain["compressed"]["top1"], abs=10)


def test_rollout_writes_a_picture_each_and_passes_over_what_is_none(compressed, pictures, tmp_path):
    (tmp_path / "few").mkdir()
    for name in ("1.png", "2.png", "broken.png", "notes.txt"):
        shutil.copy(pictures / "a" / name, tmp_path / "few")
    out = tmp_path / "rollouts"
    done = run("rollout", compressed, "--images", tmp_path / "few", "--images", pictures / "b" / "1.png", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "3 pictures written" in done.stdout
    assert "broken.png is not a picture" in done.stderr.replace("\n", "")
    assert len(list(out.iterdir())) == 3  # two are named 1.png
    for file in out.iterdir():
        with Image.open(file) as drawn:
            assert drawn.size[0] > 3 * drawn.size[1]
    limited = run("rollout", compressed, "--images", tmp_path / "few", "--limit", 1, "--out", tmp_path / "one")
    assert "1 pictures written" in limited.stdout
    for images, message in ((pictures / "none", "does not exist"), (pictures / "a" / "broken.png", "none of 1 files")):
        done = run("rollout", compressed, "--images", images, "--out", tmp_path / "other")
        assert done.returncode == 1
        assert message in done.stderr


def _one_class(path: Path) -> list[object]:
    (path / "one" / "a").mkdir(parents=True)
    Image.new("RGB", (28, 28)).save(path / "one" / "a" / "x.png")
    return ["--train", path / "one", "--val", path / "one"]


def _no_pictures(path: Path) -> list[object]:
    for name in "ab":
        (path / "text" / name).mkdir(parents=True)
        (path / "text" / name / "x.txt").write_text("no picture")
    return ["--train", path / "text", "--val", path / "text"]


def _missing_split(path: Path) -> list[object]:
    columns = {"image": [Image.new("RGB", (28, 28))], "label": [0]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk(path / "set")
    return ["--train", path / "set", "--val", path / "set"]


BAD = {
    "one class": (_one_class, "the data has one class: a probe needs pictures of at least two"),
    "no pictures": (_no_pictures, "has no picture (looked for .jpg"),
    "missing split": (_missing_split, "has no split 'validation', only train"),
    "missing folder": (lambda path: ["--train", path / "none", "--val", "demo"], "does not exist"),
    "other classes": (lambda path: ["--train", "demo"], "the classes of --train and --val differ"),
    "too many neighbours": (lambda path: ["--k", 70], "k must be at most the number of training pictures, 60"),
    "temperature": (lambda path: ["--temperature", "nan"], "--temperature must be a finite number, above 0, got 'nan'"),
    "dense and none": (lambda path: ["--dense", "demo", "--no-dense"], "give either --dense or --no-dense"),
    "another model": (lambda path: ["--dense", "demo"], "is not a vit_tiny_patch16_224 as in"),
    "precision": (lambda path: ["--mixed-precision", "int8"], "must be float32, float16 or bfloat16, got 'int8'"),
    "cache is a file": (lambda path: ["--cache", __file__], "cannot be made"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line(options, message, compressed, pictures, tmp_path):
    done = _probe("knn", compressed, pictures, pictures, "--cache", tmp_path / "cache", *options(tmp_path))
    assert done.returncode == 1
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "cache").glob("*.tmp")) + list((tmp_path / "cache").glob(".*"))


def test_damaged_cache_is_said_and_can_be_passed_over(compressed, pictures, tmp_path):
    command = ["knn", compressed, pictures, pictures, "--no-dense", "--k", 5, "--cache", tmp_path]
    assert _probe(*command).returncode == 0
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    done = _probe(*command)
    assert done.returncode == 1
    assert f"{file.name} in the feature cache is damaged" in done.stderr.replace("\n", "")
    assert _probe(*command, "--no-cache").returncode == 0


@pytest.mark.parametrize("home", ["a file", "unknown"])
def test_without_a_home_features_are_extracted_and_not_kept(home, compressed, pictures, tmp_path, monkeypatch, caplog):
    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    if home == "unknown":
        monkeypatch.setattr(Path, "expanduser", unknown)
    else:
        monkeypatch.setenv("HOME", str(pictures / "a" / "notes.txt"))
    arguments = ["eval", "knn", compressed, "--train", pictures, "--val", pictures, "--k", 5, "--json"]
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["compressed"]["train_pictures"] == 60
    assert caplog.text.count("features are not kept") == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch-size", 0), ("workers", -1), ("seed", -1), ("train-samples", 0), ("val-samples", -3), ("k", 0)],
)
def test_numbers_out_of_range_are_said_by_their_flag(option, value, compressed):
    arguments = ["eval", "knn", compressed, "--train", "demo", "--val", "demo", f"--{option}", value]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 1
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith(f"--{option} must be ")
    assert str(done.exception).endswith(f"got {value}")


def test_help_shows_the_defaults_in_brackets():
    for command, words in (("knn", "10 20 100 200"), ("linear-probe", "the one that was compressed")):
        shown = CliRunner().invoke(app, ["eval", command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
        assert f"default: {words}]" in shown


def test_a_damaged_report_does_not_lose_what_was_measured(compressed, tmp_path):
    model = shutil.copytree(compressed, tmp_path / "model")
    (model / "report.json").write_text("{")
    done = run("eval", "top1", model, "--data", "demo", "--samples", 8, "--no-dense", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["compressed"]["pictures"] == 8
    assert "report.json is damaged" in done.stderr
    assert "Traceback" not in done.stderr
