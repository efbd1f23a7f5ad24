"""What each method needs to know of a linear's inputs, and the call that decomposes its weight."""

from typing import Any

import torch
from torch import Tensor

from oats_vision.calibration.statistics import SCALES, Gram, MeanAndVariance, SecondMoment, Statistic
from oats_vision.compression.settings import CompressionSettings
from oats_vision.core.baselines import dsnot, magnitude, sparsegpt, svd, wanda
from oats_vision.core.budget import Budget
from oats_vision.core.oats import Factors, column_scale, oats
from oats_vision.core.refit import refit
from oats_vision.kernels.thresholding import sparse_term


def statistic_of(settings: CompressionSettings, in_features: int, device: torch.device) -> Statistic:
    """An empty statistic of the kind that the method needs."""
    if settings.method == "sparsegpt" or settings.refit:
        return Gram(in_features, device)
    if settings.method == "dsnot":
        return MeanAndVariance(in_features, device)
    if settings.method in ("oats", "svd"):
        return SCALES[settings.scaling](in_features, device)
    return SecondMoment(in_features, device)


def decompose(weight: Tensor, statistic: Statistic, budget: Budget, settings: CompressionSettings) -> Factors:
    """Decompose one weight (out_features, in_features) by the method of the settings.

    Raises:
        ValueError: the statistic has seen no token, or is not finite.
    """
    options: dict[str, Any] = {name: getattr(settings, name) for name in ("solver", "iterations", "tolerance")}
    options["sparse_term"] = sparse_term
    if isinstance(statistic, Gram):
        gram = statistic.compute()
        if settings.method == "sparsegpt":
            return sparsegpt(weight, gram, budget)
        return refit(weight, oats(weight, column_scale(gram.diagonal()), budget, **options), gram)
    scale = statistic.scale()
    if isinstance(statistic, MeanAndVariance):
        return dsnot(weight, scale, *statistic.mean_and_variance(), budget)
    if settings.method == "magnitude":
        return magnitude(weight, scale, budget)
    if settings.method == "wanda":
        return wanda(weight, scale, budget)
    if settings.method == "svd":
        return svd(weight, scale, budget)
    return oats(weight, scale, budget, **options)
