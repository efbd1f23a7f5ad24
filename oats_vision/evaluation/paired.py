"""Dense against compressed on the same samples: the difference, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from oats_vision.evaluation.results import Difference, Figure, Ratio

if TYPE_CHECKING:
    from oats_vision.evaluation.perplexity import Perplexity

RESAMPLES = 10_000


@dataclass(frozen=True)
class Accuracy:
    """A share of pictures or questions that were answered right; correct: each of them, bool (samples,)."""

    correct: Tensor

    @property
    def percent(self) -> float:
        return 100 * float(self.correct.float().mean())

    def figure(self, name: str) -> Figure:
        return Figure(name=name, kind="percent", value=self.percent)

    def beside(self, dense: Accuracy) -> Difference:
        """What compression changed."""
        return paired_difference(dense.correct, self.correct)


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
