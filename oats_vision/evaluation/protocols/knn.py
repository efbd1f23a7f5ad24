"""`oats-vision eval knn`: k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from oats_vision.evaluation.protocols.base import Given, Measurement, protocol
from oats_vision.evaluation.protocols.probes import OnFeatures, details_of, features_of, lines_of

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = """\
  oats-vision eval knn dinov2_l_50 --train imagenet/train --val imagenet/val
  oats-vision eval knn dinov2_l_50 --k 20 --train-samples 20000 \\
    --train imagenet/train --val imagenet/val"""


class KnnSettings(OnFeatures):
    """DINOv2's by default."""

    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (10, 20, 100, 200), min_length=1, description="neighbours; may be repeated"
    )
    temperature: float = Field(0.07, gt=0, allow_inf_nan=False, description="softmax temperature of the votes")


@protocol("knn", KnnSettings, title="k-NN", rank=3, examples=EXAMPLES)
def knn(model: nn.Module, given: Given[KnnSettings]) -> Measurement:
    """k-nearest-neighbour classification of the frozen backbone's features, as DINOv2 does it."""
    from oats_vision.evaluation import knn as votes
    from oats_vision.evaluation.paired import Accuracy

    settings, features = given.settings, features_of(model, given)
    correct = votes.knn(*features, k=settings.k, temperature=settings.temperature)
    found = {count: Accuracy(right) for count, right in correct.items()}
    return Measurement(
        compared={f"k = {count}": accuracy for count, accuracy in found.items()},
        samples=len(features[1]),
        details={"top1": {str(k): accuracy.percent for k, accuracy in found.items()}, **details_of(features)},
        lines=lines_of(features),
    )
