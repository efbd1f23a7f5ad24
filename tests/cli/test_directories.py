"""`oats-vision inspect`, `rollout` and `bench`: what a user can get wrong, each said in one line with its name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from PIL import Image
from typer.testing import CliRunner

import oats_vision as ov
from oats_vision.cli.commands import app
from oats_vision.cli.flags import with_flags
from oats_vision.errors import OatsVisionError
from oats_vision.runs.config import RunConfig


@pytest.fixture(scope="module")
def saved(model_directory, tmp_path_factory) -> Path:
    model, _ = ov.load_model(str(model_directory))
    ov.compress(model, [torch.randn(4, 3, 28, 28)], rate=0.5, iterations=2)
    directory = tmp_path_factory.mktemp("saved") / "vit [v2]"
    ov.save(model, directory)
    return directory


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures [1]"
    (folder / "empty").mkdir(parents=True)
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (28, 28), (200, 30, 90)).save(folder / name)
    (folder / "note.txt").write_text("no picture")
    return folder


def _run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output, and the one line of the error; anything but an error of ours is raised."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if isinstance(done.exception, OatsVisionError):
        return 1, done.stdout, with_flags(str(done.exception))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_inspect_shows_names_whole(saved, tmp_path):
    page = tmp_path / "page [draft].html"
    status, shown, _ = _run("inspect", saved, "--html", page)
    assert status == 0
    assert saved.name in shown
    assert f"Written to {page}." in shown
    assert page.exists()
    (saved / "report.json").write_text(json.dumps({"evaluations": [None, {"protocol": 3}]}))
    assert _run("inspect", saved, "--html", page)[0] == 0
    (saved / "report.json").write_text("[]")
    assert "report.json is damaged" in _run("inspect", saved, "--html", page)[2]
    (saved / "report.json").unlink()


INSPECT = {
    "missing": (["{tmp}/none"], "none does not exist"),
    "a file": (["{tmp}/pictures [1]/note.txt"], "note.txt is a file"),
    "no checkpoint": (["{tmp}"], "not a compressed model"),
    "page in no folder": (["{saved}", "--html", "{tmp}/none/x.html"], "--html {tmp}/none/x.html: the folder"),
    "page is a folder": (["{saved}", "--html", "{tmp}"], "--html {tmp} is a folder"),
    "page is the checkpoint's": (["{saved}", "--html", "{saved}/config.json"], "is a file of the checkpoint"),
}


@pytest.mark.parametrize(("arguments", "message"), INSPECT.values(), ids=INSPECT.keys())
def test_wrong_places_of_inspect(arguments, message, saved, pictures, tmp_path):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    status, _, error = _run("inspect", *(one.format(tmp=tmp_path, saved=saved) for one in arguments))
    assert status == 1
    assert message.format(tmp=tmp_path) in error
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


ROLLOUT = {
    "missing": (["{tmp}/none", "--images", "{images}"], "none does not exist"),
    "no pictures": (["{saved}", "--images", "{images}/empty"], "empty has no picture"),
    "missing pictures": (["{saved}", "--images", "{images}/none"], "none does not exist"),
    "none that can be read": (["{saved}", "--images", "{images}/note.txt"], "none of 1 files could be read"),
    "a file to write to": (["{saved}", "--images", "{images}", "--out", "{images}/a.png"], "cannot be made"),
    "over the pictures": (["{saved}", "--images", "{images}", "--out", "{images}"], "would overwrite the picture"),
}


@pytest.mark.parametrize(("arguments", "message"), ROLLOUT.values(), ids=ROLLOUT.keys())
def test_wrong_places_of_rollout(arguments, message, saved, pictures, tmp_path):
    places = {"tmp": tmp_path, "saved": saved, "images": pictures}
    before = {file: file.read_bytes() for file in pictures.iterdir() if file.is_file()}
    status, _, error = _run("rollout", "--out", tmp_path / "out", *(one.format(**places) for one in arguments))
    assert status == 1
    assert message in error
    assert {file: file.read_bytes() for file in pictures.iterdir() if file.is_file()} == before


def test_rollout_draws_each_picture_once_and_leaves_no_other_file(saved, pictures, tmp_path):
    shutil.copy(pictures / "a.png", pictures / "empty" / "a.png")
    command = ["rollout", saved, "--images", pictures, "--images", pictures / "a.png", "--out", tmp_path / "out [x]"]
    status, shown, _ = _run(*command)
    assert status == 0
    assert f"3 pictures written to {tmp_path / 'out [x]'}." in shown
    assert sorted(file.name for file in (tmp_path / "out [x]").iterdir()) == ["a.png", "b.png", "empty_a_3.png"]


def test_bench_of_what_is_not_finite_is_an_error(saved, monkeypatch):
    load = ov.load

    def broken(*arguments: object, **options: object) -> torch.nn.Module:
        model = load(*arguments, **options)
        with torch.no_grad():
            model.norm.weight[0] = float("inf")
        return model

    monkeypatch.setattr("oats_vision.checkpoint.load", broken)
    status, _, error = _run("bench", saved, "--repeats", 1)
    assert status == 1
    assert "outputs of the dense model are not finite in torch.float32" in error


def test_bench_needs_positions_for_its_text(tmp_path):
    config = hf.GPT2Config(vocab_size=50, n_positions=32, n_embd=48, n_layer=1, n_head=3)
    model = hf.GPT2LMHeadModel(config).eval()
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    ov.compress(model, [{"input_ids": ids}], rate=0.5, iterations=2)
    ov.save(model, tmp_path / "gpt")
    for options, flag in ((["--prompt", 33], "--prompt"), (["--prompt", 8, "--new-tokens", 17], "--new-tokens")):
        status, _, error = _run("bench", tmp_path / "gpt", "--repeats", 1, *options)
        assert status == 1
        assert error.startswith(f"{flag}: the model has 32 positions, and 33 tokens")
    for command in ("inspect", "bench"):
        assert "does not exist" in _run(command, tmp_path / "none")[2]


def test_the_root_is_no_checkpoint_and_no_place_for_one():
    assert "config.json" in _run("inspect", "/")[2]
    assert "root of all folders" in _run("compress", "--out", "/")[2]


def test_a_rollout_of_a_language_model_is_refused_as_such(language_directory, pictures, tmp_path):
    model, _ = ov.load_model(str(language_directory))
    ov.compress(model, [torch.randint(0, 50, (4, 12))], rate=0.5, iterations=2)
    ov.save(model, tmp_path / "text")
    words = _run("rollout", tmp_path / "text", "--images", pictures, "--out", tmp_path / "out")[2]
    assert "rollouts are of models that read pictures" in words
    assert "reads text" in words


def test_a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunConfig(out="~/out", tensorboard="~/runs").out == tmp_path / "out"
    assert RunConfig(tensorboard="~/runs").tensorboard == tmp_path / "runs"
    assert RunConfig(out="~nosuchuser/out").out == Path("~nosuchuser/out")
