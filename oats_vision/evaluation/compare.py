"""Dense against compressed on the same pictures: the difference, and how sure it is."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """Compressed minus dense, in points of accuracy, with a 95% confidence interval.

    p_value: of McNemar's exact test that both are equally accurate.
    """

    points: float
    low: float
    high: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.points:+.2f} points [{self.low:+.2f}, {self.high:+.2f}]"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_difference(dense: Tensor, compressed: Tensor, seed: int = 0) -> Difference:
    """The difference of two accuracies measured on the same pictures.

    The interval is the percentile interval of the paired bootstrap. A picture's contribution is -1, 0 or 1, so
    that a resample is one draw of three counts.

    Args:
        dense, compressed: whether each picture was classified right, bool (pictures,).

    Raises:
        ValueError: they are not of the same pictures.
    """
    from scipy.stats import binomtest  # takes a second to import

    if dense.shape != compressed.shape or not len(dense):
        raise ValueError(f"the same pictures are needed, got {len(dense)} and {len(compressed)}")
    lost = int((dense & ~compressed).sum())
    won = int((~dense & compressed).sum())
    n = len(dense)
    draws = np.random.default_rng(seed).multinomial(n, [lost / n, won / n, (n - lost - won) / n], RESAMPLES)
    low, high = np.percentile(100 * (draws[:, 1] - draws[:, 0]) / n, [2.5, 97.5])
    p_value = binomtest(won, lost + won).pvalue if lost + won else 1.0
    return Difference(100 * (won - lost) / n, float(low), float(high), float(p_value))
