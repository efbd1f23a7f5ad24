"""Top-1 and top-5 accuracy of an image classifier."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.data import Batches
from oats_vision.errors import DataError, ModelError


@dataclass(frozen=True)
class Top1:
    """Accuracies in percent; throughput of the whole loop, reading of pictures included."""

    top1: float
    top5: float
    pictures: int
    skipped: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"pictures_per_second": self.pictures / self.seconds}


@torch.inference_mode()
def evaluate_top1(model: nn.Module, batches: Batches, progress: Callable[[int], None] = lambda done: None) -> Top1:
    """Classify all pictures.

    Args:
        model: (batch, 3, height, width) -> logits (batch, classes), or an output with `.logits`.
        batches: with labels.
        progress: called with the number of pictures done.

    Raises:
        ModelError: the model has no classification head.
        DataError: the labels are not those of the head, or no picture could be read.
    """
    from torchmetrics.classification import MulticlassAccuracy  # a second to import

    first = next(model.parameters())
    metrics: dict[int, MulticlassAccuracy] = {}
    pictures = 0
    start = time.perf_counter()
    model.eval()
    for images, labels in batches:
        logits = classify(model, images.to(first.device, first.dtype))
        if not metrics:
            _check_classes(logits.shape[1], batches.classes)
            for k in {1, min(5, logits.shape[1])}:
                metrics[k] = MulticlassAccuracy(logits.shape[1], top_k=k, average="micro").to(first.device)
        if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
            raise DataError(f"a label is outside the {logits.shape[1]} classes of the model's head")
        for metric in metrics.values():
            metric.update(logits.float(), labels.to(first.device))
        pictures += len(labels)
        progress(pictures)
    if not metrics:
        raise DataError(f"no picture could be read ({batches.skipped} skipped)")
    values = [100 * float(metrics[k].compute()) for k in (1, max(metrics))]
    return Top1(values[0], values[1], pictures, batches.skipped, time.perf_counter() - start)


def classify(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (batch, classes).

    Raises:
        ModelError: the model gives features, not logits.
    """
    output = model(images)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or getattr(model, "num_classes", None) == 0:
        raise ModelError("the model has no classification head: top-1 needs one (a backbone gives features)")
    return logits


def _check_classes(head: int, classes: list[str] | None) -> None:
    if classes is not None and len(classes) != head:
        raise DataError(f"the data has {len(classes)} classes and the model's head has {head}: labels cannot match")
