"""`oats-vision eval top1`: accuracy of a classifier on labelled pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oats_vision.evaluation.protocols.base import Given, Measurement, protocol
from oats_vision.evaluation.protocols.settings import LabelledPictures
from oats_vision.evaluation.results import Figure

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = """\
  oats-vision eval top1 vit_b_50 --data imagenet/val
  oats-vision eval top1 vit_b_50 --data hf:timm/mini-imagenet --samples 2000"""


@protocol("top1", LabelledPictures, rank=1, examples=EXAMPLES)
def top1(model: nn.Module, given: Given[LabelledPictures]) -> Measurement:
    """Top-1 and top-5 accuracy, and throughput.

    Folders named by WordNet ids are matched with ImageNet's 1,000 classes, other names with those of the head.
    """
    from oats_vision.evaluation.paired import Accuracy
    from oats_vision.evaluation.top1 import evaluate_top1

    pictures = given.data["data"]
    with given.display.counting(f"top-1 {given.which}", "pictures", pictures.total) as progress:
        score = evaluate_top1(model, pictures, progress, mixed_precision=given.settings.autocast_dtype)
    details = score.to_dict()
    return Measurement(
        compared={"top-1": Accuracy(score.correct)},
        figures=[Figure(name="top-5", kind="percent", value=score.top5)],
        samples=score.pictures,
        details=details,
        lines={
            "pictures/s": f"{details['pictures_per_second']:.0f}",
            "pictures": f"{score.pictures} ({score.skipped} unreadable)",
        },
    )
