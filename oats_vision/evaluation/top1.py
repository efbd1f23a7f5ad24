"""Top-1 and top-5 accuracy of an image classifier."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision import ranks
from oats_vision.data.pictures import Batches
from oats_vision.errors import DataError, ModelError
from oats_vision.evaluation.labels import head_index
from oats_vision.models.head import class_logits
from oats_vision.models.loading.load import source_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Top1:
    """Accuracies in percent; throughput of the whole loop, reading of pictures included.

    correct: whether each picture was classified right, bool (pictures,).
    """

    top1: float
    top5: float
    pictures: int
    skipped: int
    seconds: float
    correct: Tensor = field(repr=False, compare=False, default_factory=lambda: torch.empty(0, dtype=torch.bool))

    def to_dict(self) -> dict[str, Any]:
        names = ("top1", "top5", "pictures", "skipped", "seconds")
        values = {name: getattr(self, name) for name in names}
        return values | {"pictures_per_second": self.pictures / self.seconds}


@torch.no_grad()
def evaluate_top1(
    model: nn.Module,
    batches: Batches,
    progress: Callable[[int], None] = lambda done: None,
    *,
    mixed_precision: torch.dtype | None = None,
) -> Top1:
    """Classify all pictures; with several ranks each classifies its share, and all are given the result.

    Args:
        model: (batch, 3, height, width) -> logits (batch, classes), or an output with `.logits`.
        batches: with labels; their classes are matched with the head's, see `head_index`.
        progress: called with the number of pictures done.
        mixed_precision: dtype of the matrix products (autocast).

    Raises:
        ModelError: the model has no classification head, or its logits are not finite.
        DataError: the labels are not those of the head, or no picture could be read.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    start = time.perf_counter()

    def tell(done: int) -> None:
        progress(done * ranks.count())

    for number, logits, labels in _classified(model, batches, batches.mine(), tell, mixed_precision):
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        found[number] = (logits.argmax(1) == labels).cpu(), best.any(1).cpu()
    first, five = (torch.cat(column) for column in zip(*ranks.in_order(found), strict=True))
    top1, top5 = (100 * float(hits.double().mean()) for hits in (first, five))
    return Top1(top1, top5, len(first), batches.skipped, time.perf_counter() - start, first)


@torch.no_grad()
def classified(
    model: nn.Module,
    batches: Batches,
    progress: Callable[[int], None] = lambda done: None,
    *,
    mixed_precision: torch.dtype | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a classifier says of each batch, and what would be right.

    Args:
        model, batches, progress, mixed_precision: see `evaluate_top1`.

    Yields:
        Logits (batch, classes), float32, and the head's outputs that are right (batch,), int64, on the model's device.

    Raises:
        ModelError, DataError: see `evaluate_top1`.
    """
    for _, logits, labels in _classified(model, batches, enumerate(batches), progress, mixed_precision):
        yield logits, labels


def _classified(
    model: nn.Module,
    batches: Batches,
    dealt: Iterable[tuple[int, tuple[Tensor, Tensor]]],
    progress: Callable[[int], None],
    mixed_precision: torch.dtype | None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`classified` of some of the batches, with their numbers."""
    order, head, highest, done = torch.empty(0), 0, 0, 0
    model.eval()
    for number, (images, labels) in dealt:
        logits = classify(model, images, mixed_precision).float()
        if not done:
            head = logits.shape[1]
            order = head_index(batches.classes, head, source_of(model).label_names)
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(order):
            raise DataError(f"label {low if low < 0 else high} is outside the {head} classes of the model's head")
        highest, done = max(highest, high), done + len(labels)
        yield number, logits, order[labels].to(logits.device)
        progress(done)
    if batches.classes is None and 2 * (highest + 1) <= head:
        log.warning("labels are 0 to %d, taken as the first outputs of a head of %d: are they its own?", highest, head)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Mixed precision in `dtype`, or nothing if None."""
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def classify(model: nn.Module, images: Tensor, mixed_precision: torch.dtype | None = None) -> Tensor:
    """Logits (batch, classes) of pictures that may lie on another device and in another dtype.

    Raises:
        ModelError: the model gives features, not logits, or they are not finite.
    """
    first = next(model.parameters())
    with autocast(first.device, mixed_precision):
        output = model(images.to(first.device, first.dtype))
    logits = class_logits(model, output)
    if logits is None:
        raise ModelError("the model has no classification head: top-1 needs one (a backbone gives features)")
    if not logits.isfinite().all():  # argmax takes a NaN for the largest
        raise ModelError("the logits are not finite: the model diverges on these pictures, or its dtype is too narrow")
    return logits
