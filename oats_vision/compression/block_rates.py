"""Rates for whole blocks as published: OWL by outliers, AlphaPruning by spectra. Baselines of `budget measured`."""

from collections.abc import Sequence

import torch
from torch import Tensor

OUTLIER = 5.0  # M of OWL: an outlier is so many times the mean score
OWL_SPREAD = 0.08  # lambda of OWL: how far a block's rate is from the global one at most, about
ALPHA_SPREAD = 0.3  # tau of AlphaPruning: the rates of blocks range from 1 - tau to 1 + tau, before they are scaled
MOST = 100.0  # exponent, of a spectrum that is all at one value
BINS = 100  # of the histogram in which AlphaPruning looks for the peak of a spectrum


def outlier_ratio(scores: Sequence[Tensor]) -> float:
    """OWL's layerwise outlier distribution: the share of a block's weights that score above M times their mean.

    Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, section 3.2; as their code does it, over all
    linears of a block together.

    Args:
        scores: |W_ij| |X_j| of each linear of the block, with |X_j| the norm of an input feature over all tokens.
    """
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / sum(score.numel() for score in scores)
    above = sum(int((score > OUTLIER * mean).sum()) for score in scores)
    return above / sum(score.numel() for score in scores)


def owl_rates(ratios: Sequence[float], rate: float, spread: float = OWL_SPREAD) -> list[float]:
    """Blocks with more outliers lose less: OWL, section 3.2.

    The ratios are stretched over 2 lambda, and moved so that the mean of the blocks' densities is the global one.

    >>> [round(rate, 3) for rate in owl_rates([0.01, 0.02, 0.03], rate=0.5)]
    [0.58, 0.5, 0.42]
    """
    density = [2 * spread * share for share in _stretched(ratios)]
    mean = sum(density) / len(density)
    return [rate - (share - mean) for share in density]


def hill_exponent(weight: Tensor) -> float:
    """The power law's exponent in the tail of a weight's spectrum, by Hill's estimator (PL_Alpha_Hill).

    Lu et al., "AlphaPruning", NeurIPS 2024, equation 2: of the eigenvalues of W^T W in falling order, the first k are
    the tail, and alpha = 1 + k / sum_i ln(lambda_i / lambda_k). The tail begins at the peak of the spectrum, the
    fullest bin of a histogram of the eigenvalues' logarithms (Fix-finger).
    """
    values = torch.linalg.svdvals(weight.detach().float()).double().square()
    logs = values[values > 0].log().sort().values  # rising
    if not len(logs):
        return MOST
    low, high = float(logs[0]), float(logs[-1])
    peak = int(torch.histc(logs, BINS, low, high).argmax())
    tail = logs[logs >= low + (high - low) * peak / BINS]
    return min(1 + len(tail) / max(float((tail - tail[0]).sum()), 1e-9), MOST)


def alpha_rates(
    alphas: Sequence[float], sizes: Sequence[int], rate: float, spread: float = ALPHA_SPREAD
) -> list[float]:
    """Blocks with lighter tails (larger alpha) are trained less well, and lose more: AlphaPruning, section 3.2.

    Args:
        alphas: of each block, the mean of its linears'. sizes: weights of each block.
    """
    raw = [1 - spread + 2 * spread * share for share in _stretched(alphas)]
    scale = rate * sum(sizes) / sum(size * value for size, value in zip(sizes, raw, strict=True))
    return [scale * value for value in raw]


def _stretched(scores: Sequence[float]) -> list[float]:
    """Scores moved and stretched to [0, 1]; equal ones are all in the middle."""
    low, high = min(scores), max(scores)
    return [(score - low) / (high - low) if high > low else 0.5 for score in scores]
