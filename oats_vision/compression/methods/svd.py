"""Truncated SVD: a low-rank term alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oats_vision.compression.methods import LinearMethod, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from oats_vision.calibration.statistics import Statistic
    from oats_vision.compression.settings import CompressionSettings
    from oats_vision.core.budget import Budget
    from oats_vision.core.oats import Factors


@register
class SVD(LinearMethod):
    """The best low-rank approximation of the weight, scaled by its inputs."""

    name = "svd"
    citation = "Eckart & Young, The Approximation of One Matrix by Another of Lower Rank, Psychometrika 1936"
    rank_ratio = 1.0
    keeps_sparse = False

    def statistic(self, settings: CompressionSettings, in_features: int, device: torch.device) -> Statistic:
        from oats_vision.calibration.statistics import SCALES

        return SCALES[settings.scaling](in_features, device)

    def decompose(self, weight: Tensor, statistic: Statistic, budget: Budget, settings: CompressionSettings) -> Factors:
        return svd(weight, statistic.scale(), budget)


def svd(weight: Tensor, scale: Tensor, budget: Budget) -> Factors:
    """The best low-rank approximation of W D: truncated SVD, scaled by the inputs (plain with a scale of ones)."""
    from oats_vision.core.lowrank import exact_low_rank
    from oats_vision.core.oats import Factors, arithmetic, relative_error

    W = arithmetic(weight)
    D = scale.to(W)
    U, V = exact_low_rank(W * D, budget.rank)
    S = W.new_zeros(W.shape)
    return Factors(S, U, V / D, relative_error(W, S, U, V / D, D), iterations=1)
