"""Magnitude pruning: the plainest baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oats_vision.compression.methods import LinearMethod, register

if TYPE_CHECKING:
    from torch import Tensor

    from oats_vision.calibration.statistics import Statistic
    from oats_vision.compression.settings import CompressionSettings
    from oats_vision.core.budget import Budget
    from oats_vision.core.oats import Factors


@register
class Magnitude(LinearMethod):
    """The weights of the largest magnitude, in the whole layer."""

    name = "magnitude"
    citation = "Han et al., Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015"
    pattern = "layer"

    def decompose(self, weight: Tensor, statistic: Statistic, budget: Budget, settings: CompressionSettings) -> Factors:
        return magnitude(weight, statistic.scale(), budget)


def magnitude(weight: Tensor, scale: Tensor, budget: Budget) -> Factors:
    """Keep the weights of the largest magnitude (Han et al., 2015); `scale` is for the reported error only."""
    from oats_vision.core.oats import Factors, arithmetic
    from oats_vision.core.threshold import keep_largest

    W = arithmetic(weight)
    return Factors.sparse(W, keep_largest(W, budget), scale.to(W))
