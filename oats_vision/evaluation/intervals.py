"""Figures over inputs, with their 95% intervals."""

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from oats_vision.evaluation.results import Kind, Metric

RESAMPLES, TOGETHER = 4000, 4_000_000  # draws, and how many inputs are drawn at a time


def proportion(name: str, hits: Tensor) -> Metric:
    """A share in percent, with Clopper and Pearson's exact interval: all the same on 64 is no proof of 100%."""
    from scipy.stats import binomtest

    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, method="exact")
    value = 100 * float(hits.double().mean())
    return Metric(name=name, kind="percent", value=value, low=100 * interval.low, high=100 * interval.high)


def mean(name: str, values: np.ndarray, kind: Kind = "number") -> Metric:
    """Of one value an input."""
    low, high = _bootstrap(len(values), lambda draws: values[draws].mean(1))
    return Metric(name=name, kind=kind, value=float(values.mean()), low=low, high=high)


def relative_error(name: str, change: np.ndarray, size: np.ndarray) -> Metric:
    """|compressed - dense| / |dense| over all inputs, from the squares of each."""
    low, high = _bootstrap(len(size), lambda draws: np.sqrt(change[draws].sum(1) / size[draws].sum(1)))
    value = math.sqrt(change.sum() / size.sum())
    return Metric(name=name, kind="number", value=value, low=low, high=high, lower_is_better=True)


def _bootstrap(count: int, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of a statistic over inputs that are drawn anew, (draws, count) -> (draws,)."""
    generator, some = np.random.default_rng(seed), max(1, min(RESAMPLES, TOGETHER // count))
    drawn = [statistic(generator.integers(count, size=(some, count))) for _ in range(-(-RESAMPLES // some))]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return float(low), float(high)
