"""Wrong inputs of a command: one line that says what was given and what to do, and nothing is written."""

import gzip
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from oats_vision.cli import ending
from oats_vision.cli.commands import app
from oats_vision.errors import did_you_mean, near, saying

VISION = ["compress", "--model", "{model}", "--samples", "2", "--iterations", "1", "--out", "out"]
TEXT = [
    "compress",
    "--model",
    "{language}",
    "--sequence-length",
    "16",
    "--samples",
    "2",
    "--iterations",
    "1",
    "--out",
    "out",
]


@pytest.fixture
def place(tmp_path, monkeypatch, model_directory, language_directory) -> dict[str, str]:
    """A folder of what a user may have, and the names of the models."""
    monkeypatch.chdir(tmp_path)
    for name in ("train/cat", "train/dog", "empty", "notes", "rows"):
        Path(name).mkdir(parents=True)
    for name in ("train/cat/1.png", "train/dog/1.png", "one.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(name)
    Path("notes/a.txt").write_text("text")
    Path("book.txt").write_text("Call me Ishmael. " * 100)
    Path("weights.bin").write_bytes(b"0")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    Path("cut.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    pictures = datasets.Dataset.from_dict({"imge": ["one.png"], "lable": [0]})
    pictures.to_parquet("rows/train.parquet")
    datasets.DatasetDict({"train": pictures}).save_to_disk("saved")
    (tmp_path / "image").mkdir()
    pictures.rename_columns({"imge": "image", "lable": "label"}).to_parquet("image/train.parquet")
    return {"model": str(model_directory), "language": str(language_directory)}


WRONG = {
    "levels switched off": (
        ["compress", "--values", "nf4", "--no-symmetric"],
        ["--no-symmetric must be left out with"],
    ),
    "levels for bits": (["compress", "--bits", "3", "--no-symmetric"], ["--no-symmetric must be left out with bits"]),
    "model misspelt": (
        ["compress", "--model", "vit_bas_patch16", "--data", "train"],
        ["unknown model 'vit_bas_patch16'", "vit_base_patch16_224'"],
    ),
    "alias misspelt": (["compress", "--model", "dinov2_vitl4", "--data", "train"], ["Did you mean 'dinov2_vitl14'"]),
    "model without hf:": (["compress", "--model", "google/vit", "--data", "train"], ["give hf:google/vit"]),
    "model directory misspelt": (
        ["compress", "--model", "./trian", "--data", "train"],
        ["./trian does not exist", "Did you mean 'train'"],
    ),
    "weights misspelt": (
        ["compress", "--model", "vit_tiny_patch16_224.augre", "--data", "train"],
        ["has no weights 'augre', only augreg_in21k"],
    ),
    "model is a file": (["compress", "--model", "book.txt", "--data", "train"], ["book.txt is a file"]),
    "model is a folder of pictures": (["compress", "--model", "train", "--data", "train"], ["no config.json"]),
    "gguf missing": (["compress", "--model", "a.gguf", "--data", "book.txt"], ["a.gguf does not exist"]),
    "data misspelt": ([*VISION, "--data", "trian"], ["trian does not exist", "Did you mean 'train'?"]),
    "data below a misspelt folder": ([*VISION, "--data", "trian/cat"], ["does not exist", "Did you mean 'train'?"]),
    "a picture as data": ([*VISION, "--data", "one.png"], ["one.png is a file: give the folder"]),
    "a text for a vision model": ([*VISION, "--data", "book.txt"], ["book.txt is a file", "a folder of pictures"]),
    "an empty folder": ([*VISION, "--data", "empty"], ["empty has no picture"]),
    "a folder of texts": ([*VISION, "--data", "notes"], ["notes has no picture", "but .txt files"]),
    "a folder of parquet": ([*VISION, "--data", "rows"], ["give hf:rows to read them"]),
    "no such split": (
        [*VISION, "--data", "hf:rows", "--split", "trian"],
        ["no split 'trian', only train. Did you mean 'train'?"],
    ),
    "no such split of a stream": (
        [*VISION, "--data", "hf:rows", "--split", "test", "--streaming"],
        ["no split 'test', only train"],
    ),
    "no such split of a saved one": (
        [*VISION, "--data", "saved", "--split", "trian"],
        ["no split 'trian'", "Did you mean 'train'?"],
    ),
    "no such configuration": (
        [*VISION, "--data", "hf:rows:defalt"],
        ["no configuration 'defalt', only default. Did you mean 'default'?"],
    ),
    "column misspelt": ([*VISION, "--data", "hf:rows"], ["only imge, lable: rename `imge` to `image`"]),
    "no labels to evaluate": ([*VISION, "--data", "train", "--eval-data", "train/cat"], ["has no labels"]),
    "classes": ([*VISION, "--data", "train", "--eval-data", "train"], ["2 classes", "head has 10"]),
    "skip misspelt": ([*VISION, "--data", "train", "--skip", "blocks.0.mlp.fc9"], ["Did you mean 'blocks.0.mlp.fc"]),
    "text misspelt": ([*TEXT, "--data", "bok.txt"], ["bok.txt does not exist", "Did you mean 'book.txt'?"]),
    "known text misspelt": ([*TEXT, "--data", "wikitxt"], ["Did you mean 'wikitext'?"]),
    "pictures for a language model": ([*TEXT, "--data", "train"], ["train is a folder", "give a text or .jsonl file"]),
    "a picture for a language model": ([*TEXT, "--data", "one.png"], ["one.png is a picture"]),
    "a dataset of pictures for a language model": (
        [*TEXT, "--data", "hf:image"],
        ["it is pictures, for a vision model"],
    ),
    "broken lines": ([*TEXT, "--data", "broken.jsonl"], ["broken.jsonl must have a JSON object", "line 2"]),
    "a cut archive": ([*TEXT, "--data", "cut.txt.gz"], ["cannot be read as UTF-8 text"]),
    "binary data": ([*TEXT, "--data", "weights.bin"], ["weights.bin has 2 tokens"]),
    "no such checkpoint": (["inspect", "trian"], ["trian does not exist"]),
    "a folder as a checkpoint": (["eval", "top1", "train", "--data", "train"], ["no config.json"]),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_input_is_one_line_and_nothing_is_written(place, capsys, arguments, words):
    before = sorted(Path().rglob("*"))
    status = ending.status(lambda: app([argument.format(**place) for argument in arguments], standalone_mode=False))
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert status == 1, said.err
    assert len(lines) == 1
    assert said.err.splitlines()[-1] == lines[0]
    for part in words:
        assert part in lines[0]
    assert said.out == ""
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyError("depth"), 70, "this is a bug in oats_vision (KeyError: 'depth'): please report it"),
        (OSError(28, "No space left on device", "/tmp/x"), 1, "/tmp/x: No space left on device: free some space"),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied: give a place"),
        (MemoryError(), 1, "out of memory: use a smaller --batch-size"),
        (
            torch.OutOfMemoryError("tried 9 GB"),
            1,
            "out of memory: use a smaller --batch-size or another --device (tried 9 GB)",
        ),
    ],
)
def test_other_errors_end_in_one_line_too(capsys, error, status, words):
    def command() -> None:
        raise error

    assert ending.status(command) == status
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words}")
    assert len(said.splitlines()) == 1


def test_data_whose_name_is_in_no_encoding_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"M\xfcller")
    Path(name).mkdir()
    command = ["compress", "--model", "demo", "--data", name, "--out", "out"]
    assert ending.status(lambda: app(command, standalone_mode=False)) == 1
    assert capsys.readouterr().err == "error: --data must be in UTF-8, got 'M\\udcfcller': rename it\n"
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_an_error_says_how_to_go_on(capsys):
    def command() -> None:
        with saying(lambda: "the same command goes on after block 1 of 3"):
            raise OSError(28, "No space left on device", "/tmp/x")

    assert ending.status(command) == 1
    said = capsys.readouterr().err
    assert "another disk. The same command goes on after block 1 of 3" in said
    assert len(said.splitlines()) == 1


def test_near_looks_at_names_beside_the_missing_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet" / "train").mkdir(parents=True)
    assert near("imagenet/trian") == " Did you mean 'train'?"
    assert near("imagnet/train/cats") == " Did you mean 'imagenet'?"
    assert near(tmp_path / "imagenet" / "trian") == " Did you mean 'train'?"
    assert near("quite_another") == ""
    assert did_you_mean("ROW", ["row", "layer"]) == " Did you mean 'row'?"
