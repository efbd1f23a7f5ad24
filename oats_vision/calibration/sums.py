"""Sums that come out the same to the last bit whatever the order of their terms, and whoever has added which.

A sum is kept in two float64 numbers, the second of which holds what rounding has taken from the first (Knuth's
two-sum): about 106 bits. What is read of it is rounded to 40 bits. The error of the sum is 2^-60 of that rounding and
less, so that only a sum within this distance of the middle between two 40-bit numbers could come out in two ways.
"""

import torch
from torch import Tensor

from oats_vision import ranks

CHUNK = 1 << 15  # terms that are added at a time on a CPU, so that what is kept between the steps stays in its cache
_CUT = float(2 ** (53 - 40) + 1)


class Sum:
    """A sum of tensors, float64.

    >>> sums = [Sum(1), Sum(1)]
    >>> terms = torch.tensor([[1e16], [1.0], [3.0], [-1e16]])
    >>> for one, order in zip(sums, ([0, 1, 2, 3], [2, 3, 1, 0])):
    ...     for term in terms[order]:
    ...         one.add(term)
    >>> [float(one.value()) for one in sums]
    [4.0, 4.0]
    """

    def __init__(self, *shape: int, device: torch.device | str = "cpu") -> None:
        self.high = torch.zeros(shape, dtype=torch.float64, device=device)
        self.low = torch.zeros_like(self.high)

    def add(self, term: Tensor) -> None:
        """Add a tensor of any real dtype."""
        size = CHUNK if self.high.device.type == "cpu" else max(self.high.numel(), 1)
        for high, low, part in zip(*(one.reshape(-1).split(size) for one in (self.high, self.low, term)), strict=True):
            _add(high, low, part.to(torch.float64, copy=True))

    def over_ranks(self) -> None:
        """Take in what the other ranks have added."""
        if ranks.count() > 1:
            self.high, self.low = ranks.combined([self.high, self.low], _added), torch.zeros_like(self.low)

    def value(self) -> Tensor:
        """The sum of all terms, to 40 bits."""
        return _rounded(self.high, self.low)


def _add(high: Tensor, low: Tensor, term: Tensor) -> None:
    """Add to a sum in two parts, in place; `term` is used up."""
    total = high + term
    virtual = total - high
    term -= virtual
    torch.sub(total, virtual, out=virtual)
    high -= virtual
    term += high  # total + term is what high + term was
    low += term
    high.copy_(total)


def _added(parts: list[Tensor]) -> Tensor:
    """The sum over the first dimension of sums in two parts, to 40 bits."""
    high, low = (torch.zeros_like(parts[0][0]) for _ in range(2))
    for first, second in zip(*parts, strict=True):
        _add(high, low, first.clone())
        _add(high, low, second.clone())
    return _rounded(high, low)


def _rounded(high: Tensor, low: Tensor) -> Tensor:
    """high + low to 40 bits (Veltkamp); what is not finite stays so."""
    total = high + low.nan_to_num(0.0, 0.0, 0.0)
    wide = total * _CUT
    return torch.where(wide.isfinite(), wide - (wide - total), total)
