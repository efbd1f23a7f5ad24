"""`oats-vision eval linear-probe`: linear classification of frozen features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from oats_vision import ranks
from oats_vision.evaluation.protocols.base import Given, Measurement, protocol
from oats_vision.evaluation.protocols.probes import OnFeatures, details_of, features_of, lines_of

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = """\
  oats-vision eval linear-probe dinov2_l_50 \\
    --train imagenet/train --val imagenet/val
in seconds
  oats-vision eval linear-probe dinov2_l_50 --quick --train-samples 20000 \\
    --train imagenet/train --val imagenet/val"""


class ProbeSettings(OnFeatures):
    """Of both probes; the last two are of the grid alone."""

    quick: bool = Field(False, description="logistic regression (seconds), no grid of SGD classifiers")
    iterations: int = Field(12_500, ge=1, description="steps of SGD")
    probe_batch: int = Field(1024, ge=1, description="features in a step of SGD")

    @property
    def variant(self) -> str:
        return "quick" * self.quick


@protocol("linear-probe", ProbeSettings, title="linear probe", rank=2, examples=EXAMPLES)
def linear_probe(model: nn.Module, given: Given[ProbeSettings]) -> Measurement:
    """Linear classification of the frozen backbone's features, as DINOv2 does it.

    A grid of learning rates, last 1 or 4 blocks, with and without the mean patch token is trained at once; a
    held-out tenth of `train` chooses. Features are extracted once and cached.
    """
    from oats_vision.evaluation import linear_probe as probes
    from oats_vision.evaluation.paired import Accuracy

    settings, features = given.settings, features_of(model, given)
    if settings.quick:
        with given.display.status(f"logistic regression, {given.which}"):
            probe = ranks.on_main(lambda: probes.quick_probe(*features, seed=settings.seed))
    else:
        with given.display.counting(f"linear probe, {given.which}", "steps", settings.iterations) as progress:
            probe = ranks.on_main(
                lambda: probes.linear_probe(
                    *features,
                    iterations=settings.iterations,
                    batch_size=settings.probe_batch,
                    seed=settings.seed,
                    device=next(model.parameters()).device,
                    progress=progress,
                )
            )
    return Measurement(
        compared={"top-1": Accuracy(probe.correct)},
        samples=len(probe.correct),
        details={**probe.to_dict(), **details_of(features)},
        lines={"chosen": probe.best, **lines_of(features)},
    )
