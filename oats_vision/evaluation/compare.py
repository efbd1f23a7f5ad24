"""Dense against compressed on the same pictures: the difference, and how sure it is."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oats_vision.evaluation.perplexity import Perplexity

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


@dataclass(frozen=True)
class Ratio:
    """Compressed perplexity as a multiple of the dense one, with a 95% confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} x [{self.low:.4f}, {self.high:.4f}]"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_ratio(dense: Perplexity, compressed: Perplexity, seed: int = 0) -> Ratio:
    """The ratio of two perplexities of the same text; the interval is the paired bootstrap's over its windows.

    Raises:
        ValueError: they are not of the same windows.
    """
    if not torch.equal(dense.tokens, compressed.tokens):
        raise ValueError("the same windows are needed")
    weight = dense.tokens.double().numpy()
    change = (compressed.losses - dense.losses).numpy() * weight
    generator, n = np.random.default_rng(seed), len(weight)
    ratios: list[float] = []
    for _ in range(RESAMPLES // 10):
        draw = generator.integers(n, size=n)
        ratios.append(float(np.exp(change[draw].sum() / weight[draw].sum())))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Ratio(float(np.exp(change.sum() / weight.sum())), float(low), float(high))


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
