"""Pictures for calibration and evaluation: folders, Hugging Face datasets, the embedded demo set."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

from oats_vision.errors import DataError
from oats_vision.models import demo_directory
from oats_vision.transforms import Transform

log = logging.getLogger(__name__)

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises on bad files
Example = tuple[Callable[[], Image.Image], int]  # opens the picture; label, -1 if there is none


@dataclass
class Batches:
    """Batches (pictures (batch, 3, height, width), labels (batch,)) and how many files were skipped so far."""

    loader: DataLoader[Any]
    total: int | None  # pictures expected, if known
    classes: list[str] | None = None
    fingerprint: Callable[[], str] | None = None  # of the pictures' and labels' contents; None for a stream
    skipped: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.skipped = 0
        for pictures, labels, skipped in self.loader:
            self.skipped += skipped
            if len(labels):
                yield pictures, labels
        if self.skipped:
            log.warning("%d unreadable pictures were skipped", self.skipped)


def load_pictures(
    source: str,
    transform: Transform,
    *,
    batch_size: int,
    samples: int | None = None,
    seed: int = 42,
    labelled: bool = False,
    split: str = "train",
    streaming: bool = False,
    workers: int = 0,
) -> Batches:
    """Batches of preprocessed pictures.

    Args:
        source: a folder (one folder a class as in ImageNet, or pictures anywhere below it), `hf:name`,
            `hf:name:config`, a directory written by `datasets`, or `demo`.
        transform: PIL picture (RGB) -> tensor.
        samples: take that many, chosen by the seed; all of them, in order, if None. A picture that cannot be
            read is skipped and another one taken in its place as long as there are any.
        labelled: needs labels (the folder must hold one folder a class).
        split: of a Hugging Face dataset; of the demo, `train` is the calibration set and all else the test set.
        streaming: a Hugging Face dataset.

    Raises:
        DataError: missing, empty, without labels although they are needed, or no picture can be read.
    """
    examples: _Examples
    classes: list[str] | None
    if source == "demo":
        examples, classes = _demo(calibration=split == "train")
    elif source.startswith("hf:") or _is_saved_dataset(Path(source)):
        dataset = open_dataset(source, split, streaming)
        if streaming:
            stream = dataset if samples is None else dataset.shuffle(seed=seed, buffer_size=max(1000, samples))
            examples_of = _StreamedPictures(stream, _columns(dataset, source, labelled), transform, samples)
            loader = DataLoader(examples_of, batch_size, collate_fn=_collate)
            return Batches(loader, samples, _class_names(dataset))
        examples, classes = _HuggingFaceExamples(dataset, *_columns(dataset, source, labelled)), _class_names(dataset)
    else:
        examples, classes = _folder(Path(source), labelled)
    if not len(examples):
        raise DataError(f"{source} has no picture")
    if samples is None:
        order = torch.arange(len(examples))
    else:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    count = len(order) if samples is None else min(samples, len(order))
    if samples is not None and count < samples and source != "demo":
        log.warning("%s has %d pictures, fewer than the %d samples asked for", source, count, samples)
    pictures = _Pictures(examples, order.tolist(), count, transform)
    loader = DataLoader(pictures, batch_size, num_workers=workers, collate_fn=_collate)
    return Batches(loader, count, classes, pictures.fingerprint)


class _Examples(Sequence[Example]):
    """Pictures that can be opened one by one."""

    def fingerprint(self, indices: list[int]) -> Iterator[bytes]:
        """Bytes that tell these examples from any others: what the pictures hold, and their labels."""
        raise NotImplementedError


class _Pictures(Dataset[tuple[Tensor | None, int, int]]):
    """Preprocessed pictures in a given order; one that cannot be read is replaced by a spare one.

    Position i falls back on the positions i + count, i + 2 count, ... of the order, so that the pictures do
    not depend on who reads them.
    """

    def __init__(self, examples: _Examples, order: list[int], count: int, transform: Transform) -> None:
        self.examples, self.order, self.count, self.transform = examples, order, count, transform

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.transform, self.order, self.count)).encode())
        for part in self.examples.fingerprint(self.order[: self.count]):
            digest.update(part)
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> tuple[Tensor | None, int, int]:
        skipped = 0
        for candidate in self.order[position :: self.count]:
            try:
                open_picture, label = self.examples[candidate]
                return self.transform(open_picture().convert("RGB")), label, skipped
            except UNREADABLE as problem:
                log.debug("picture %d: %s", candidate, problem)
                skipped += 1
        return None, -1, skipped


class _StreamedPictures(IterableDataset[tuple[Tensor | None, int, int]]):
    """The first pictures of a stream that can be read."""

    def __init__(self, stream: Any, columns: tuple[str, str | None], transform: Transform, samples: int | None):
        self.stream, self.columns, self.transform, self.samples = stream, columns, transform, samples

    def __iter__(self) -> Iterator[tuple[Tensor | None, int, int]]:
        image, label = self.columns
        taken, skipped = 0, 0
        rows = iter(self.stream)
        while self.samples is None or taken < self.samples:
            try:
                row = next(rows)
                picture = self.transform(_as_picture(row[image]).convert("RGB"))
            except StopIteration:
                break
            except UNREADABLE:
                skipped += 1
                continue
            yield picture, -1 if label is None else int(row[label]), skipped
            taken, skipped = taken + 1, 0
        if skipped:
            yield None, -1, skipped


def _collate(items: list[tuple[Tensor | None, int, int]]) -> tuple[Tensor, Tensor, int]:
    """Stack what was read, and count what was not."""
    read = [(picture, label) for picture, label, _ in items if picture is not None]
    pictures = torch.stack([picture for picture, _ in read]) if read else torch.empty(0)
    return pictures, torch.tensor([label for _, label in read]), sum(skipped for *_, skipped in items)


class _DemoExamples(_Examples):
    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.images, self.labels = arrays["images"], arrays["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return lambda: Image.fromarray(self.images[index]), int(self.labels[index])

    def fingerprint(self, indices: list[int]) -> Iterator[bytes]:
        yield self.images[indices].tobytes()
        yield self.labels[indices].tobytes()


def _demo(calibration: bool) -> tuple[_Examples, list[str]]:
    directory = demo_directory()
    names = json.loads((directory / "config.json").read_text())["label_names"]
    return _DemoExamples(directory / ("calibration.npz" if calibration else "test.npz")), names


class _FileExamples(_Examples):
    def __init__(self, files: list[tuple[str, int]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        path, label = self.files[index]
        return lambda: Image.open(path), label

    def fingerprint(self, indices: list[int]) -> Iterator[bytes]:
        for index in indices:
            path, label = self.files[index]
            yield hashlib.sha256(Path(path).read_bytes()).digest() + label.to_bytes(4, "little", signed=True)


def _folder(path: Path, labelled: bool) -> tuple[_Examples, list[str] | None]:
    """Pictures below a folder; with labels if it has one folder a class."""
    if not path.exists():
        raise DataError(f"{path} does not exist: give a folder of pictures, hf:name or demo")
    if not path.is_dir():
        raise DataError(f"{path} is a file: give the folder that holds the pictures")
    if not labelled:
        files = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise DataError(f"{path} has no picture (looked for {', '.join(IMG_EXTENSIONS)})")
        return _FileExamples([(file, -1) for file in files]), None
    try:
        folder = ImageFolder(str(path), allow_empty=False)
    except FileNotFoundError as problem:
        reason = str(problem).splitlines()[0]
        raise DataError(
            f"{path} has no labels: it must hold one folder of pictures for each class ({reason})"
        ) from None
    return _FileExamples(folder.samples), folder.classes


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def open_dataset(source: str, split: str, streaming: bool) -> Any:
    """One split of a dataset of the `datasets` library: `hf:name[:config]`, or a directory that it wrote.

    Raises:
        DataError: it cannot be loaded, or has no such split.
    """
    import datasets

    try:
        if not source.startswith("hf:"):
            dataset = datasets.load_from_disk(source)
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise DataError(f"{source} has no split {split!r}, only {', '.join(dataset)}")
                dataset = dataset[split]
            return dataset.to_iterable_dataset() if streaming else dataset
        name, _, config = source[3:].partition(":")
        return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except DataError:
        raise
    except Exception as problem:
        reason = " ".join(str(problem).split())
        raise DataError(f"{source} (split {split!r}) cannot be loaded: {reason[:300]}") from problem


def _columns(dataset: Any, source: str, labelled: bool) -> tuple[str, str | None]:
    """Names of the picture column and of the label column."""
    import datasets

    features = dataset.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels += [name for name in ("label", "labels") if name in features and name not in labels]
    if not images:
        raise DataError(f"{source} has no column of pictures, only {', '.join(features) or 'unknown ones'}")
    if labelled and not labels:
        raise DataError(f"{source} has no column of labels, only {', '.join(features)}")
    return images[0], labels[0] if labels else None


def _class_names(dataset: Any) -> list[str] | None:
    import datasets

    features = (dataset.features or {}).values()
    return next((list(feature.names) for feature in features if isinstance(feature, datasets.ClassLabel)), None)


def _as_picture(value: Any) -> Image.Image:
    if not isinstance(value, Image.Image):
        raise ValueError(f"not a picture: {type(value).__name__}")
    return value


class _HuggingFaceExamples(_Examples):
    """Rows of a dataset; pictures are decoded one by one, so that a broken one fails alone."""

    def __init__(self, dataset: Any, image: str, label: str | None) -> None:
        self.dataset, self.image, self.label = dataset, image, label

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        row = self.dataset[index]
        return lambda: _as_picture(row[self.image]), -1 if self.label is None else int(row[self.label])

    def fingerprint(self, indices: list[int]) -> Iterator[bytes]:
        # of the `datasets` library: it changes with the files read and with everything done to them
        yield self.dataset._fingerprint.encode()
