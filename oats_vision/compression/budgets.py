"""`rank_ratio auto`: for each layer the ratio that runs fastest here, among those that lose little accuracy.

Where the budget goes decides how a layer runs: a low-rank term is dense products, a sparse term fewer operations at a
lower rate. Which is faster depends on the machine, the shape, and how many tokens come at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from oats_vision.core.budget import Allocation, Budget
from oats_vision.nn.sparse_low_rank import LayerSpec, PartSpec, SparseLowRankLinear
from oats_vision.timing import side_by_side

RANK_RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4)
REPEATS = 9


@dataclass(frozen=True)
class PartBudget:
    """One matrix of a fused weight, or the whole of a plain one, and what it may keep."""

    name: str
    out_features: int
    budget: Budget


def planned(in_features: int, bias: bool, parts: Sequence[PartBudget]) -> LayerSpec:
    """The layer that a linear becomes; all parts have values of one sort."""
    stored = tuple(PartSpec(part.name, part.out_features, part.budget.rank, part.budget.nonzeros) for part in parts)
    rows, first = sum(part.out_features for part in parts), parts[0].budget
    return LayerSpec(in_features, rows, bias, stored, first.grid, first.int8_factors)


def candidates(parts: list[PartBudget], in_features: int, allocation: Allocation) -> list[list[PartBudget]]:
    """The same parts with the budgets of each rank ratio that leaves them a rank, or asks for none."""
    found = []
    for ratio in RANK_RATIOS:
        try:
            other = replace(allocation, rank_ratio=ratio)
            found.append([replace(part, budget=other.budget(part.out_features, in_features)) for part in parts])
        except ValueError:
            continue  # too small a weight for this ratio
    return found


def fastest(
    layers: Sequence[SparseLowRankLinear], errors: Sequence[float], tolerance: float, tokens: int, dtype: torch.dtype
) -> int:
    """Which of the layers has the lowest measured latency, among those whose error is within the tolerance.

    Args:
        errors: of each layer; the tolerance is a share of the smallest.
        tokens: that come at a time, in `dtype`.
    """
    allowed = [i for i, error in enumerate(errors) if error <= (1 + tolerance) * min(errors)]
    x = torch.randn(tokens, layers[0].in_features, device=layers[0].low_rank.U.device).to(dtype)
    seconds = side_by_side({str(i): lambda layer=layers[i]: layer(x) for i in allowed}, REPEATS)  # type: ignore[misc]
    return min(allowed, key=lambda i: seconds[str(i)])
