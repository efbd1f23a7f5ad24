"""Where pictures lie, one by one with their labels: a folder, a dataset's table, the embedded demo set."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from oats_vision import demo
from oats_vision.data.decoding import picture_names
from oats_vision.data.tables import read_labels, undecoded
from oats_vision.errors import DataError, near

log = logging.getLogger(__name__)


class Example(NamedTuple):
    """What `open_picture` takes; the label, -1 if there is none; a name for messages."""

    picture: Any
    label: int
    name: str


class Examples(Sequence[Example]):
    """Pictures that can be opened one by one."""

    def fingerprint(self, indices: list[int]) -> Iterator[bytes]:
        """Bytes that tell these examples from any others: what the pictures hold, and their labels."""
        raise NotImplementedError


class DemoExamples(Examples):
    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.images, self.labels = arrays["images"], arrays["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return Example(Image.fromarray(self.images[index]), int(self.labels[index]), f"demo picture {index}")

    def fingerprint(self, indices: list[int]) -> Iterator[bytes]:
        yield self.images[indices].tobytes()
        yield self.labels[indices].tobytes()


def demo_examples(calibration: bool) -> tuple[Examples, list[str]]:
    directory = demo.DIRECTORY
    names = json.loads((directory / "config.json").read_text())["label_names"]
    return DemoExamples(directory / ("calibration.npz" if calibration else "test.npz")), names


class FileExamples(Examples):
    def __init__(self, files: list[str], labels: list[int]) -> None:
        self.files, self.labels = files, labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        return Example(self.files[index], self.labels[index], self.files[index])

    def fingerprint(self, indices: list[int]) -> Iterator[bytes]:
        for index in indices:
            try:
                content = Path(self.files[index]).read_bytes()
            except OSError:  # it is skipped when it is its turn
                content = b""
            yield hashlib.sha256(content).digest() + self.labels[index].to_bytes(4, "little", signed=True)


def folder_examples(path: Path, labelled: bool) -> tuple[Examples, list[str] | None]:
    """Pictures below a folder; with labels if it has one folder per class."""
    if not path.exists():
        raise DataError(f"{path} does not exist: give a folder of pictures, hf:name or demo.{near(path)}")
    if not path.is_dir():
        picture = path.suffix.lower() in IMG_EXTENSIONS
        hint = "give the folder that holds the pictures" if picture else "a vision model needs a folder of pictures"
        raise DataError(f"{path} is a file: {hint}")
    files = picture_names(str(path))
    if not files:
        raise DataError(f"{path} has no picture (looked for {', '.join(IMG_EXTENSIONS)}){_other_files(path)}")
    if not labelled:
        return FileExamples(files, [-1] * len(files)), None
    below = [(file, file.removeprefix(str(path)).lstrip(os.sep)) for file in files]
    inside = [(file, name.split(os.sep, 1)[0]) for file, name in below if os.sep in name]
    classes = sorted({name for _, name in inside})
    if not classes:
        raise DataError(f"{path} has no labels: it must hold one folder of pictures for each class")
    if len(inside) < len(files):
        log.warning("%d pictures of %s are in no class folder and are left out", len(files) - len(inside), path)
    empty = sorted(_folder_names(path) - set(classes))
    if empty:
        log.warning("class folders of %s without a picture are left out: %s", path, ", ".join(empty[:5]))
    number = {name: i for i, name in enumerate(classes)}
    inside.sort(key=lambda file: number[file[1]])  # "a-b/1" sorts before "a/1"
    return FileExamples([file for file, _ in inside], [number[name] for _, name in inside]), classes


def _other_files(path: Path) -> str:
    """What a folder without pictures holds instead, and how it is read if `datasets` can."""
    kinds = sorted({file.suffix.lower() for file in path.iterdir() if file.is_file() and file.suffix})
    if not kinds:
        return ""
    readable = {".parquet", ".arrow", ".tar"} & set(kinds)
    return f", but {', '.join(kinds[:5])} files" + (f": give hf:{path} to read them" if readable else "")


def _folder_names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}


class TableExamples(Examples):
    """Rows of a dataset; pictures are decoded one by one, so that a broken one fails alone."""

    def __init__(self, pictures: Any, column: str, labels: list[int], source: str, fingerprint: str) -> None:
        self.pictures, self.column, self.labels = pictures, column, labels
        self.source, self.made_of = source, fingerprint

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return Example(self.pictures[index][self.column], self.labels[index], f"{self.source}, row {index}")

    def fingerprint(self, indices: list[int]) -> Iterator[bytes]:
        yield self.made_of.encode()
        yield np.asarray([self.labels[index] for index in indices]).tobytes()


def table_examples(dataset: Any, columns: tuple[str, str | None], source: str) -> tuple[Examples, list[str] | None]:
    """Rows of a dataset that is on this machine, with the labels of the second column."""
    image, label = columns
    labels, classes = read_labels(dataset, label, source) if label else ([-1] * len(dataset), None)
    # the library's fingerprint changes with the files read and with everything done to them
    return TableExamples(undecoded(dataset, image), image, labels, source, dataset._fingerprint), classes
