"""What each linear's decomposition costs the model's output, by how much of the linear is kept."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from oats_vision.calibration.statistics import Gram, Statistic
from oats_vision.compression.allocation import Point
from oats_vision.compression.methods import LinearMethod
from oats_vision.compression.settings import CompressionSettings
from oats_vision.core.budget import Budget
from oats_vision.core.oats import arithmetic, normalised

# densities at which a curve is measured, as multiples of the global one: no linear gets more, or less, than the ends.
# Far from there the errors of layers no longer add up, and what each costs alone says little.
DENSITIES = (0.67, 1.0, 1.5)
ROWS = 256  # of a weight that are decomposed, about: they stand for the others
LOWEST, HIGHEST = 0.02, 0.98  # rates


class Seen:
    """A linear's inputs, for a curve: what the method needs to know of them, and their second moments."""

    def __init__(self, own: Statistic, features: int, device: torch.device) -> None:
        self.own = own
        self.gram = own if isinstance(own, Gram) else Gram(features, device)

    def update(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add inputs."""
        self.own.update(inputs, mask)
        if self.gram is not self.own:
            self.gram.update(inputs, mask)

    def over_ranks(self) -> None:
        """Take in what other ranks have seen."""
        self.own.over_ranks()
        if self.gram is not self.own:
            self.gram.over_ranks()

    def compute(self) -> Tensor:
        """The mean of x x^T."""
        return self.gram.compute()

    def scale(self) -> Tensor:
        """What the method scales columns by."""
        return self.own.scale()


@dataclass(frozen=True)
class Weight:
    """One weight, and what is known of it.

    W: (out_features, in_features). sensitivity: s, of the model's output to its outputs, (out_features,).
    own: what the method knows of its inputs. gram: their second moments G, (in_features, in_features).
    """

    W: Tensor
    sensitivity: Tensor
    own: Statistic
    gram: Tensor


def error_curve(weight: Weight, method: LinearMethod, settings: CompressionSettings) -> list[Point]:
    """The points (parameters kept, error of the model's output) of one weight.

    Rates that leave the weight no rank, or no non-zeros, are left out.

    Raises:
        ValueError: it cannot be decomposed.
    """
    (m, n), lowest = weight.W.shape, min(LOWEST, settings.rate)
    rates = sorted({max(1 - multiple * (1 - settings.rate), lowest) for multiple in DENSITIES})
    budgets = []
    for rate in rates:
        with suppress(ValueError):
            budgets.append(replace(settings.allocation, rate=rate).budget(m, n))
    found = costs(weight, method, settings, [partial(_of_rows, whole, m) for whole in budgets])
    return [(whole.parameters(m, n), cost) for whole, cost in zip(budgets, found, strict=True)]


def _of_rows(whole: Budget, out_features: int, rows: int, in_features: int) -> Budget:
    """For some rows of a weight: what keeps as large a share of them, with a rank where the whole weight has one.

    Args:
        whole: of the weight, with `out_features` rows.
    """
    rank = round(whole.rank * rows * (out_features + in_features) / (out_features * (rows + in_features)))
    return replace(whole, rank=max(rank, min(whole.rank, 1)), nonzeros=whole.nonzeros * rows // out_features)


def costs(
    weight: Weight,
    method: LinearMethod,
    settings: CompressionSettings,
    budgets: Sequence[Callable[[int, int], Budget]],
) -> list[float]:
    """What each of some budgets costs the model's output, by rough decompositions.

    Of a weight with many rows some are decomposed, evenly spaced, and stand for the others by what it would cost to
    lose a row. The cost is sum_i s_i (E G E^T)_ii, with E the weight's error: see `output_sensitivity`.

    Args:
        budgets: of a weight, from the shape of what is decomposed of it.

    Raises:
        ValueError: it cannot be decomposed.
    """
    step = max(len(weight.W) // ROWS, 1)
    rows, sensitivity = weight.W[::step], weight.sensitivity[::step]
    W, (m, n) = arithmetic(rows), rows.shape
    H = weight.own.shares(W.dtype) if isinstance(weight.own, Gram) else normalised(weight.gram).to(W)
    size = weight.gram.diagonal().mean()  # G is H times that
    share = _share(weight, step)
    found = []
    for budget_of in budgets:
        E = W - method.decompose_roughly(rows, weight.own, budget_of(m, n), settings).dense()
        errors = ((E @ H) * E).sum(1).double().clamp_min(0)  # (out,)
        cost = float(size * (errors @ sensitivity)) / share
        if not math.isfinite(cost):
            raise ValueError("what it is decomposed into is not finite")
        found.append(cost)
    return found


def _share(weight: Weight, step: int) -> float:
    """The share that each `step`-th row has in what it would cost to lose all, by the inputs' sizes alone."""
    lost = weight.W.double().square() @ weight.gram.diagonal() * weight.sensitivity
    share = float(lost[::step].sum() / lost.sum())
    return share if share > 0 and math.isfinite(share) else len(lost[::step]) / len(lost)
