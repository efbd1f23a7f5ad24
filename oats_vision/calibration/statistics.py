"""Streaming statistics of a linear layer's inputs: one pass, one vector per layer, any batch size."""

from typing import Protocol

import torch
from torch import Tensor

from oats_vision import ranks
from oats_vision.calibration.sums import Sum
from oats_vision.core.correlations import Correlations
from oats_vision.core.oats import column_scale, normalised
from oats_vision.core.quantise import inverse_factor
from oats_vision.models.values import all_finite

LARGEST = 2048  # inputs that weigh together in `joint`: beyond, eigenvectors and rotations would take most of the time


class Statistic(Protocol):
    """What is gathered of a linear's inputs in one pass; the classes below are made from `in_features` and a device."""

    def update(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add inputs (..., in_features), any floating dtype; `mask` (...) is true for tokens that count."""

    def over_ranks(self) -> None:
        """Take in what other ranks have seen; all call it, once, when they have seen all of theirs."""

    def compute(self) -> Tensor:
        """The statistic, float64. Raises ValueError if no token was seen."""

    def scale(self) -> Tensor:
        """What columns of the weight are scaled by, finite and positive, (in_features,)."""


class SecondMoment:
    """Mean of the squares of each input feature over all tokens (OATS, section 3.2).

    Squares are summed in float32 over a few hundred tokens and in float64 beyond, so that the result is the
    same to 1e-6 however the tokens were batched, and to the last bit in whatever order the batches come. Values whose
    squares overflow float32 are squared in float64.

    >>> moment = SecondMoment(2)
    >>> moment.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> moment.compute().tolist()
    [5.0, 2.0]
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.total = Sum(in_features, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add inputs (..., in_features), any floating dtype; `mask` (...) is true for tokens that count."""
        tokens, total = _tokens(inputs, mask), torch.zeros_like(self.total.high)
        for chunk in tokens.split(512):
            squares = (chunk if chunk.dtype == torch.float64 else chunk.float()).square().sum(0)
            if not squares.isfinite().all():
                squares = chunk.double().square_().sum(0)
            total += squares
        self.total.add(total)
        self.tokens += len(tokens)

    def over_ranks(self) -> None:
        """Take in what other ranks have seen."""
        self.total.over_ranks()
        self.tokens = sum(ranks.everyones(self.tokens))

    def compute(self) -> Tensor:
        """The second moment, (in_features,), float64.

        Raises:
            ValueError: no token was seen.
        """
        if not self.tokens:
            raise ValueError("no token was seen: the calibration inputs are empty or all masked out")
        return self.total.value() / self.tokens

    def scale(self) -> Tensor:
        """D = sqrt(second moment), finite and positive, (in_features,)."""
        return column_scale(self.compute())


class MedianMagnitude:
    """Median magnitude of each input feature: robust to outlier tokens, for the ablation of the scaling.

    Magnitudes are counted in bins of 1/16 of an octave, so that the result does not depend on the order or
    the batches; it is exact to half a bin (about 2%).
    """

    OCTAVES, PER_OCTAVE, LOWEST = 48, 16, -32  # 2^-32 to 2^16; outside counts in the first or the last bin

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        bins = self.OCTAVES * self.PER_OCTAVE
        self.counts = torch.zeros(in_features, bins, dtype=torch.int32, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add inputs (..., in_features), any floating dtype; `mask` (...) is true for tokens that count."""
        tokens = _tokens(inputs, mask)
        for chunk in tokens.split(512):
            octave = chunk.float().abs().nan_to_num().log2().sub_(self.LOWEST).mul_(self.PER_OCTAVE)
            index = octave.clamp_(0, self.counts.shape[1] - 1).long().T  # (in, tokens)
            self.counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))
        self.tokens += len(tokens)

    def over_ranks(self) -> None:
        """Take in what other ranks have seen."""
        self.counts = ranks.combined([self.counts], lambda parts: parts[0].sum(0, dtype=torch.int32))
        self.tokens = sum(ranks.everyones(self.tokens))

    def compute(self) -> Tensor:
        """The median of |x|, (in_features,), float64; zero where the median feature value is (almost) zero.

        Raises:
            ValueError: no token was seen.
        """
        if not self.tokens:
            raise ValueError("no token was seen: the calibration inputs are empty or all masked out")
        middle = (self.tokens + 1) // 2
        index = (self.counts.cumsum(1) < middle).sum(1)
        median = torch.exp2((index.double() + 0.5) / self.PER_OCTAVE + self.LOWEST)
        return median.masked_fill_(index == 0, 0.0)

    def scale(self) -> Tensor:
        """D = median of |x|, finite and positive, (in_features,)."""
        return column_scale(self.compute().square())


class MeanAndVariance(SecondMoment):
    """Mean and variance of each input feature, and its second moment (for DSnoT)."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.sum = Sum(in_features, device=device)

    def update(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add inputs (..., in_features), any floating dtype; `mask` (...) is true for tokens that count."""
        super().update(inputs, mask)
        self.sum.add(_tokens(inputs, mask).sum(0, dtype=torch.float64))

    def over_ranks(self) -> None:
        """Take in what other ranks have seen."""
        super().over_ranks()
        self.sum.over_ranks()

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Both (in_features,), float64, finite. Raises ValueError if no token was seen."""
        moment = self.compute()
        mean = self.sum.value() / self.tokens
        return mean.nan_to_num(0.0, 0.0, 0.0), (moment - mean.square()).clamp_min(0).nan_to_num(0.0, 0.0)


class Gram:
    """Mean of x x^T over all tokens x: the second moments of all pairs of input features (for SparseGPT).

    Products are summed in float32 over a batch (in float64 if they overflow) and beyond it without rounding, so that
    the order of the batches changes nothing. The mean is symmetric: blocks of rows are computed from the diagonal on,
    which is little more than half of the work.

    noise: what each feature's mean square that is not 0 grows by, as a share of their median. damping: of
    `inverse_factor`.
    """

    BLOCK = 256  # rows

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.noise, self.damping = 0.0, 0.01
        self.upper = [
            Sum(min(self.BLOCK, in_features - first), in_features - first, device=device)
            for first in range(0, in_features, self.BLOCK)
        ]
        self.tokens = 0
        self._mean: Tensor | None = None
        self._correlations: Correlations | None = None
        self._inverse_factor: Tensor | None = None
        self._shares: Tensor | None = None

    def update(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add inputs (..., in_features), any floating dtype; `mask` (...) is true for tokens that count."""
        tokens = _tokens(inputs, mask)
        self._forget()
        for chunk in tokens.chunk(max(1, -(-len(tokens) // 8192))):
            x = chunk if chunk.dtype == torch.float64 else chunk.float()
            for first, block in zip(range(0, x.shape[1], self.BLOCK), self.upper, strict=True):
                left, right = x[:, first : first + self.BLOCK], x[:, first:]
                product = left.T @ right
                block.add(product if all_finite(product) else left.double().T @ right.double())
        self.tokens += len(tokens)

    def over_ranks(self) -> None:
        """Take in what other ranks have seen."""
        for block in self.upper:
            block.over_ranks()
        self.tokens = sum(ranks.everyones(self.tokens))
        self._forget()

    def _forget(self) -> None:
        self._mean = self._correlations = self._inverse_factor = self._shares = None

    def compute(self) -> Tensor:
        """The mean of x x^T, with its noise, (in_features, in_features), float64; not to be changed.

        Raises:
            ValueError: no token was seen.
        """
        if not self.tokens:
            raise ValueError("no token was seen: the calibration inputs are empty or all masked out")
        if self._mean is None:
            width = self.upper[0].high.shape[1]
            self._mean = mean = self.upper[0].high.new_empty(width, width)
            for first, block in zip(range(0, width, self.BLOCK), self.upper, strict=True):
                last = first + len(block.high)
                mean[first:last, first:] = block.value() / self.tokens
                mean[last:, first:last] = mean[first:last, last:].T
            if self.noise:
                _add_noise(mean.diagonal(), self.noise)
        return self._mean

    def mean(self) -> Tensor:
        """The mean of x x^T as it is. Raises ValueError if no token was seen."""
        noisy = self.compute()
        return torch.diagonal_scatter(noisy, self.squares() / self.tokens) if self.noise else noisy

    def squares(self) -> Tensor:
        """The sum of each feature's squares, (in_features,), float64."""
        return torch.cat([block.value().diagonal() for block in self.upper])

    def shares(self, dtype: torch.dtype) -> Tensor:
        """The mean as shares of the features' mean square, which fit into float32; made once for one dtype.

        Raises:
            ValueError: no token was seen.
        """
        if self._shares is None or self._shares.dtype != dtype:
            self._shares = normalised(self.compute()).to(dtype)
        return self._shares

    def correlations(self) -> Correlations:
        """The mean with a unit diagonal, in float32; made once for all that read these inputs.

        Raises:
            ValueError: no token was seen, or the moments are not finite.
        """
        if self._correlations is None:
            self._correlations = Correlations.of(self.compute(), torch.float32, largest=LARGEST)
        return self._correlations

    def inverse_factor(self) -> Tensor:
        """What GPTQ passes losses on by, in float32: see `core.quantise`; made once for all that read these inputs.

        Raises:
            ValueError: no token was seen, or the moments are not finite.
        """
        if self._inverse_factor is None:
            if not self.compute().isfinite().all():
                raise ValueError("the inputs' second moments are not finite")
            self._inverse_factor = inverse_factor(self.compute(), self.damping).float()
        return self._inverse_factor

    def scale(self) -> Tensor:
        """D = sqrt(second moment), finite and positive, (in_features,)."""
        return column_scale(self.compute().diagonal())


class CrossMoment:
    """Mean of y x^T over all tokens: what two streams have in common.

    Products are summed in float32 over a batch and without rounding beyond, as in `Gram`.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str = "cpu") -> None:
        self.total = Sum(rows, columns, device=device)
        self.tokens = 0

    def update(self, y: Tensor, x: Tensor) -> None:
        """Add (tokens, rows) and (tokens, columns), any floating dtypes."""
        wide = torch.promote_types(torch.promote_types(y.dtype, x.dtype), torch.float32)
        for left, right in zip(y.split(8192), x.split(8192), strict=True):
            product = left.to(wide).T @ right.to(wide)
            self.total.add(product if all_finite(product) else left.double().T @ right.double())
        self.tokens += len(y)

    def over_ranks(self) -> None:
        """Take in what other ranks have seen."""
        self.total.over_ranks()
        self.tokens = sum(ranks.everyones(self.tokens))

    def compute(self) -> Tensor:
        """The mean of y x^T, (rows, columns), float64. Raises ValueError if no token was seen."""
        if not self.tokens:
            raise ValueError("no token was seen: the calibration inputs are empty or all masked out")
        return self.total.value() / self.tokens


class NoScale:
    """D = 1: the ablation without outlier information; keeps no statistics."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.ones = torch.ones(in_features, dtype=torch.float64, device=device)

    def update(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Nothing is kept."""

    def over_ranks(self) -> None:
        """Nor shared."""

    def compute(self) -> Tensor:
        """Ones, (in_features,)."""
        return self.ones

    def scale(self) -> Tensor:
        """Ones, (in_features,)."""
        return self.ones


# by the name of the setting `scaling`
SCALES: dict[str, type[SecondMoment | MedianMagnitude | NoScale]] = {
    "second_moment": SecondMoment,
    "median": MedianMagnitude,
    "none": NoScale,
}


def _add_noise(squares: Tensor, share: float) -> None:
    """To each that is not 0 a share of their median."""
    active = squares > 0
    if active.any():
        squares.add_(active * (share * squares[active].median()))


def _tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """(tokens that count, in_features)."""
    inputs = inputs.detach()
    return inputs.flatten(0, -2) if mask is None else inputs[mask.bool()]
