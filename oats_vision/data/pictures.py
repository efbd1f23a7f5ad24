"""Pictures for calibration and evaluation: folders, Hugging Face datasets, the embedded demo set."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from oats_vision import ranks
from oats_vision.data.decoding import UNREADABLE, open_picture, picture_files
from oats_vision.data.examples import Examples, demo_examples, folder_examples, table_examples
from oats_vision.data.tables import (
    check_label,
    class_names,
    is_saved_dataset,
    label_column,
    open_dataset,
    picture_column,
    rows,
    undecoded,
)
from oats_vision.errors import DataError

__all__ = ["UNREADABLE", "Batches", "load_pictures", "open_picture", "picture_files"]

Transform = Callable[[Image.Image], Tensor]  # a model's preprocessing

log = logging.getLogger(__name__)

ENOUGH = 64  # held-out inputs, below which an interval is wide
DECODING = 2  # of pictures, part of their fingerprint: changes when the same file gives other pixels


class Item(NamedTuple):
    """What the transform gives (None if no picture could be read), and how many were skipped on the way."""

    picture: Any
    label: int
    name: str
    skipped: int


@dataclass
class Batches:
    """Batches (pictures (batch, channels, height, width), labels (batch,)), and how many were skipped so far.

    loader: of (pictures, labels, number skipped, names), or of the error that ends them.
    total: pictures expected, if known. fingerprint: of their and their labels' contents; None for a stream.
    held_out: other pictures of the same source, none of which is in these batches. names: of those read so far.
    """

    loader: DataLoader[Any]
    total: int | None
    classes: list[str] | None = None
    fingerprint: Callable[[], str] | None = None
    held_out: "Batches | None" = None
    skipped: int = field(default=0, init=False)
    names: list[str] = field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every batch that holds a picture; DataError if none does, or if pictures make no batch."""
        yield from (batch for _, batch in self._read(enumerate(self.loader)))
        self._check(self.skipped, len(self.names))

    def mine(self) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """This rank's batches, with their numbers among all; `names` are those of this rank's pictures."""
        yield from self._read(self._dealt())
        self.skipped = sum(ranks.everyones(self.skipped))
        self._check(self.skipped, sum(ranks.everyones(len(self.names))))

    def _read(self, batches: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        self.skipped, self.names = 0, []
        for number, batch in batches:
            if isinstance(batch, DataError):
                raise batch
            pictures, labels, skipped, names = batch
            self.skipped += skipped
            self.names += names
            if len(labels):
                yield number, (pictures, labels)

    def _dealt(self) -> Iterator[tuple[int, Any]]:
        """What the loader gives of this rank's batches; of a stream the others have to be read too."""
        loader = self.loader
        if ranks.count() == 1 or isinstance(loader.dataset, IterableDataset):
            yield from ranks.mine(loader)
            return
        own = list(ranks.mine(loader.batch_sampler))  # type: ignore[arg-type]
        dealt: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=[places for _, places in own],
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
        )
        yield from zip((number for number, _ in own), dealt, strict=True)

    def _check(self, skipped: int, read: int) -> None:
        if skipped:
            log.warning("%d unreadable pictures were skipped", skipped)
        if not read:
            raise DataError(f"no picture could be read ({skipped} skipped)")


def load_pictures(
    source: str | Path,
    transform: Transform,
    *,
    batch_size: int,
    samples: int | None = None,
    seed: int = 42,
    labelled: bool = False,
    split: str = "train",
    streaming: bool = False,
    workers: int = 0,
    held_out: int = 0,
) -> Batches:
    """Batches of preprocessed pictures.

    Args:
        source: a folder (one folder per class as in ImageNet, or pictures anywhere below it), `hf:name`,
            `hf:name:config`, a directory written by `datasets`, or `demo`.
        transform: PIL picture (RGB) -> tensor (channels, height, width), or an array or `{"pixel_values"}` of one.
        samples: take that many, chosen by the seed; all of them, in order, if None. A picture that cannot be
            read is skipped and another one taken in its place as long as there are any.
        labelled: needs labels (the folder must hold one folder per class); else the data's labels are not looked at.
        split: of a Hugging Face dataset; of the demo, `train` is the calibration set and all else the test set.
        streaming: a Hugging Face dataset.
        held_out: with `samples`, keep that many other pictures apart, in the batches' `held_out`. Where there are not
            enough for both, `shared_out` says how many of each.

    Raises:
        DataError: missing, empty, or without labels although they are needed. Iterating raises it where no picture
            can be read, or the transform gives no finite floats of one size.
    """
    source = str(source)
    classes: list[str] | None
    if source == "demo":
        examples, classes = demo_examples(calibration=split == "train")
    elif source.startswith("hf:") or is_saved_dataset(Path(source)):
        dataset = open_dataset(source, split, streaming)
        label = label_column(dataset, source) if labelled else None
        columns = picture_column(dataset, source), label
        if streaming:
            stream = dataset if samples is None else dataset.shuffle(seed=seed, buffer_size=max(1000, samples))
            classes = class_names(dataset, label) if label else None
            stream = undecoded(stream, *columns)

            def part(count: int | None, apart: bool) -> Batches:
                streamed = _StreamedPictures(stream, columns, source, transform, count, held_out, apart)
                return Batches(DataLoader(streamed, batch_size, collate_fn=_collate), count, classes)

            found = part(samples, apart=False)
            found.held_out = part(held_out, apart=True) if held_out else None
            return found
        examples, classes = table_examples(dataset, columns, source)
    else:
        examples, classes = folder_examples(Path(source), labelled)
    if not len(examples):
        raise DataError(f"{source} has no picture")
    if samples is None:
        order = torch.arange(len(examples))
        count, apart = len(order), 0
    else:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
        count, apart = shared_out(len(order), samples, held_out)
        if count < samples and source != "demo":
            log.warning(
                "%s has %d pictures, of which %d are held out: fewer than the %d samples asked for",
                source,
                len(order),
                apart,
                samples,
            )

    def some(order: list[int], count: int) -> Batches:
        pictures = _Pictures(examples, order, count, transform)
        loader = DataLoader(pictures, batch_size, num_workers=workers, collate_fn=_collate)
        return Batches(loader, count, classes, pictures.fingerprint)

    if not apart:
        return some(order.tolist(), count)
    last = len(order) - apart
    middle = (count + last) // 2  # half of what is left are spare pictures of each
    found = some(order[:middle].tolist(), count)
    found.held_out = some([*order[last:].tolist(), *order[middle:last].tolist()], apart)
    return found


def shared_out(there: int, samples: int, held_out: int) -> tuple[int, int]:
    """How many of what is there are samples, and how many are held out.

    Where both do not fit, an eighth of what is there is held out, but `ENOUGH` at least, and never more than a quarter.

    >>> shared_out(5000, 2048, 256), shared_out(1000, 2048, 256), shared_out(100, 2048, 256), shared_out(3, 128, 64)
    ((2048, 256), (875, 125), (75, 25), (3, 0))
    """
    apart = min(held_out, max(ENOUGH, there - samples, there // 8), max(there - samples, there // 4))
    return min(samples, there - apart), apart


class _Reader:
    """Opens and preprocesses pictures; says of the first that cannot be read why."""

    def __init__(self, transform: Transform) -> None:
        self.transform, self.said = transform, False

    def __call__(self, picture: Any, name: str) -> Any | None:
        try:
            return self.transform(open_picture(picture))
        except UNREADABLE as problem:
            log.log(logging.DEBUG if self.said else logging.WARNING, "%s is skipped: %s", name, problem)
            self.said = True
            return None


class _Pictures(Dataset[Item]):
    """Preprocessed pictures in a given order; one that cannot be read is replaced by a spare one.

    Position i falls back on the positions i + count, i + 2 count, ... of the order, so that the pictures do
    not depend on who reads them.
    """

    def __init__(self, examples: Examples, order: list[int], count: int, transform: Transform) -> None:
        self.examples, self.order, self.count, self.read = examples, order, count, _Reader(transform)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((DECODING, self.read.transform, self.order, self.count)).encode())
        for part in self.examples.fingerprint(self.order[: self.count]):
            digest.update(part)
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Item:
        candidates = self.order[position :: self.count]
        for skipped, candidate in enumerate(candidates):
            example = self.examples[candidate]
            picture = self.read(example.picture, example.name)
            if picture is not None:
                return Item(picture, example.label, example.name, skipped)
        return Item(None, -1, "", len(candidates))


class _StreamedPictures(IterableDataset[Item]):
    """The first pictures of a stream that can be read.

    held_out: every fourth row is held out until so many are; `apart`: these are the pictures, in place of all others.
    """

    def __init__(
        self,
        stream: Any,
        columns: tuple[str, str | None],
        source: str,
        transform: Transform,
        samples: int | None,
        held_out: int,
        apart: bool,
    ) -> None:
        self.stream, self.columns, self.source, self.samples = stream, columns, source, samples
        self.held_out, self.apart, self.read = held_out, apart, _Reader(transform)

    def __iter__(self) -> Iterator[Item]:
        image, label = self.columns
        taken, skipped = 0, 0
        for number, row in enumerate(rows(self.stream, self.source)):
            if self.apart and number >= 4 * self.held_out:
                break
            if self.apart != (number % 4 == 3 and number < 4 * self.held_out):
                continue
            name = f"{self.source}, row {number}"
            picture = self.read(row[image], name)
            if picture is None:
                skipped += 1
                continue
            yield Item(picture, check_label(row[label], label, name) if label else -1, name, skipped)
            taken, skipped = taken + 1, 0
            if taken == self.samples:
                return
        if skipped:
            yield Item(None, -1, "", skipped)


def _collate(items: list[Item]) -> tuple[Tensor, Tensor, int, list[str]] | DataError:
    """Stack what was read, name it, and count what was not.

    An error is handed over rather than raised: a worker process would wrap it in its traceback.
    """
    skipped = sum(item.skipped for item in items)
    read = [item for item in items if item.picture is not None]
    try:
        pictures = [_tensor(item) for item in read]
    except DataError as problem:
        return problem
    sizes = sorted({tuple(picture.shape) for picture in pictures})
    if len(sizes) > 1:
        return DataError(
            f"pictures of a batch have different sizes after preprocessing ({', '.join(map(str, sizes[:3]))}), as it "
            "keeps their aspect ratio: let it crop, pad or resize to one height and width (Hugging Face processors: "
            "do_center_crop and crop_size), or resize the pictures before"
        )
    labels = torch.tensor([item.label for item in read], dtype=torch.int64)
    return torch.stack(pictures) if pictures else torch.empty(0), labels, skipped, [item.name for item in read]


def _tensor(item: Item) -> Tensor:
    """A preprocessed picture, (channels, height, width), finite floats.

    Raises:
        DataError: it is something else.
    """
    value = item.picture
    if isinstance(value, Mapping):
        value = value.get("pixel_values", value.get("image"))
    if isinstance(value, (list, tuple)) and len(value) == 1:  # image processors give a list of arrays
        value = value[0]
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"{item.name}: the transform gives {kind}: let it give a tensor of floats (channels first)")
    if value.ndim == 4 and len(value) == 1:
        value = value[0]
    if value.ndim != 3 or (value.shape[0] not in (1, 3) and value.shape[2] in (1, 3)):
        shape = tuple(value.shape)
        raise DataError(f"{item.name}: the transform gives shape {shape}: it must be (channels, height, width)")
    if not value.isfinite().all():
        raise DataError(f"{item.name} has values that are not finite after preprocessing: leave the picture out")
    return value
