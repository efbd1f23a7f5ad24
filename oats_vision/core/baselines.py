"""The methods that OATS is compared with, as functions (weight, statistics of the inputs, budget) -> Factors.

All but `svd` keep a sparse matrix only, `svd` a low-rank one only. `Factors.error` is measured as for OATS,
|(W - S - U V) D| / |W D| with D the root mean square of the inputs, so that methods can be compared by it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from oats_vision.core.budget import Budget
from oats_vision.core.lowrank import exact_low_rank
from oats_vision.core.oats import Factors, arithmetic, output_error, relative_error
from oats_vision.core.threshold import keep_largest


def magnitude(weight: Tensor, scale: Tensor, budget: Budget) -> Factors:
    """Keep the weights of the largest magnitude (Han et al., 2015); `scale` is for the reported error only."""
    W = arithmetic(weight)
    return _sparse(W, keep_largest(W, budget), scale.to(W))


def wanda(weight: Tensor, scale: Tensor, budget: Budget) -> Factors:
    """Keep the largest |W_ij| |X_j| (Sun et al., Wanda, ICLR 2024, section 3); row-wise in the paper."""
    W = arithmetic(weight)
    D = scale.to(W)
    return _sparse(W, keep_largest(W * D, budget).div_(D), D)


def svd(weight: Tensor, scale: Tensor, budget: Budget) -> Factors:
    """The best low-rank approximation of W D: truncated SVD, scaled by the inputs (plain with a scale of ones)."""
    W = arithmetic(weight)
    D = scale.to(W)
    U, V = exact_low_rank(W * D, budget.rank)
    S = torch.zeros_like(W)
    return Factors(S, U, V / D, relative_error(W, S, U, V / D, D), rounds=1)


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
    return _sparse(W, W * kept, D)


def sparsegpt(weight: Tensor, gram: Tensor, budget: Budget, *, block_size: int = 128, damping: float = 0.01) -> Factors:
    """Prune column by column, and let the columns to the right make up for each loss.

    Frantar & Alistarh, "SparseGPT" (ICML 2023), Algorithm 1: with H the damped second moments of the inputs
    and C the upper Cholesky factor of its inverse, the mask of a block of columns keeps the largest
    W_ij^2 / C_jj^2, and a pruned w_j moves the rest of its row by -w_j / C_jj times row j of C.

    Args:
        weight: (out_features, in_features).
        gram: mean of x x^T over the inputs, (in_features, in_features).
        budget: with pattern `layer` the mask is chosen over all rows of a block of columns, as in the paper.
        damping: added to the diagonal of H, as a share of each entry (of its mean in the paper, which a few outlier
            features set far above all others).

    Raises:
        ValueError: `gram` is not finite.
    """
    W = arithmetic(weight).clone()
    original, columns, pattern = W.clone(), W.shape[1], budget.pattern
    if not gram.isfinite().all():
        raise ValueError("the inputs' second moments are not finite")
    H = gram.double().clone()
    dead = H.diagonal() <= 0
    D = H.diagonal().clamp_min(0).sqrt().to(W)
    H.diagonal()[dead] = 1.0
    W[:, dead] = 0.0
    C = _inverse_cholesky(H, damping).to(W)  # (in, in), upper
    if pattern.kind == "n:m":
        block_size = max(pattern.m, block_size - block_size % pattern.m)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, C_block = W[:, start:end], C[start:end, start:end]
        diagonal = C_block.diagonal()
        errors = torch.empty_like(block)
        if pattern.kind != "n:m":
            scores = block / diagonal
            mask = keep_largest(scores, _share(budget, len(W), columns, start, end)) != 0
        else:
            mask = torch.zeros_like(block, dtype=torch.bool)
        for j in range(end - start):
            if pattern.kind == "n:m" and j % pattern.m == 0:  # with the weights as updated so far
                group = slice(j, j + pattern.m)
                mask[:, group] = keep_largest(block[:, group] / diagonal[group], Budget(0, 0, pattern)) != 0
            errors[:, j] = block[:, j].masked_fill(mask[:, j], 0.0) / diagonal[j]
            block[:, j:] -= errors[:, j, None] * C_block[j, j:]
            block[:, j].masked_fill_(~mask[:, j], 0.0)
        W[:, end:] -= errors @ C[start:end, end:]
    factors = _sparse(original, W, D)
    return replace(factors, output_error=output_error(original, W, factors.U, factors.V, gram))


def _share(budget: Budget, rows: int, columns: int, start: int, end: int) -> Budget:
    """The budget of a block of columns; the blocks' budgets add up to the whole."""
    unit = rows if budget.pattern.kind == "row" else 1
    kept = budget.nonzeros // unit
    return Budget(0, unit * (kept * end // columns - kept * start // columns), budget.pattern)


def _inverse_cholesky(H: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of H, with more damping if need be."""
    for attempt in range(8):
        damped = H.clone()
        damped.diagonal().mul_(1 + damping * 10**attempt)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper
    raise ValueError("the inputs' second moments are no positive matrix")


def _sparse(W: Tensor, S: Tensor, D: Tensor) -> Factors:
    U, V = W.new_zeros(len(W), 0), W.new_zeros(0, W.shape[1])
    return Factors(S, U, V, relative_error(W, S, U, V, D), rounds=1)
