"""Which layers come out such that they are better left dense, and which are odd."""

from collections.abc import Iterable

import torch
from torch import Tensor

from oats_vision.calibration.statistics import Gram, SecondMoment, Statistic
from oats_vision.core.correlations import Correlations
from oats_vision.core.oats import Factors, arithmetic, normalised
from oats_vision.errors import DataError

# what a method raises of a layer that it cannot decompose
UNUSABLE: tuple[type[Exception], ...] = (ValueError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


class UnusableLayerError(DataError):
    """A layer cannot be decomposed."""

    def __init__(self, name: str, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{name}: {reason}: leave such layers dense by `on_bad_layer=dense`")


def no_better_than_zeros(parts: Iterable[tuple[Tensor, Factors, Correlations | None]], statistic: Statistic) -> str:
    """Why a layer should stay dense: a part of it comes out with an error of 1 or more; empty if none does.

    Zeros in its place would have an error of 1. Where errors are weighed by what they do to the model's output, that
    decides: rows that do not matter there may be worse than zeros.

    Args:
        parts: of each the weight that was aimed at, what it was decomposed into, and the correlations of the gradients
            at its outputs, if they weighed its errors.
        statistic: of the layer's inputs.
    """
    for weight, factors, outputs in parts:
        error = factors.error if factors.output_error is None else factors.output_error
        if error < 1:
            continue
        if outputs is not None and isinstance(statistic, Gram):
            error = weighted_error(weight, factors, statistic.compute(), outputs)
        if not error < 1:
            return f"it came out with a relative error of {error:.3g}, no better than zeros"
    return ""


def weighted_error(weight: Tensor, factors: Factors, gram: Tensor, outputs: Correlations) -> float:
    """The error as `joint` and `refit` weigh it, sqrt(tr(M E G E^T) / tr(M W G W^T)); 0 for a weight of zeros."""
    W = arithmetic(weight)
    H, M = normalised(gram).to(W), outputs.moments().to(W)
    lost, whole = (float((M.times(X @ H) * X).sum().clamp_min(0)) for X in (W - factors.dense(), W))
    return (lost / whole) ** 0.5 if whole > 0 else 0.0


def oddity(weight: Tensor, statistic: Statistic, tokens: int) -> str:
    """What is odd about a layer that was compressed all the same; empty if nothing is."""
    if not torch.any(weight):
        return "its weight is zero everywhere"
    if not tokens:
        return "no calibration data reached it: decomposed by its weight alone"
    if isinstance(statistic, Gram | SecondMoment) and not torch.any(statistic.compute()):
        return "its inputs are zero in all calibration data: decomposed by its weight alone"
    return ""
