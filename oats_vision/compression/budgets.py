"""`rank_ratio auto`: the split of each layer's budget that runs fastest here, among those that lose little accuracy.

Where the budget goes decides how a layer runs: a low-rank term is dense products, a sparse term fewer operations at a
lower rate. Which is faster depends on the machine, the shape, and how many tokens come at a time.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from oats_vision.core.budget import Allocation, Budget
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear
from oats_vision.timing import side_by_side

RANK_RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4)
REPEATS = 9

Parts = list[tuple[str, int, Budget]]  # name, out_features and budget


def candidates(parts: Parts, in_features: int, allocation: Allocation) -> list[Parts]:
    """The same parts with the budgets of each rank ratio that leaves them a rank, or asks for none."""
    found = []
    for ratio in RANK_RATIOS:
        try:
            other = replace(allocation, rank_ratio=ratio)
            found.append([(name, rows, other.budget(rows, in_features)) for name, rows, _ in parts])
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
    x = torch.randn(tokens, layers[0].in_features, device=layers[0].sparse.values.device).to(dtype)
    seconds = side_by_side({str(i): lambda layer=layers[i]: layer(x) for i in allowed}, REPEATS)  # type: ignore[misc]
    return min(allowed, key=lambda i: seconds[str(i)])
