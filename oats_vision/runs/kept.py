"""Pictures that are decoded once, however often they are read, and their halves."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from oats_vision.calibration.activations import ActivationStore
from oats_vision.data.pictures import Batches
from oats_vision.data.text import Sequences
from oats_vision.errors import DataError

MEMORY = 1e9  # bytes of pictures that are kept there, of each set; the rest on disk


def kept(batches: Batches | Sequences) -> Batches | Sequences:
    """The same, with its pictures kept from the first reading on; what it holds out likewise. Text is in memory."""
    if isinstance(batches, Sequences):
        return batches
    others = None if batches.held_out is None else kept(batches.held_out)
    assert not isinstance(others, Sequences)
    loader: Any = _Kept(batches.loader)
    return replace(batches, loader=loader, held_out=others)


def halves(batches: Batches | Sequences) -> tuple[Batches | Sequences, Batches | Sequences]:
    """Every other input, and those between them."""
    if isinstance(batches, Sequences):
        first, second = (Sequences(batches.ids[start::2], batches.batch_size) for start in (0, 1))
        return first, second
    sizes = (None, None) if batches.total is None else (-(-batches.total // 2), batches.total // 2)
    loaders: list[Any] = [_Half(batches.loader, start) for start in (0, 1)]
    one, other = (
        replace(batches, loader=loader, total=size, fingerprint=None, held_out=None)
        for loader, size in zip(loaders, sizes, strict=True)
    )
    return one, other


class _Kept:
    """A loader of `Batches` that reads another one once."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.whole = loader, False
        self.pictures, self.others = ActivationStore(MEMORY), list[tuple[Any, ...]]()

    def __iter__(self) -> Iterator[Any]:
        if self.whole:
            for i, about in enumerate(self.others):
                yield self.pictures[i], *about
            return
        self.pictures, self.others = ActivationStore(MEMORY), list[tuple[Any, ...]]()
        for item in self.loader:
            if not isinstance(item, DataError):
                pictures, *about = item
                self.pictures.append(pictures)
                self.others.append(tuple(about))
            yield item
        self.whole = True


class _Half:
    """A loader of `Batches` that takes half of each batch of another one."""

    def __init__(self, loader: Any, start: int) -> None:
        self.loader, self.start = loader, start

    def __iter__(self) -> Iterator[Any]:
        done = 0
        for item in self.loader:
            if isinstance(item, DataError):
                yield item
                continue
            pictures, labels, skipped, names = item
            mine = slice((self.start + done) % 2, None, 2)  # by its place in the whole
            done += len(labels)
            yield pictures[mine], labels[mine], skipped * (self.start == 0), names[mine]
