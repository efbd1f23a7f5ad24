"""Wanda: pruning by weights and activations."""

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
class Wanda(LinearMethod):
    """The weights that are largest after scaling by their inputs, in each row."""

    name = "wanda"
    citation = "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024"

    def decompose(self, weight: Tensor, statistic: Statistic, budget: Budget, settings: CompressionSettings) -> Factors:
        return wanda(weight, statistic.scale(), budget)


def wanda(weight: Tensor, scale: Tensor, budget: Budget) -> Factors:
    """Keep the largest |W_ij| |X_j| (Sun et al., Wanda, ICLR 2024, section 3); row-wise in the paper."""
    from oats_vision.core.oats import Factors, arithmetic
    from oats_vision.core.threshold import keep_largest

    W = arithmetic(weight)
    D = scale.to(W)
    return Factors.sparse(W, keep_largest(W * D, budget).div_(D), D)
