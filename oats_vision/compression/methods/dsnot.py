"""DSnoT: Wanda's mask, made better by swaps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oats_vision.compression.methods import LinearMethod, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from oats_vision.calibration.statistics import Statistic
    from oats_vision.compression.settings import CompressionSettings
    from oats_vision.core.budget import Budget
    from oats_vision.core.oats import Factors


@register
class DSnoT(LinearMethod):
    """Wanda, then swaps of pruned for kept weights."""

    name = "dsnot"
    citation = "Zhang et al., Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs, ICLR 2024"

    def statistic(self, settings: CompressionSettings, in_features: int, device: torch.device) -> Statistic:
        from oats_vision.calibration.statistics import MeanAndVariance

        return MeanAndVariance(in_features, device)

    def decompose(self, weight: Tensor, statistic: Statistic, budget: Budget, settings: CompressionSettings) -> Factors:
        from oats_vision.calibration.statistics import MeanAndVariance

        assert isinstance(statistic, MeanAndVariance)
        return dsnot(weight, statistic.scale(), *statistic.mean_and_variance(), budget)


def dsnot(
    weight: Tensor,
    scale: Tensor,
    mean: Tensor,
    variance: Tensor,
    budget: Budget,
    *,
    cycles: int = 50,
    threshold: float = 0.1,
) -> Factors:
    """Wanda's mask, then swaps of a pruned for a kept weight that lower each output's expected error.

    Zhang et al., "Dynamic Sparse No Training" (ICLR 2024), section 3. The expected error of an output is the
    pruned weights' mean contribution. A cycle revives the pruned weight that takes most off it for its
    variance, and prunes the one of the smallest Wanda score among those kept whose loss takes off more. A row
    is done when its error is below the threshold, when a swap would not lower it, or after `cycles`.

    Args:
        weight: (out_features, in_features).
        scale: root mean square of the inputs; mean, variance: of the inputs; each (in_features,).
        budget: with N:M, swaps stay within a group.
    """
    import torch

    from oats_vision.core.oats import Factors, arithmetic
    from oats_vision.core.threshold import keep_largest

    W = arithmetic(weight)
    D, contribution = scale.to(W), W * mean.to(W)
    kept = keep_largest(W * D, budget) != 0
    score, gain = (W * D).abs(), contribution / variance.to(W).clamp_min(1e-12)
    error = (contribution * ~kept).sum(1)  # (out,)
    rows = torch.arange(len(W), device=W.device)
    group = torch.arange(W.shape[1], device=W.device) // (budget.pattern.m or W.shape[1])
    infinity = torch.full((), torch.inf, dtype=W.dtype, device=W.device)
    active = error.abs() > threshold
    for _ in range(cycles if budget.nonzeros else 0):
        sign = error.sign()[:, None]
        grow = torch.where(kept, -infinity, sign * gain).argmax(1)
        candidate = kept & (sign * contribution < 0) & (group == group[grow][:, None])
        lowest, prune = torch.where(candidate, score, infinity).min(1)
        after = error - contribution[rows, grow] + contribution[rows, prune]
        active &= lowest.isfinite() & ~kept[rows, grow] & (after.abs() < error.abs()) & (error.abs() > threshold)
        if not active.any():
            break
        moved = rows[active]
        kept[moved, grow[active]] = True
        kept[moved, prune[active]] = False
        error = torch.where(active, after, error)
    return Factors.sparse(W, W * kept, D)
